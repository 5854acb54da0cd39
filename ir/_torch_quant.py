"""Quantization operators for the torch executor.

With `Context.straight_through`, codes are floating tensors that hold integers, and rounding has the derivative 1
(Bengio et al., 2013, arXiv 1308.3432): gradients reach the values, and the scales as in LSQ (arXiv 1902.08153).
Elsewhere codes are integers and no gradient passes.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from qc.ir._torch_elementwise import saturate_to
from qc.ir._torch_ops import Call, integer_range, op
from qc.ir.errors import UnsupportedError

Tensor = torch.Tensor

_FLOAT8 = frozenset({
    ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ,
})  # fmt: skip

_SMALLEST_SCALE = 1e-30
"""Of a vector of zeros, whose codes must be zeros too."""


def _round(call: Call, x: Tensor) -> Tensor:
    """Rounds half to even; passes gradients when asked to."""
    rounded = torch.round(x)
    return x + (rounded - x).detach() if call.context.straight_through else rounded


def _spread(call: Call, parameter: Tensor, x: Tensor) -> Tensor:
    """Brings a scale or zero point to a shape that broadcasts with `x`: per tensor, per axis or per block."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    axis, block = call.attr("axis", 1) % x.dim(), call.attr("block_size", 0)
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if parameter.dim() > 1:
        return parameter
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@op("QuantizeLinear")
def _quantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    to = call.attr("output_dtype", 0)
    dtype = ir.DataType(to) if to else ir.DataType.UINT8 if zero is None else call.type_of(2, zero)
    precision = call.attr("precision", 0)
    wide = call.context.torch_dtype(ir.DataType(precision)) if precision else scale.dtype
    scaled = x.to(wide) / _spread(call, scale.to(wide), x)
    if dtype in _FLOAT8:
        target = call.context.torch_dtype(dtype)
        codes = saturate_to(scaled, target) if call.attr("saturate", 1) else scaled.to(target)
        return scaled + (codes.to(wide) - scaled).detach() if call.context.straight_through else codes
    bounds = integer_range(dtype)
    if bounds is None:
        raise UnsupportedError(f"The torch executor cannot quantize to {dtype} (node {call.node.name!r}).")
    codes = _round(call, scaled)
    if zero is not None:
        codes = codes + _spread(call, zero, x).to(codes.dtype)
    codes = torch.clamp(codes, *bounds)
    return codes if call.context.straight_through else codes.to(call.context.torch_dtype(dtype))


@op("DequantizeLinear")
def _dequantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    to = call.attr("output_dtype", 0)
    target = call.context.torch_dtype(ir.DataType(to)) if to else scale.dtype
    wide = scale.dtype if scale.dtype in (torch.float32, torch.float64) else torch.float32
    codes = x.to(wide)
    if zero is not None:
        codes = codes - _spread(call, zero, x).to(wide)
    return (codes * _spread(call, scale, x).to(wide)).to(target)


