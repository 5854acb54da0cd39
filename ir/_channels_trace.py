"""Walks a graph once and writes down, channel by channel, what is tied to what and what each operator forbids.

Every producer (a row of a weight, a row of a parameter vector) gets numbers for its channels. Operators that move
channels move numbers; operators that meet two channels tie their numbers: ``same`` if both must be scaled alike,
``alike`` if they only must stay at the same index, and an equation where the factor of a product is the product of
the factors. The numbers are grouped afterwards, by `qc.ir._channels_solve`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir._channels_table import OPERATORS, ROUNDING, Rule
from qc.ir._channels_view import Dims, View, dims_of
from qc.ir.quant import read_weight

__all__ = ["BOTH", "Cells", "Equation", "Limit", "Member", "Trace", "operator_name", "register"]

BOTH = frozenset({"scale", "sign"})
"""The two kinds of factors that equations are about: positive ones and signs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Limit:
    """A line of the table, met by some channels.

    Attributes:
        ids: The channels.
        key: The line.
        node: Where; None at the boundary of the graph.
    """

    ids: np.ndarray
    key: str
    node: ir.Node | None

    @property
    def rule(self) -> Rule:
        return OPERATORS[self.key]


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """A division of channels into cells.

    Attributes:
        ids: The channels.
        labels: Cell of each.
        uniform: If true, factors must be equal within a cell; else, permutations and rotations must stay within cells.
        node: The operator that demands it.
    """

    ids: np.ndarray
    labels: np.ndarray
    uniform: bool
    node: ir.Node


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """``sum(coefficient * log factor) = 0`` for every position of the arrays.

    Attributes:
        terms: Pairs of coefficient and channels, all of one shape.
        kinds: The kinds of factors that it is about.
        node: The operator.
    """

    terms: tuple[tuple[float, np.ndarray], ...]
    kinds: frozenset[str]
    node: ir.Node


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A use of a weight whose axes carry channels.

    Attributes:
        node: The reader of the weight.
        slot: Which of its inputs. It may be absent: a bias that could be added.
        role: ``producer``, ``consumer``, ``gain`` (multiplies), ``bias`` (adds), ``state`` (a cache of the caller).
        shape: The weight as it must be viewed (a grouped filter has its output axis divided).
        axes: The axes that carry channels, in that view.
        ids: Channels over `axes`.
    """

    node: ir.Node
    slot: int
    role: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    ids: np.ndarray

    @property
    def value(self) -> ir.Value | None:
        """The weight; None if absent."""
        return self.node.inputs[self.slot] if self.slot < len(self.node.inputs) else None


Tracer = Callable[["Trace", ir.Node, Rule], None]
_TRACERS: dict[str, Tracer] = {}


def register(name: str) -> Callable[[Tracer], Tracer]:
    """Makes a function the tracer of that name in the table."""

    def add(function: Tracer) -> Tracer:
        _TRACERS[name] = function
        return function

    return add


def operator_name(node: ir.Node) -> str:
    """The operator as the table spells it."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


