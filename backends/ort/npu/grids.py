"""Every value of a network on a grid, so that an NPU computes with integers from end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu.attention import MASKED
from qc.backends.ort.npu.narrow import decibels, may_be_narrow
from qc.backends.ort.npu.outside import OUTSIDE, outside_nodes, outside_values, put_outside
from qc.ir.errors import InputError
from qc.ir.quant import read_weight
from qc.ir.simplify import infer_shapes
from qc.passes.base import Context, Contract, Lossy, Outcome, Pass, Result, Site
from qc.passes.canonicalize._graph import add_constant, drop_unused, made_by
from qc.passes.quantize._ranges import Grid
from qc.passes.quantize._static import pair
from qc.passes.statistics import Request, Statistic

__all__ = ["QuantizeValues"]

_MOVING = frozenset(
    {
        "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "MaxPool", "Reshape",
        "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators whose result holds numbers of their first input (of all inputs: Concat), so both have one grid."""

_KNOWN = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
"""Results whose range needs no data."""

_PARAMETERS = {"Clip": 1, "Pad": 1, "Resize": 1, "Conv": 1, "ConvTranspose": 1, "Gemm": 1}
"""Operators whose inputs from that on, if constant, are no operands of the arithmetic on grids."""

_AS_WIDE = frozenset({"Gather", "RMSNormalization"})
"""Operators whose constants have as many bits as the values around them; elsewhere constants have 16."""

_HIDDEN = 16.0
"""How far below the lowest score a hidden one lies: its share is below e^-16, less than a step of 16 bits."""

_NARROWEST = 1e-12

_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclasses.dataclass(frozen=True)
class QuantizeValues(Pass):
    """Writes ``DequantizeLinear(QuantizeLinear(x))`` behind every float x that a node yields or the model takes.

    The grid has ``2^bits`` points from the smallest to the largest entry seen on calibration data, both `margin` times
    as far from zero; of results that are bounded (softmax, sigmoid, tanh), the bounds. What merely moves numbers
    (Reshape, Transpose, Concat...) has the grid of its input: the cache of keys and values is on one grid, before and
    after. Constants that arithmetic reads are put on a grid of their own.

    A mask that is added to scores hides a position by ``-M``, where ``M = max - min + 16`` over all scores: the sum
    then needs twice the range of the scores and not that of the floats.

    ``|x - x'| <= s / 2`` in the range, clipped beyond. Left alone, and therefore in half precision: values that were
    not observed on calibration data, or were not finite.

    Attributes:
        bits: 16 or 8.
        margin: Factor on ranges that were observed.
        narrow: Keys, values and their caches have 8 bits where they keep that many decibels; 0: they do not. Their grid
            is changed behind the arithmetic that makes them.
        products: Whether only what convolutions with integer weights read and yield is put on grids.
    """

    contract: ClassVar[Contract] = Lossy()

    bits: int = 16
    margin: float = 1.1
    narrow: float = 0.0
    products: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise InputError(f"Expected 8 or 16 bits of quantize-values, found {self.bits}.")
        if not 1 <= self.margin <= 4:
            raise InputError(f"Expected a margin of quantize-values between 1 and 4, found {self.margin}.")
        if self.narrow < 0:
            raise InputError(f"Expected decibels of quantize-values that are not negative, found {self.narrow}.")

    def needs(self, model: ir.Model) -> list[Request]:
        infer_shapes(model)
        found = []
        for group in _Groups(model, self.products).groups:
            value = _observed(group)
            if value is not None:
                found += _requests(value)
                found += [Request(Statistic.HISTOGRAM, value)] if self._may_be_narrow(group) else []
        return found

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        groups = _Groups(model, self.products)
        grids = self._grids(groups, context)
        sites = []
        for group in groups.groups:
            grid = grids.get(id(group))
            narrow = grid if grid is None else self._narrowed(group, grid, context)
            for value in group:
                if grid is None or narrow is None:
                    reason = "it was not observed on calibration data, or is not finite: it stays in half precision"
                    sites.append(Site(str(value.name), Outcome.SKIPPED, reason))
                    continue
                details = {"bits": narrow.bits, "scale": float(narrow.scale), "zero_point": int(narrow.zero)}
                between = [grid] if narrow is not grid and _is_computed(value) else []
                _put(model, value, [*between, narrow], groups.outside)
                sites.append(Site(str(value.name), Outcome.CHANGED, details=details))
        if not self.products:
            self._constants(model, groups.outside, context)
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result

    def _grids(self, groups: _Groups, context: Context) -> dict[int, Grid]:
        """The grid of each group, by its identity."""
        ranges: dict[int, tuple[float, float]] = {}
        for group in groups.groups:
            value = _observed(group)
            found = next((r for v in group if (r := _known(v)) is not None), None)
            if found is None and value is not None:
                found = self._range(value, context)
            if found is not None:
                ranges[id(group)] = found
        for mask, sums in groups.masks():
            scores = [ranges.get(id(groups.of(_other(node, mask)))) for node in sums]
            if any(s is None for s in scores):
                continue
            low, high = min(s[0] for s in scores), max(s[1] for s in scores)
            top = max(0.0, ranges.get(id(groups.of(mask)), (0.0, 0.0))[1])
            depth = high - low + top + _HIDDEN
            _set_lowest(mask, -depth)
            ranges[id(groups.of(mask))] = (-depth, top)
            for node, (bottom, upper) in zip(sums, scores, strict=True):
                ranges[id(groups.of(node.outputs[0]))] = (bottom - depth, upper + top)
        return {key: Grid.of(*_wide(ends), self.bits, symmetric=False) for key, ends in ranges.items()}

    def _may_be_narrow(self, group: list[ir.Value]) -> bool:
        return self.narrow > 0 and self.bits == 16 and may_be_narrow(group, _MOVING)

    def _narrowed(self, group: list[ir.Value], grid: Grid, context: Context) -> Grid:
        """A grid of 8 bits on the same range where that loses little, else `grid`."""
        value = _observed(group)
        if not self._may_be_narrow(group) or value is None:
            return grid
        seen = context.statistics.get(Request(Statistic.HISTOGRAM, value))
        if seen is None:
            return grid
        ends = (np.array([0, 2**grid.bits - 1]) - grid.zero) * grid.scale
        held = Grid.of(*_wide((float(ends[0]), float(ends[1]))), 8, symmetric=False)
        return held if decibels(seen, held) >= self.narrow else grid

    def _range(self, value: ir.Value, context: Context) -> tuple[float, float] | None:
        seen = [context.statistics.get(r) for r in _requests(value)]
        if any(s is None or not np.isfinite(s).all() for s in seen):
            return None
        if len(seen) == 1:
            points = seen[0][0][seen[0][1] > 0]
            low, high = (float(points.min()), float(points.max())) if points.size else (0.0, 0.0)
        else:
            low, high = float(seen[0].min()), float(seen[1].max())
        return min(low, 0.0) * self.margin, max(high, 0.0) * self.margin

    def _constants(self, model: ir.Model, outside: set[ir.Node], context: Context) -> None:
        done: dict[tuple[ir.Value, int], ir.Value] = {}
        for node in tuple(model.graph):
            if node in outside or node.domain != "" or node.op_type in (*_ROUNDING, "Cast"):
                continue
            for slot, value in enumerate(node.inputs[: _PARAMETERS.get(node.op_type)]):
                weight = read_weight(value) if value is not None and value.dtype in _FLOATS else None
                kept = node.op_type != "Gather" or _only_rounded(node.outputs[0])
                if weight is None or (weight.format is not None and kept):
                    continue
                bits = self.bits if node.op_type in _AS_WIDE else 16
                if (value, bits) not in done:
                    array = weight.numpy()
                    grid = Grid.of(*_wide(_ends(array)), bits, symmetric=False)
                    done[value, bits] = _stored(model, array, grid, weight.name, context, node)
                    weight.release()
                node.replace_input_with(slot, done[value, bits])