@op("DynamicQuantizeLinear")
def _dynamic_quantize(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Range of the tensor, widened to hold zero, in 255 steps."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(_round(call, -low / divisor), 0, 255)
    codes = torch.clamp(_round(call, x / divisor) + zero, 0, 255)
    if call.context.straight_through:
        return codes, scale, zero
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


@op("DynamicQuantize", domain="qc")
def _dynamic_fake_quantize(call: Call, x: Tensor) -> Tensor:
    """Rounds to a grid found per token or per tensor, symmetric or not; `qc.ir.dialect` has the equations."""
    granularity, _, symmetry = call.node.overload.partition("_")
    axis = (-1,) if granularity == "token" else tuple(range(x.dim()))
    half, clip = 2 ** (call.attr("bits") - 1), call.attr("clip")
    if symmetry == "symmetric":
        scale = (x.abs().amax(axis, keepdim=True) * clip / (half - 1)).clamp(min=_SMALLEST_SCALE)
        return scale * torch.clamp(_round(call, x / scale), -half, half - 1)
    low, high = (clip * x.amin(axis, keepdim=True)).clamp(max=0), (clip * x.amax(axis, keepdim=True)).clamp(min=0)
    scale = ((high - low) / (2 * half - 1)).clamp(min=_SMALLEST_SCALE)
    zero = _round(call, -low / scale)
    return scale * (torch.clamp(_round(call, x / scale) + zero, 0, 2 * half - 1) - zero)


def _centred(codes: Tensor, zero: Tensor | None, *, rows: bool) -> Tensor:
    """Codes minus their zero point, in a type in which products are exact (int32) or differentiable (float)."""
    wide = codes if codes.is_floating_point() else codes.to(torch.int32)
    if zero is None:
        return wide
    if zero.dim() == 1 and zero.numel() > 1 and rows:
        zero = zero.unsqueeze(-1)
    return wide - zero.to(wide.dtype)


@op("MatMulInteger")
def _matmul_integer(
    call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    left, right = _centred(a, a_zero, rows=True), _centred(b, b_zero, rows=False)
    if left.is_floating_point() or right.is_floating_point():
        wide = left.dtype if left.is_floating_point() else right.dtype
        return left.to(wide) @ right.to(wide)
    if left.device.type == "cuda":
        # CUDA has no integer product; doubles hold these sums exactly.
        return (left.double() @ right.double()).to(torch.int32)
    return left @ right


@op("QLinearMatMul")
def _qlinear_matmul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    total = _matmul_integer(call, a, b, a_zero, b_zero)
    wide = total if total.is_floating_point() else total.to(torch.float64)
    left = a_scale.unsqueeze(-1) if a_scale.dim() == 1 and a_scale.numel() > 1 else a_scale
    codes = _round(call, wide * (left * b_scale / y_scale).to(wide.dtype)) + y_zero.to(wide.dtype)
    codes = torch.clamp(codes, *(integer_range(call.type_of(7, y_zero)) or (0, 255)))
    return codes if call.context.straight_through else codes.to(y_zero.dtype)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Splits the bytes of the last axis into their codes, low-order bits first: ``[..., B] -> [..., B * 8 / bits]``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


@op("MatMulNBits", domain="com.microsoft")
def _matmul_nbits(
    call: Call,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``a @ decode(packed).T + bias`` with exact arithmetic, whatever accuracy level the node allows.

    ``packed`` is ``[N, blocks, block_size * bits / 8]``; zero points are packed along the blocks, or floats.
    """
    if groups is not None:
        raise UnsupportedError(f"MatMulNBits node {call.node.name!r} has g_idx (deprecated). Reorder K instead.")
    bits, rows, depth = call.attr("bits", 4), call.attr("N"), call.attr("K")
    if bits not in (2, 4, 8):
        raise UnsupportedError(f"MatMulNBits node {call.node.name!r} has {bits} bits; expected 2, 4 or 8.")
    codes = _unpack(packed.reshape(rows, -1, packed.shape[-1]), bits).to(scales.dtype)
    blocks = codes.shape[1]
    if zeros is None:
        zero: Tensor | float = float(2 ** (bits - 1))
    elif zeros.is_floating_point():
        zero = zeros.reshape(rows, blocks, 1)
    else:
        zero = _unpack(zeros.reshape(rows, -1), bits)[:, :blocks].unsqueeze(-1).to(scales.dtype)
    weight = ((codes - zero) * scales.reshape(rows, blocks, 1)).flatten(1)[:, :depth]
    y = a @ weight.to(a.dtype).T
    return y if bias is None else y + bias


@op("GatherBlockQuantized", domain="com.microsoft")
def _gather_block_quantized(
    call: Call, data: Tensor, indices: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> Tensor:
    """Gathers rows of a quantized table and decodes them; an index out of range yields zeros."""
    kind, block = call.type_of(0, data), call.attr("block_size", 128)
    axis, along = call.attr("gather_axis", 0) % data.dim(), call.attr("quantize_axis", 1) % data.dim()
    size = data.shape[axis]
    index = torch.where(indices < 0, indices + size, indices).to(torch.int64)
    inside = (index >= 0) & (index < size)
    flat = index.clamp(0, size - 1).reshape(-1)

    def rows(x: Tensor) -> Tensor:
        return x.index_select(axis, flat) if x.shape[axis] == size else x

    bits = call.attr("bits", 4) if kind == ir.DataType.UINT8 else 8
    codes, scale = rows(data), rows(scales)
    default = 0.0
    if kind == ir.DataType.UINT8:
        codes, default = _unpack(codes, bits) if bits < 8 else codes, float(2 ** (bits - 1))
    length = codes.shape[along]
    width = block or length
    spread = scale.repeat_interleave(width, along).narrow(along, 0, length)
    offset: Tensor | float = default
    if zeros is not None:
        zero = rows(zeros)
        zero = _unpack(zero, bits) if kind == ir.DataType.UINT8 and bits < 8 else zero
        offset = zero.narrow(along, 0, scale.shape[along]).repeat_interleave(width, along).narrow(along, 0, length)
        offset = offset.to(scales.dtype)
    y = (codes.to(scales.dtype) - offset) * spread
    y = y.reshape([*y.shape[:axis], *indices.shape, *y.shape[axis + 1 :]])
    mask = inside.reshape([*[1] * axis, *indices.shape, *[1] * (y.dim() - axis - indices.dim())])
    return torch.where(mask, y, torch.zeros_like(y))
