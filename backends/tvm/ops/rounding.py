"""Activations on a grid: as bytes for products of integers, or rounded in float for what multiplies no bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qc.backends.integers import code_bits, rounded_source
from qc.backends.tvm.kernels.bytes import PADDING, quantize_grid, row_ranges
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.loops import fill, loop
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, Size
from qc.ir import dialect
from qc.ir.quant import Weight, read_weight
from qc.passes.canonicalize._graph import stored

__all__ = [
    "Codes",
    "Grid",
    "codes_of_rows",
    "dequantize",
    "dynamic_quantize",
    "grid_of",
    "is_emulated",
    "quantize",
    "round_in_float",
    "rounded_input",
]

_BYTE = 8


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where a node that rounds puts its input.

    Attributes:
        bits: Width of a code.
        signed: Whether codes reach from ``-2^(bits-1)``; else from 0.
        token: Whether each row has a grid of its own.
        clip: What a range found at run time is multiplied with.
        scale: A constant scale; None if it is found at run time.
        zero: A constant zero point.
        axis: Of several constant scales.
    """

    bits: int
    signed: bool
    token: bool = False
    clip: float = 1.0
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None
    axis: int = -1

    @property
    def shift(self) -> int:
        """What is subtracted from codes so that they fit signed bytes."""
        return 0 if self.signed or self.bits < _BYTE else 1 << (self.bits - 1)

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest code, shifted."""
        low = -(1 << (self.bits - 1)) if self.signed else -self.shift
        return low, low + (1 << self.bits) - 1

    @property
    def fits_bytes(self) -> bool:
        """Whether a product of bytes takes it: at most 8 bits, and one scale per row or in all."""
        return self.bits <= _BYTE and (self.scale is None or self.scale.size == 1)


@dataclasses.dataclass(frozen=True)
class Codes:
    """Rows on a grid: codes ``[m, k]`` with `columns` of them meant, and of each row scale, sum and zero point."""

    q: Tensor
    scale: Tensor
    total: Tensor
    zero: Tensor | None
    rows: Dim


def grid_of(source: ir.Node) -> Grid | None:
    """The grid of a node found by `rounded_source`; None if its parameters are computed."""
    if source.op_type == "DynamicQuantizeLinear":
        return Grid(_BYTE, signed=False)
    if source.op_type == "DynamicQuantize":
        granularity, _, symmetry = source.overload.partition("_")
        clip = source.attributes["clip"].as_float()
        return Grid(code_bits(source), symmetry == "symmetric", granularity == "token", clip)
    step, start = stored(source.inputs[1]), stored((*source.inputs, None)[2])
    if step is None or start is None:
        return None
    signed = start.dtype.is_signed()
    axis = source.attributes["axis"].as_int() if "axis" in source.attributes else 1
    zero = np.asarray(start.numpy()).astype(np.int64)
    return Grid(start.dtype.bitwidth, signed, scale=step.numpy().astype(np.float32), zero=zero, axis=axis)


def rounded_input(node: ir.Node, weight: Weight, *, exact: bool) -> tuple[ir.Node | None, bool]:
    """What rounds the input of a Linear, and whether its product multiplies bytes.

    A kernel that rounds its input to 8 bits itself, finer, does without a rounding to 8 bits or more before it: then
    the node is returned, and False. None if the product takes its input as it is.
    """
    source, format = rounded_source(node.inputs[0]), weight.format
    grid = grid_of(source) if source is not None else None
    if source is None or grid is None or format is None:
        return None, False
    if format.native in (ir.DataType.INT8, ir.DataType.UINT8) and format.per_row and format.remainder is None:
        return (source, True) if grid.fits_bytes else (None, False)
    from qc.backends.tvm.pack import why_decoded

    finer = not exact and not why_decoded(format) and grid.bits >= _BYTE
    return (source if finer else None), False


def codes_of_rows(at: Lowering, source: ir.Node) -> Codes:
    """The input of a node that rounds as bytes; the same value is put on a grid once."""
    grid = grid_of(source)
    x = at.input(source, 0)
    assert grid is not None
    assert x is not None
    x, m, k, ld = at.rows(x)
    columns = k.constant
    if columns is None:
        raise at.refuse(source, "the length of its rows is unknown")
    facts = dataclasses.replace(grid, scale=None, zero=None)
    numbers = [None if a is None else a.tobytes() for a in (grid.scale, grid.zero)]
    key = ("bytes", x.buffer, x.offset, m, ld, columns, facts, *numbers)
    if key not in at.shared:
        at.shared[key] = _codes(at, grid, x, m, columns, ld)
    return at.shared[key]  # type: ignore[return-value]


def _codes(at: Lowering, grid: Grid, x: Tensor, m: Dim, columns: int, ld: Dim) -> Codes:
    padded = -(-columns // PADDING) * PADDING
    scale, zero = _parameters(at, grid, x, m, columns, ld)
    q = at.program.tensor((m, padded), ir.DataType.INT8)
    total = at.program.tensor((m,), ir.DataType.INT32)
    name = at.program.kernel("grid", quantize_grid, *grid.ends, pointers=5, integers=3)
    at.program.call(name, [x, scale, zero, q, total], [ld, columns, padded], m, writes=[q, total])
    plain = grid.signed and (grid.zero is None or not grid.zero.any())
    return Codes(q, scale, total, None if plain else zero, m)


def _parameters(at: Lowering, grid: Grid, x: Tensor, m: Dim, columns: Size, ld: Dim) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row."""
    scale, zero = at.program.tensor((m,)), at.program.tensor((m,), ir.DataType.INT32)
    if grid.scale is not None:
        assert grid.zero is not None
        fill(at, scale, f"{float(grid.scale.reshape(())).hex()}f")
        fill(at, zero, str(int(grid.zero.reshape(())) - grid.shift))
        return scale, zero
    low, high = at.program.tensor((m,)), at.program.tensor((m,))
    name = at.program.kernel("ranges", row_ranges, pointers=3, integers=2)
    at.program.call(name, [x, low, high], [ld, columns], m, writes=[low, high])
    if not grid.token:
        low, high = (_reduced(at, kind, x) for kind, x in (("ReduceMin", low), ("ReduceMax", high)))
    if grid.signed:
        factor = np.float32(grid.clip) / np.float32((1 << (grid.bits - 1)) - 1)
        loop(at, f"fmaxf(fmaxf(-{{a}}, {{b}}) * {float(factor).hex()}f, 1e-30f)", [low, high], scale)
        fill(at, zero, "0")
        return scale, zero
    clip = f"{float(np.float32(grid.clip)).hex()}f"
    first, last = f"{clip} * fminf({{a}}, 0.0f)", f"{clip} * fmaxf({{b}}, 0.0f)"
    loop(at, f"fmaxf(({last} - {first}) / {(1 << grid.bits) - 1}.0f, 1e-30f)", [low, high], scale)
    loop(at, f"(int32_t)rintf(-({first}) / {{b}}) - {grid.shift}", [low, scale], zero)
    return scale, zero