_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class _Groups:
    """The float values of a graph, those that must have one grid together.

    Attributes:
        outside: The nodes that are computed beside the NPU.
        groups: Lists of values.
    """

    def __init__(self, model: ir.Model, products: bool) -> None:
        graph = model.graph
        self.outside = outside_nodes(graph)
        marked = set(outside_values(graph))
        self._parent: dict[ir.Value, ir.Value] = {}
        nodes = [n for n in graph if n.op_type not in _ROUNDING and read_weight(n.outputs[0]) is None]
        made = [v for n in nodes if n not in self.outside for v in n.outputs]
        for value in (*graph.inputs, *made, *marked):
            if value.dtype == ir.DataType.FLOAT and value.name not in graph.initializers and not _only_rounded(value):
                self._parent[value] = value
        if products:
            ends = {v for n in nodes if _is_product(n) for v in (n.inputs[0], n.outputs[0])}
            self._parent = {v: v for v in self._parent if v in ends}
        for node in nodes:
            if node.domain == "" and node.op_type in _MOVING and node not in self.outside:
                self._join(node)
        found: dict[ir.Value, list[ir.Value]] = {}
        for value in self._parent:
            found.setdefault(self._root(value), []).append(value)
        self.groups = list(found.values())
        self._of = {value: group for group in self.groups for value in group}
        self._sums = [n for n in graph if MASKED in n.metadata_props]

    def of(self, value: ir.Value) -> list[ir.Value] | None:
        """The group of a value."""
        return self._of.get(value)

    def masks(self) -> list[tuple[ir.Value, list[ir.Node]]]:
        """Each mask with the additions to scores that read it, directly or moved."""
        found: dict[int, tuple[ir.Value, list[ir.Node]]] = {}
        for node in self._sums:
            mask = node.inputs[1]
            group = self.of(mask)
            if group is not None:
                found.setdefault(id(group), (mask, []))[1].append(node)
        return list(found.values())

    def _join(self, node: ir.Node) -> None:
        operands = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        values = [v for v in (*operands, *node.outputs) if v in self._parent]
        for value in values[1:]:
            self._parent[self._root(value)] = self._root(values[0])

    def _root(self, value: ir.Value) -> ir.Value:
        while self._parent[value] is not value:
            value = self._parent[value]
        return value


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "Conv" and node.domain == "" and made_by(node.inputs[1], "DequantizeLinear") is not None


