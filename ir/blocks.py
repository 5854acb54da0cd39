"""The repeated blocks of a network, found from the graph alone: no names of nodes, tensors or classes.

A network is a chain of intervals between the values through which all of its activations pass; a block is the unit of
the longest repeats in that chain. What lies off the chain goes to the block that uses it, or, when several do (masks,
positions, a rotary table), to a segment before them. What remains before, between and after the repeats is searched in
the same way: that finds the decoder behind an encoder.

Known limits: a chain whose blocks all read one early activation (a U-Net's skips, a value residual) has no such single
values, and its blocks are not found; layers that occur once form no repeat.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import onnx_ir as ir

from qc.ir._blocks_index import GraphIndex
from qc.ir._blocks_parts import Kind, Part, divide
from qc.ir.errors import InputError
from qc.ir.model import Model

__all__ = ["Blocks", "Kind", "Segment", "extract", "find_blocks"]


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A part of a graph that runs alone, given its inputs.

    Attributes:
        kind: ``preamble`` (computed once for all: masks, positions), ``stem`` (before the first block), ``block``,
            ``between`` (two runs of blocks) or ``tail``.
        run: Which run of alike blocks, from 0; None if not a block.
        index: Which block of the run, from 0; None if not a block.
        nodes: In an order of execution.
        carried: Inputs that are the output of the segment just before, on the chain of blocks.
        shared: Inputs that other segments read too, or that come from farther back: masks, positions, an encoder's
            output. May be inputs of the graph.
        own: Inputs of the graph of which no other segment reads more than the shape: this layer's key-value cache.
        outputs: Values that another segment reads, or that the graph returns.
        weights: Initializers that the nodes read, in order of first use.
        constants: Outputs of ``Constant`` nodes of earlier segments that the nodes read; they are no inputs.
    """

    kind: Kind
    run: int | None
    index: int | None
    nodes: tuple[ir.Node, ...]
    carried: tuple[ir.Value, ...]
    shared: tuple[ir.Value, ...]
    own: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    weights: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """All inputs: carried, shared, own."""
        return self.carried + self.shared + self.own

    @property
    def label(self) -> str:
        """A short name: ``stem``, ``block 0.11`` (run, index)."""
        return f"block {self.run}.{self.index}" if self.kind == "block" else self.kind


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """The segments of a graph. Each node is in exactly one, and their order is an order of execution."""

    segments: tuple[Segment, ...]

    @functools.cached_property
    def runs(self) -> tuple[tuple[Segment, ...], ...]:
        """The runs of alike blocks: ``runs[r][i]`` is block ``i`` of run ``r``."""
        blocks = [s for s in self.segments if s.kind == "block"]
        count = 1 + max((s.run for s in blocks if s.run is not None), default=-1)
        return tuple(tuple(s for s in blocks if s.run == r) for r in range(count))

    def segment_of(self, node: ir.Node) -> Segment:
        """Returns the segment of a node of the main graph.

        Raises:
            KeyError: If the node was not in the graph when the blocks were found.
        """
        return self._by_node[node]

    @functools.cached_property
    def _by_node(self) -> dict[ir.Node, Segment]:
        return {n: s for s in self.segments for n in s.nodes}


def find_blocks(graph: ir.Graph) -> Blocks:
    """Divides the nodes of `graph` into segments. A graph without repeats is one ``stem``.

    Blocks of a run compute the same thing with different weights: same operators, attributes and weight shapes, while
    the values of constants and the format of weights and activations may differ. Time is linear in the graph, plus
    the square of the length of the chain in its worst case; no large tensor is read.

    Args:
        graph: A topologically sorted graph, of any stage: exported, canonical or quantized.
    """
    index = GraphIndex(graph)
    parts, ends = divide(index)
    return Blocks(_segments(graph, index, parts, ends))


def _segments(graph: ir.Graph, index: GraphIndex, parts: Sequence[Part], ends: frozenset[int]) -> tuple[Segment, ...]:
    """Draws the boundary of each part."""
    part_of = {n: k for k, part in enumerate(parts) for n in part.nodes}
    initializers = set(graph.initializers.values())
    reads: list[dict[ir.Value, None]] = [{} for _ in parts]
    readers: dict[ir.Value, set[int]] = {v: {len(parts)} for v in graph.outputs}
    loaders: dict[ir.Value, set[int]] = {}
    for k, part in enumerate(parts):
        for n in part.nodes:
            for value in index.inputs[n]:
                if value is not None:
                    reads[k].setdefault(value)
                    readers.setdefault(value, set()).add(k)
                    if not index.reads_shape[n]:
                        loaders.setdefault(value, set()).add(k)

    def role(value: ir.Value, k: int) -> str | None:
        if value in initializers:
            return "weights"
        producer = value.producer()
        if producer is None:
            return "own" if loaders.get(value) == {k} else "shared"
        made = part_of[index.position[producer]]
        if made == k:
            return None
        if _is_constant(producer):
            return "constants"
        return "carried" if made == k - 1 and index.position[producer] in ends else "shared"

    def leaves(value: ir.Value, k: int) -> bool:
        others = readers.get(value, set()) - {k}
        return len(parts) in others or (bool(others) and not _is_constant(value.producer()))

    segments = []
    for k, part in enumerate(parts):
        held: dict[str | None, list[ir.Value]] = {}
        for value in reads[k]:
            held.setdefault(role(value, k), []).append(value)
        fields = {f: tuple(held.get(f, ())) for f in ("carried", "shared", "own", "weights", "constants")}
        nodes = tuple(index.nodes[n] for n in part.nodes)
        outputs = tuple(v for n in nodes for v in n.outputs if leaves(v, k))
        segments.append(Segment(part.kind, part.run, part.index, nodes, outputs=outputs, **fields))
    return tuple(segments)


def extract(model: ir.Model, segment: Segment) -> Model:
    """Returns a segment as a model of its own: inputs `Segment.inputs`, outputs `Segment.outputs`, same names.

    The nodes are copies, the weights are shared, none is read. Functions that the nodes may call come along.

    Raises:
        InputError: If an input or output of the segment has no known type: the graph needs shape inference first.
    """
    for value in (*segment.inputs, *segment.outputs):
        if value.dtype is None:
            raise InputError(
                f"Expected a type on {value.name!r}, at the boundary of {segment.label}, found none. "
                "Run shape inference on the model first."
            )
    constants = dict.fromkeys(v.producer() for v in segment.constants)
    view = ir.GraphView(
        segment.inputs,
        segment.outputs,
        nodes=[*(n for n in constants if n is not None), *segment.nodes],
        initializers=segment.weights,
        opset_imports=dict(model.graph.opset_imports),
        name=segment.label,
    )
    functions = [f.clone() for f in model.functions.values()]
    return Model.of(ir.Model(view.clone(), ir_version=model.ir_version, functions=functions))


def _is_constant(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Constant" and node.domain == ""
