"""Writes activations on grids that calibration found: ``DequantizeLinear(QuantizeLinear(x))``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import Weight, read_weight
from qc.passes.canonicalize._graph import add_constant
from qc.passes.quantize._ranges import Grid, Observed
from qc.passes.statistics import Request, Statistic

__all__ = ["STATIC_BITS", "column_power", "needed_opset", "observed", "pair", "requests", "shifted", "write"]

_TYPES = {
    (4, False): ir.DataType.UINT4,
    (4, True): ir.DataType.INT4,
    (8, False): ir.DataType.UINT8,
    (8, True): ir.DataType.INT8,
    (16, False): ir.DataType.UINT16,
    (16, True): ir.DataType.INT16,
}

STATIC_BITS = tuple(sorted({bits for bits, _ in _TYPES}))
"""Widths of codes that ONNX has a type for."""

_BYTES, _CHANNELS, _OTHER_WIDTHS = 10, 13, 21
"""The first opset whose ``QuantizeLinear`` has bytes, one scale per channel, and 4 and 16-bit codes."""


def needed_opset(bits: int, *, channels: bool) -> int:
    """The first opset that expresses a static grid."""
    return _OTHER_WIDTHS if bits != 8 else _CHANNELS if channels else _BYTES


def requests(x: ir.Value, rule: str, *, points: bool) -> list[Request]:
    """What has to be observed of `x` to choose its range by `rule`; `points` whether its noise must be known too."""
    found = [Request(Statistic.MIN, x), Request(Statistic.MAX, x)]
    if rule == "output":
        return [*found, Request(Statistic.WEIGHTED_HISTOGRAM, x, functools.partial(column_power, x))]
    return [*found, Request(Statistic.HISTOGRAM, x)] if points else found


def observed(x: ir.Value, rule: str, statistics: Mapping[Request, np.ndarray]) -> Observed | None:
    """What was observed of `x`; None if nothing was, or it was not finite."""
    low, high = (statistics.get(Request(s, x)) for s in (Statistic.MIN, Statistic.MAX))
    if low is None or high is None or not (np.isfinite(low).all() and np.isfinite(high).all()):
        return None
    counted = Statistic.WEIGHTED_HISTOGRAM if rule == "output" else Statistic.HISTOGRAM
    histogram = statistics.get(Request(counted, x))
    if histogram is None:
        return Observed(low, high)
    seen = histogram[1] > 0
    return Observed(low, high, histogram[0][seen], histogram[1][seen])


def column_power(x: ir.Value) -> np.ndarray:
    """``sum_n W_nk^2`` of each column over all Linears that read `x`; one for all if none has a known weight."""
    total = np.zeros(())
    for weight in _readers(x):
        total = total + np.square(weight.numpy(), dtype=np.float64).sum(0)
        weight.release()
    return total if total.ndim else np.ones(())


def _readers(x: ir.Value) -> Sequence[Weight]:
    held = (read_weight(use.node.inputs[1]) for use in x.uses() if use.idx == 0 and dialect.is_op(use.node, "Linear"))
    return [w for w in held if w is not None and len(w.shape) == 2]


def write(model: ir.Model, x: ir.Value, grid: Grid, before: ir.Node) -> ir.Value:
    """Puts `x` on a grid in front of `before`; returns the decoded value."""
    nodes = pair(model, x, grid, str(x.name))
    model.graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def shifted(model: ir.Model, x: ir.Value, offsets: np.ndarray, before: ir.Node) -> ir.Value:
    """``x + offsets``, with one offset for each channel, in front of `before`."""
    constant = add_constant(model.graph, f"{x.name}.offsets", ir.tensor(offsets.astype(np.float32)))
    node = ir.node("Add", [x, constant])
    out = node.outputs[0]
    out.name, out.dtype, out.shape = f"{x.name}.shifted", x.dtype, x.shape
    model.graph.insert_before(before, node)
    return out


def pair(model: ir.Model, x: ir.Value, grid: Grid, name: str) -> list[ir.Node]:
    """The nodes that put `x` on a grid and decode it, not yet in the graph; their constants are."""
    graph, dtype = model.graph, _TYPES[grid.bits, grid.symmetric]
    scale = add_constant(graph, f"{name}.scale", ir.tensor(grid.scale))
    zero = add_constant(graph, f"{name}.zero_point", ir.tensor(grid.zero.astype(dtype.numpy()), dtype=dtype))
    attributes = {"axis": x.shape.rank() - 1} if grid.scale.ndim and x.shape is not None else {}
    quantize = ir.node("QuantizeLinear", [x, scale, zero], attributes)
    decode = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], attributes)
    for value, suffix, kind in ((quantize, "codes", dtype), (decode, "quantized", ir.DataType.FLOAT)):
        out = value.outputs[0]
        out.name, out.dtype, out.shape = f"{name}.{suffix}", kind, x.shape
    return [quantize, decode]