class Trace:
    """What one walk over a graph found.

    Attributes:
        count: Number of channels.
        views: Channels of every value that has some.
        same: Pairs of arrays of channels with one factor.
        alike: Pairs of arrays of channels with one index.
    """

    def __init__(self, graph: ir.Graph, *, rounded: bool = False) -> None:
        """Walks over `graph`; `rounded`: what rounds activations counts as the identity."""
        self.count = 0
        self.views: dict[ir.Value, View] = {}
        self.same: list[tuple[np.ndarray, np.ndarray]] = []
        self.alike: list[tuple[np.ndarray, np.ndarray]] = []
        self.equations: list[Equation] = []
        self.limits: list[Limit] = []
        self.cells: list[Cells] = []
        self.members: list[Member] = []
        self.states: list[tuple[ir.Value, View]] = []
        self.attentions: list[tuple[ir.Node, np.ndarray, np.ndarray, np.ndarray]] = []
        self._rounded = rounded
        self._inputs = set(graph.inputs)
        self._constants: dict[ir.Value, bool] = {}
        self._state_inputs, self._state_outputs = _states(graph)
        for node in graph:
            self._visit(node)
        for value in graph.outputs:
            if value in self.views and value not in self._state_outputs:
                self.limit(self.views[value].ids, "output", value.producer())

    def new(self, shape: Sequence[int]) -> np.ndarray:
        """Numbers for new channels."""
        size = math.prod(shape)
        ids = np.arange(self.count, self.count + size).reshape(shape)
        self.count += size
        return ids

    def set(self, value: ir.Value, view: View | None) -> None:
        """Says where the channels of a value lie."""
        if view is not None:
            self.views[value] = view

    def limit(self, ids: np.ndarray, key: str, node: ir.Node | None) -> None:
        """Applies a line of the table to channels."""
        if OPERATORS[key].forbids:
            self.limits.append(Limit(ids, key, node))

    def tie(self, a: np.ndarray, b: np.ndarray, *, factor: bool = True) -> None:
        """Ties channels: one index, and one factor if `factor`."""
        if a is not b:
            (self.same if factor else self.alike).append(tuple(np.broadcast_arrays(a, b)))

    def equate(self, node: ir.Node, *terms: tuple[float, np.ndarray], kinds: Iterable[str] = BOTH) -> None:
        """Adds an equation between factors; arrays are broadcast."""
        arrays = np.broadcast_arrays(*(ids for _, ids in terms))
        held = tuple((c, ids) for (c, _), ids in zip(terms, arrays, strict=True))
        self.equations.append(Equation(held, frozenset(kinds), node))

    def member(
        self,
        node: ir.Node,
        slot: int,
        role: str,
        axes: Sequence[int],
        ids: np.ndarray,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Notes that a weight carries channels. A weight of an unknown shape (an absent bias) has that of `ids`."""
        value = node.inputs[slot] if slot < len(node.inputs) else None
        if shape is None:
            known = dims_of(value)
            shape = ids.shape if known is None else known
        self.members.append(Member(node, slot, role, tuple(shape), tuple(axes), ids))

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether `value` is a floating weight: stored, or a stored one behind a decode node, or computed from such."""
        if value is None or value in self._inputs:
            return False
        if value not in self._constants:
            node = value.producer()
            weight = value.const_value is not None if node is None else read_weight(value) is not None
            self._constants[value] = weight or (node is not None and node.op_type == "Constant")
        return self._constants[value]

    def channels(self, value: ir.Value | None, axes: Sequence[int], node: ir.Node) -> np.ndarray | None:
        """The channels of an operand over exactly `axes`; size-1 axes count as channels of their own.

        Where the value's channels are not known, new ones are made that nothing may act on. Where they lie on other
        axes too, or its sizes are unknown, None.
        """
        dims = dims_of(value)
        if dims is None or any(not isinstance(dims[a], int) for a in axes):
            return None
        shape = [dims[a] for a in axes]
        view = self.views.get(value)
        if view is None and value in self._state_inputs:
            view = View.of(axes, self.new(shape))
            if view is not None:
                self.views[value] = view
                self.states.append((value, view))
        if view is None:
            ids = self.new(shape)
            if not all(d == 1 for d in shape):
                self.limit(ids, "input" if value in self._inputs else "opaque", value.producer())
            return ids
        if not set(view.axes) <= set(axes):
            return None
        if any(dims[a] != 1 for a in axes if a not in view.axes):
            return None
        return view.ids.reshape(shape)

    def opaque(self, node: ir.Node, key: str = "opaque") -> None:
        """Pins the channels of all operands; the channels of the outputs are not known."""
        for value in dict.fromkeys([*node.inputs, *_captured(node)]):
            if value in self.views:
                self.limit(self.views[value].ids, key, node)

    def parameter(self, node: ir.Node, slot: int, role: str, axes: Sequence[int]) -> np.ndarray:
        """New channels for a constant operand over `axes` of its own."""
        shape = dims_of(node.inputs[slot])
        ids = self.new([shape[a] for a in axes])
        self.member(node, slot, role, axes, ids)
        return ids

    def _visit(self, node: ir.Node) -> None:
        rule = OPERATORS.get(operator_name(node), OPERATORS["opaque"])
        touched = any(v in self.views for v in node.inputs) or rule.tracer in _STARTS
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            self.opaque(node)
        elif self._rounded and node.op_type in ROUNDING:
            self.set(node.outputs[0], self.views.get(node.inputs[0]))
        elif touched:
            _TRACERS[rule.tracer](self, node, rule)


_STARTS = frozenset({"linear", "matmul", "gather", "conv", "norm", "expand", "attention", "concat", "add"})
"""Tracers that also run where no operand has known channels: they may start some."""


@register("opaque")
def _opaque(trace: Trace, node: ir.Node, rule: Rule) -> None:
    trace.opaque(node)


def _states(graph: ir.Graph) -> tuple[set[ir.Value], set[ir.Value]]:
    """Inputs and outputs that form the cache: what the network wrote in one call, it alone reads in the next."""
    inputs = {v.metadata_props.get("qc.role", ""): v for v in graph.inputs}
    outputs = {v.metadata_props.get("qc.role", ""): v for v in graph.outputs}
    pairs = [(inputs[r], outputs.get(r.replace("past_", "present_", 1))) for r in inputs if r.startswith("past_")]
    complete = [(i, o) for i, o in pairs if o is not None]
    return {i for i, _ in complete}, {o for _, o in complete}


def _captured(node: ir.Node) -> Iterable[ir.Value]:
    """Values of the outer graph that the subgraphs of a node read."""
    for attribute in node.attributes.values():
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        graphs += list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []
        for graph in graphs:
            for inner in graph.all_nodes():
                yield from (v for v in inner.inputs if v is not None)


def sizes(dims: Dims | None, axes: Sequence[int]) -> list[int] | None:
    """The static sizes of those axes, or None."""
    if dims is None or any(not isinstance(dims[a], int) for a in axes):
        return None
    return [dims[a] for a in axes]
