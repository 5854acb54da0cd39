"""The parts of a network that a sweep works on, one after the other, while passes change their nodes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from qc.ir._blocks_index import captured
from qc.ir.blocks import Segment, extract, find_blocks
from qc.ir.model import Model
from qc.ir.simplify import RANDOM_OPS

__all__ = ["Partition"]


class Partition:
    """Says of each node to which part of the network it belongs.

    Nodes that a pass adds belong to the part that it works on. What computes a constant, such as a decode node, belongs
    to every part that reads it. A network without repeated blocks is one part, and so is one in which something other
    than a tensor of known type passes from part to part.

    Attributes:
        labels: A short name of each part, in the order of execution.
    """

    def __init__(self, model: Model) -> None:
        """Divides `model`; its graph may change later, see `adopt`."""
        self.model = model
        segments = find_blocks(model.graph).segments
        self.labels = tuple(s.label for s in segments) or ("stem",)
        self._owner = {node: k for k, s in enumerate(segments) for node in s.nodes}
        self._find_constants()
        if not all(_is_plain(v) for k in range(len(self.labels)) for v in self._outputs(k)):
            self.labels, self._owner = ("stem",), dict.fromkeys(model.graph, 0)

    def moved(self, model: Model, owners: Sequence[int]) -> Partition:
        """The same parts of a model that passes have worked on; `owners` has the part of each node, in graph order."""
        found = copy.copy(self)
        found.model, found._owner = model, dict(zip(model.graph, owners, strict=True))
        found._find_constants()
        return found

    @property
    def owners(self) -> list[int]:
        """The part of each node, in graph order."""
        return [self._owner[node] for node in self.model.graph]

    def adopt(self, k: int) -> None:
        """Gives nodes that are new to part `k`."""
        for node in self.model.graph:
            self._owner.setdefault(node, k)
        self._find_constants()

    def scope(self, k: int) -> frozenset[ir.Node]:
        """The nodes of part `k`, with those in their subgraphs."""
        return frozenset(inner for node in self._nodes(k) for inner in (node, *_nested(node)))

    def cut(self, k: int, *, to_the_end: bool = False) -> Model:
        """Part `k` as it is now, as a model of its own; weights are shared, names are kept.

        Args:
            k: Which part.
            to_the_end: Whether it yields the outputs of the network too, not only what later parts read.
        """
        nodes = self._nodes(k)
        own, inside = {v for n in nodes for v in n.outputs}, dict.fromkeys(nodes)
        constants: dict[ir.Node, None] = {}
        weights: dict[ir.Value, None] = {}
        inputs: dict[ir.Value, None] = {}

        def read(value: ir.Value | None) -> None:
            if value is None or value in own:
                return
            producer = value.producer()
            if _is_stored(value):
                weights.setdefault(value)
            elif producer is not None and producer in self._constant:
                for v in producer.inputs:
                    read(v)
                constants.setdefault(producer)
            else:
                inputs.setdefault(value)

        for node in inside:
            for value in (*node.inputs, *captured(node)):
                read(value)
        outputs = self._outputs(k)
        if to_the_end:
            outputs = tuple(dict.fromkeys([*outputs, *(v for v in self.model.graph.outputs if v in own)]))
        segment = Segment(
            kind="block",
            run=0,
            index=k,
            nodes=(*constants, *inside),
            carried=(),
            shared=tuple(inputs),
            own=(),
            outputs=outputs,
            weights=tuple(weights),
            constants=(),
        )
        return extract(self.model, segment)

    def needed_after(self, k: int) -> set[str]:
        """Names of the values that parts after `k` read."""
        found: set[str] = set()
        for node, owner in self._owner.items():
            if owner > k and node.graph is not None:
                found.update(v.name for v in (*node.inputs, *captured(node)) if v is not None and v.name)
        return found

    def _find_constants(self) -> None:
        """Finds the nodes that need nothing but initializers: decode nodes, constants."""
        self._constant: set[ir.Node] = set()
        for node in self.model.graph:
            known = (v is None or _is_stored(v) or v.producer() in self._constant for v in node.inputs)
            if node.op_type not in RANDOM_OPS and not captured(node) and all(known):
                self._constant.add(node)

    def _nodes(self, k: int) -> list[ir.Node]:
        return [n for n in self.model.graph if self._owner[n] == k]

    def _outputs(self, k: int) -> tuple[ir.Value, ...]:
        """What later parts read of what part `k` computes, constants aside."""
        later = self.needed_after(k)
        made = (v for n in self._nodes(k) if n not in self._constant for v in n.outputs)
        return tuple(v for v in made if v.name in later)


def _nested(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        graphs: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            yield from graph.all_nodes()


def _is_stored(value: ir.Value) -> bool:
    return value.producer() is None and value.const_value is not None and not value.is_graph_input()


def _is_plain(value: ir.Value) -> bool:
    return value.dtype is not None and isinstance(value.type, ir.TensorType)
