"""The spine of a network: the values through which all of its activations pass, and the shape of what lies between.

The deepest chain of weights runs from a source (an embedding lookup, a first convolution) to a sink. A node of which
no path from source to sink can do without is a *cut*; two successive cuts bound an *interval*. In a transformer the
cuts are the additions to the residual stream; in a plain convolutional network every node is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from qc.ir._blocks_index import MATRIX, GraphIndex

__all__ = ["Spine", "find_spine"]


@dataclasses.dataclass(frozen=True)
class Spine:
    """A source-to-sink chain of intervals; interval 0 is the source alone.

    Attributes:
        interval: Interval of each node on a path from source to sink.
        cuts: The node that ends each interval.
        signatures: For each interval, a number that is equal for intervals of equal structure.
        weights: For each interval, how many of its nodes consume a matrix weight.
    """

    interval: dict[int, int]
    cuts: list[int]
    signatures: list[int]
    weights: list[int]


def find_spine(index: GraphIndex, members: Sequence[int]) -> Spine | None:
    """Returns the spine of the sub-graph of `members` (ascending positions), or None if it consumes no weight.

    Linear in nodes and edges.
    """
    ends = _deepest_path(index, members)
    if ends is None:
        return None
    path = _between(index, members, *ends)
    cuts = _cuts(index, path)
    interval, signatures, weights, i = {}, [], [], 0
    for end in cuts:
        nodes = []
        while i < len(path) and path[i] <= end:
            nodes.append(path[i])
            i += 1
        interval.update((n, len(signatures)) for n in nodes)
        previous = cuts[len(signatures) - 1] if signatures else -1
        signatures.append(_signature(index, nodes, previous))
        weights.append(sum(index.anchor[n] == MATRIX for n in nodes))
    return Spine(interval, cuts, signatures, weights)


def _deepest_path(index: GraphIndex, members: Sequence[int]) -> tuple[int, int] | None:
    """Source and sink of the path with the most weight-consuming nodes; a tie goes to the last sink, first source."""
    depth: dict[int, int] = {}
    sink = -1
    for i in members:
        if index.const[i]:
            continue
        depth[i] = max((depth.get(p, 0) for p in index.data_preds[i]), default=0) + (index.anchor[i] > 0)
        if depth[i] > 0 and depth[i] >= depth.get(sink, 0):
            sink = i
    if sink < 0:
        return None
    source = sink
    while depth[source] > (index.anchor[source] > 0):
        source = min((p for p in index.data_preds[source] if p in depth), key=lambda p: (-depth[p], p))
    return source, sink


def _between(index: GraphIndex, members: Sequence[int], source: int, sink: int) -> list[int]:
    """Nodes on a data path from source to sink, ascending."""
    reached = {source}
    for i in members:
        if source < i <= sink and any(p in reached for p in index.data_preds[i]):
            reached.add(i)
    wanted = {sink}
    for i in reversed(members):
        if i in wanted and i != source:
            wanted.update(p for p in index.data_preds[i] if p in reached)
    return sorted(wanted)


def _cuts(index: GraphIndex, path: Sequence[int]) -> list[int]:
    """Nodes of `path` that no edge jumps over: exactly those on every path from its first to its last node.

    A node that only changes the representation is no cut: a Cast or a QuantizeLinear belongs to what follows.
    """
    last_use = {n: n for n in path}
    for n in path:
        for p in index.data_preds[n]:
            if p in last_use:
                last_use[p] = n
    cuts, reach = [], -1
    for n in path:
        if reach <= n and not (index.transparent[n] and n != path[-1]):
            cuts.append(n)
        reach = max(reach, last_use[n])
    return cuts


def _signature(index: GraphIndex, nodes: Sequence[int], previous: int) -> int:
    """The term that computes the last node from the previous cut, as a number.

    Constants count by shape and not by value, everything from off the path counts as one unknown: masks, positions,
    a key-value cache. So layers that differ in a window or in the format of their weights are alike.
    """
    label: dict[int, int] = {}
    for n in nodes:
        inputs = tuple(_input_label(index, v, label, previous) for v in index.inputs[n])
        node = index.nodes[n]
        transparent = index.transparent[n]
        label[n] = inputs[0] if transparent else index.intern((node.op_identifier(), _structure(node), inputs))
    return label[nodes[-1]]


def _input_label(index: GraphIndex, value: ir.Value | None, label: dict[int, int], previous: int) -> int:
    if value is None:
        return index.intern("omitted")
    producer = value.producer()
    at = index.position.get(producer, -1) if producer is not None else -1
    if at in label:
        return label[at] if value.index() == 0 else index.intern((label[at], value.index()))
    if at == previous and at >= 0:
        return index.intern(("carried", value.index()))
    if index.is_const(value):
        return index.intern(("constant", index.weight(value)))
    return index.intern("outside")


def _structure(node: ir.Node) -> tuple:
    """Attributes that shape the computation; a float (epsilon, scale) is a constant like any other."""
    kept = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref() or attribute.type in (ir.AttributeType.INT, ir.AttributeType.STRING):
            kept.append((name, attribute.value))
        elif attribute.type in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
            kept.append((name, tuple(attribute.value)))
        elif attribute.type == ir.AttributeType.GRAPH:
            kept.append((name, tuple(n.op_identifier() for n in attribute.as_graph().all_nodes())))
    return tuple(kept)