def _only_rounded(value: ir.Value) -> bool:
    """Whether a recipe has put the value on a grid already, for all of its readers."""
    readers = [u.node.op_type for u in value.uses()]
    return bool(readers) and not value.is_graph_output() and all(r == "QuantizeLinear" for r in readers)


def _observed(group: Iterable[ir.Value]) -> ir.Value | None:
    """The member that is observed: one with a channel axis of fixed size if there is one."""
    made = [v for v in group if v.shape is not None and v.shape.rank() > 0]
    made.sort(key=lambda v: (v.is_graph_input(), not isinstance(v.shape[-1], int)))
    return made[0] if made else None


def _requests(value: ir.Value) -> list[Request]:
    if isinstance(value.shape[-1], int):
        return [Request(Statistic.MIN, value), Request(Statistic.MAX, value)]
    return [Request(Statistic.HISTOGRAM, value)]


def _other(node: ir.Node, mask: ir.Value) -> ir.Value:
    return node.inputs[0]


def _set_lowest(mask: ir.Value, lowest: float) -> None:
    """Sets the number that a mask hides positions with."""
    node = mask.producer()
    while node is not None and node.op_type not in ("Where", "Max"):
        node = node.inputs[0].producer()
    assert node is not None
    constant = node.inputs[2 if node.op_type == "Where" else 1]
    constant.const_value = ir.tensor(np.array(lowest, np.float32), name=constant.name)


def _is_computed(value: ir.Value) -> bool:
    """Whether arithmetic makes a value, rather than the caller or a move."""
    node = value.producer()
    return node is not None and (node.domain != "" or node.op_type not in _MOVING)


def _put(model: ir.Model, value: ir.Value, grids: Sequence[Grid], outside: set[ir.Node]) -> None:
    """Moves the readers of `value`, but those beside the NPU, to its decoded codes: on one grid, or on two in turn."""
    nodes = pair(model, value, grids[-1], str(value.name))
    quantize, decode = nodes
    if len(grids) > 1:
        nodes = [*pair(model, value, grids[0], f"{value.name}.wide"), *nodes]
        quantize.replace_input_with(0, nodes[1].outputs[0])
    codes, decoded = quantize.outputs[0], decode.outputs[0]
    if OUTSIDE in value.metadata_props:
        del value.metadata_props[OUTSIDE]
        put_outside(codes)
    readers = [u for u in value.uses() if u.node not in nodes and u.node not in outside]
    for use in readers:
        use.node.replace_input_with(use.idx, decoded)
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], nodes)
    else:
        model.graph.insert_after(producer, nodes)
    if value.is_graph_output():
        outputs = model.graph.outputs
        name = value.name
        value.name, decoded.name = f"{name}.exact", name
        decoded.metadata_props.update(value.metadata_props)
        value.metadata_props.clear()
        outputs[[o is value for o in outputs].index(True)] = decoded


def _ends(array: np.ndarray) -> tuple[float, float]:
    return float(array.min(initial=0.0)), float(array.max(initial=0.0))


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    """A range that is not empty: the units divide by its step, and by its ratio to the steps around it."""
    return ends if ends[1] - ends[0] > _NARROWEST else (0.0, 1.0)


def _known(value: ir.Value) -> tuple[float, float] | None:
    """The range of a value that needs no data: a bounded result, or rows of a table."""
    node = value.producer()
    if node is None or node.domain != "":
        return None
    table = read_weight(node.inputs[0]) if node.op_type == "Gather" else None
    if table is None:
        return _KNOWN.get(node.op_type)
    ends = _ends(table.numpy())
    table.release()
    return ends


def _stored(model: ir.Model, array: np.ndarray, grid: Grid, name: str, context: Context, before: ir.Node) -> ir.Value:
    """A constant as codes behind a decode node."""
    dtype = np.uint16 if grid.bits == 16 else np.uint8
    codes = np.clip(np.rint(array / grid.scale) + grid.zero, 0, 2**grid.bits - 1).astype(dtype)
    graph = model.graph
    inputs = [
        add_constant(graph, f"{name}.codes", context.store.put(f"{name}.codes", codes)),
        add_constant(graph, f"{name}.step", ir.tensor(grid.scale)),
        add_constant(graph, f"{name}.zero", ir.tensor(grid.zero.astype(dtype))),
    ]
    node = ir.node("DequantizeLinear", inputs)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = f"{name}.grid", ir.DataType.FLOAT, ir.Shape(array.shape)
    graph.insert_before(before, node)
    return out