def _reduced(at: Lowering, kind: str, x: Tensor) -> Tensor:
    found = at.program.tensor((1,))
    at.program.reduce(kind, x, 0, found)
    return found


@operator("QuantizeLinear", "DynamicQuantizeLinear")
def quantize(at: Lowering, node: ir.Node) -> None:
    """Done where its codes are read: by a product, or by the node that decodes them."""


@operator("DequantizeLinear")
def dequantize(at: Lowering, node: ir.Node) -> None:
    """Rounds in float what no product reads as bytes."""
    _round(at, node, rounded_source(node.outputs[0]))


@operator("DynamicQuantize", domain=dialect.DOMAIN)
def dynamic_quantize(at: Lowering, node: ir.Node) -> None:
    """Rounds in float what no product reads as bytes."""
    _round(at, node, node)


def _round(at: Lowering, node: ir.Node, source: ir.Node | None) -> None:
    if source is None or is_emulated(node, exact=at.exact):
        round_in_float(at, node, source)


def round_in_float(at: Lowering, node: ir.Node, source: ir.Node | None) -> None:
    """The values of a grid that are nearest to those of an activation; or a constant on one, such as a bias."""
    value = node.outputs[0]
    constant = _decoded(at, node) if source is None else None
    if constant is not None:
        at.set(value, constant)
        return
    grid = grid_of(source) if source is not None else None
    if source is None or grid is None:
        raise at.refuse(node, "its grid is computed, or it decodes what was not rounded here")
    x = at.input(source, 0)
    assert x is not None
    y = at.result(value, x.shape)
    low, high = grid.ends
    rounded = f"(fminf(fmaxf(rintf({{a}} / {{b}}) + (float){{c}}, {low}.0f), {high}.0f) - (float){{c}}) * {{b}}"
    if grid.scale is None:
        rows, m, k, ld = at.rows(x)
        scale, zero = (t.view((m, 1), (1, 0)) for t in _parameters(at, grid, rows, m, k, ld))
        loop(at, rounded, [rows.view((m, k), (ld, 1)), scale, zero], y.view((m, k), (k, 1)))
        return
    assert grid.zero is not None
    shape = [1] * len(x.shape)
    if grid.scale.size > 1:
        shape[grid.axis] = grid.scale.size
    scale = at.program.array(grid.scale.reshape(shape))
    zero = at.program.array((np.broadcast_to(grid.zero, grid.scale.shape) - grid.shift).astype(np.int32).reshape(shape))
    loop(at, rounded, [x, scale, zero], y)


def _decoded(at: Lowering, node: ir.Node) -> Tensor | None:
    """A constant that is no weight: ``(code - zero point) * scale``."""
    values = (*node.inputs, None)[:3]
    codes, scale, zero = (stored(v) for v in values)
    computed = zero is None and values[2] is not None
    if codes is None or scale is None or computed or at.attribute(node, "block_size", 0):
        return None
    shape = [1] * len(codes.shape)
    if scale.size > 1:
        shape[int(at.attribute(node, "axis", 1))] = scale.size  # type: ignore[call-overload]

    def make() -> np.ndarray:
        start = zero.numpy().astype(np.int64).reshape(shape) if zero is not None else 0
        number = (codes.numpy().astype(np.int64) - start).astype(np.float32)
        return number * scale.numpy().astype(np.float32).reshape(shape)

    sizes = codes.shape.numpy()
    return at.program.constant((node.outputs[0], "f32"), make, 4 * codes.size, sizes, ir.DataType.FLOAT)


def is_emulated(node: ir.Node, *, exact: bool) -> bool:
    """Whether what a node rounds is rounded in float: something reads more of it than its codes."""
    value = node.outputs[0]
    return value.is_graph_output() or not all(_takes_source(use.node, use.idx, exact=exact) for use in value.uses())


def _takes_source(user: ir.Node, slot: int, *, exact: bool) -> bool:
    """Whether a node reads what was rounded instead of the rounded value."""
    if slot != 0 or not dialect.is_op(user, "Linear"):
        return False
    weight = read_weight(user.inputs[1])
    return weight is not None and rounded_input(user, weight, exact=exact)[0] is not None
