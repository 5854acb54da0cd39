"""Matrix products, convolutions, pooling and normalizations for the torch executor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812

from qc.ir._torch_ops import Call, op

Tensor = torch.Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@op("MatMul")
def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@op("Linear", domain="qc")
def _linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@op("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = call.attr("alpha", 1.0), call.attr("beta", 1.0)
    y = (a.T if call.attr("transA", 0) else a) @ (b.T if call.attr("transB", 0) else b)
    y = y if alpha == 1 else (alpha * y).to(a.dtype)
    return y if c is None else y + (c if beta == 1 else (beta * c).to(c.dtype))


@op("Einsum")
def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.attr("equation").replace(" ", ""), *inputs)


def _pads(call: Call, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Padding before every spatial axis, then after: given, or what keeps ``ceil(size / stride)`` outputs.

    Args:
        call: The node, whose ``pads`` and ``auto_pad`` count.
        size: Spatial extent of the input.
        kernel: Extent of the window with its dilation.
        strides: Step of the window.
    """
    mode = call.attr("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return list(call.attr("pads", [0] * (2 * len(size)))) if mode == "NOTSET" else [0] * (2 * len(size))
    total = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel, strides, strict=True)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return small + large if mode == "SAME_UPPER" else large + small


def _pad(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    if not any(pads):
        return x
    rank = len(pads) // 2
    flat = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
    return F.pad(x, flat, value=value)


@op("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.dim() - 2
    strides, dilations = call.attr("strides", [1] * rank), call.attr("dilations", [1] * rank)
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pads = _pads(call, x.shape[2:], extent, strides)
    symmetric = pads[:rank] == pads[rank:]
    x = x if symmetric else _pad(x, pads)
    padding = pads[:rank] if symmetric else [0] * rank
    return _CONV[rank](x, weight, bias, list(strides), padding, list(dilations), call.attr("group", 1))


@op("ConvTranspose")
def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The full result, of which ``pads`` are cut away; ``output_shape`` says instead how much must remain."""
    rank = x.dim() - 2
    strides, dilations = call.attr("strides", [1] * rank), call.attr("dilations", [1] * rank)
    extra = list(call.attr("output_padding", [0] * rank))
    pads, wanted, mode = call.attr("pads", [0] * (2 * rank)), call.attr("output_shape"), call.attr("auto_pad", "NOTSET")
    full = _CONV_TRANSPOSE[rank](x, weight, None, list(strides), 0, 0, call.attr("group", 1), list(dilations))
    full = _pad(full, [0] * rank + extra)  # elements beyond the full result receive no product
    full = full if bias is None else full + _per_channel(x, bias)
    if mode in ("SAME_UPPER", "SAME_LOWER") and wanted is None:
        wanted = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        total = [n - w for n, w in zip(full.shape[2:], wanted[-rank:], strict=True)]
        before = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]
        pads = before + [t - b for t, b in zip(total, before, strict=True)]
    return _pad(full, [-p for p in pads])


def _window(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations and padding of a pooling, and the further padding that ``ceil_mode`` asks for."""
    rank = x.dim() - 2
    kernel = list(call.attr("kernel_shape"))
    strides, dilations = list(call.attr("strides", [1] * rank)), list(call.attr("dilations", [1] * rank))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(call, x.shape[2:], extent, strides)
    more = [0] * (2 * rank)
    if call.attr("ceil_mode", 0):
        for i, size in enumerate(x.shape[2:]):
            span = size + pads[i] + pads[i + rank] - extent[i]
            count = math.ceil(span / strides[i]) + 1
            if (count - 1) * strides[i] >= size + pads[i]:
                count -= 1  # a window that would start in the padding behind is dropped
            more[i + rank] = max((count - 1) * strides[i] - span, 0)
    return kernel, strides, dilations, pads, more


@op("MaxPool")
def _max_pool(call: Call, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    kernel, strides, dilations, pads, more = _window(call, x)
    rank, wide = len(kernel), x if x.is_floating_point() else x.double()
    padded = _pad(wide, [a + b for a, b in zip(pads, more, strict=True)], -torch.inf)
    pooled = _MAX_POOL[rank](padded, kernel, strides, 0, dilations, return_indices=call.outputs() > 1)
    if isinstance(pooled, Tensor):
        return pooled.to(x.dtype)
    values, inner = pooled
    order = range(rank) if call.attr("storage_order", 0) == 0 else range(rank - 1, -1, -1)
    position = []
    for axis in reversed(range(rank)):
        position.insert(0, inner % padded.shape[2 + axis] - pads[axis])
        inner = inner // padded.shape[2 + axis]
    plane = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * rank)
    index = torch.zeros_like(position[0])
    for axis in order:
        index = index * x.shape[2 + axis] + position[axis]
    return values.to(x.dtype), index + plane * x.shape[2:].numel()


def _window_sum(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Tensor:
    """Sums every window of ``[N, C, ...]``: a convolution with ones, because torch's pooling has no dilation."""
    flat = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    total = _CONV[len(kernel)](flat, ones, None, strides, 0, dilations)
    return total.reshape(*x.shape[:2], *total.shape[2:])


@op("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    kernel, strides, dilations, pads, more = _window(call, x)
    inside = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    inside = _pad(_pad(inside, pads, 1.0 if call.attr("count_include_pad", 0) else 0.0), more)
    total = _window_sum(_pad(_pad(x, pads), more), kernel, strides, dilations)
    return total / _window_sum(inside, kernel, strides, dilations)


@op("LpPool")
def _lp_pool(call: Call, x: Tensor) -> Tensor:
    kernel, strides, dilations, pads, more = _window(call, x)
    p = call.attr("p", 2)
    padded = _pad(_pad(x.abs() ** p, pads), more)
    return _window_sum(padded, kernel, strides, dilations) ** (1.0 / p)


@op("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


def _stash(x: Tensor) -> Tensor:
    """Half precision is normalized in single precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _per_channel(x: Tensor, parameter: Tensor) -> Tensor:
    return parameter.reshape(-1, *[1] * (x.dim() - 2))


@op("BatchNormalization")
def _batch_norm(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor | tuple[Tensor, ...]:
    running: tuple[Tensor, ...] = ()
    if call.attr("training_mode", 0):
        dims, momentum = [0, *range(2, x.dim())], call.attr("momentum", 0.9)
        batch_mean, batch_variance = x.mean(dims), x.var(dims, correction=0)
        running = (
            mean * momentum + batch_mean * (1 - momentum),
            variance * momentum + batch_variance * (1 - momentum),
        )
        mean, variance = batch_mean, batch_variance
    factor = scale * torch.rsqrt(variance + call.attr("epsilon", 1e-5))
    y = (x - _per_channel(x, mean)) * _per_channel(x, factor) + _per_channel(x, bias)
    return (y.to(x.dtype), *running)


@op("LayerNormalization")
def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    dims = list(range(call.attr("axis", -1) % x.dim(), x.dim()))
    wide = _stash(x)
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + call.attr("epsilon", 1e-5))
    y = (centred * inverse).to(x.dtype) * scale
    return y if bias is None else y + bias, mean, inverse


@op("RMSNormalization")
def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    dims = list(range(call.attr("axis", -1) % x.dim(), x.dim()))
    wide = _stash(x)
    inverse = torch.rsqrt((wide * wide).mean(dims, keepdim=True) + call.attr("epsilon", 1e-5))
    return (wide * inverse).to(x.dtype) * scale


def _grouped(call: Call, x: Tensor, groups: int) -> Tensor:
    wide = _stash(x).reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + call.attr("epsilon", 1e-5))).to(x.dtype)


@op("GroupNormalization", since=18)
def _group_norm_18(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Opset 18 has one scale and bias per group."""
    return (_grouped(call, x, call.attr("num_groups")) * scale.unsqueeze(1) + bias.unsqueeze(1)).reshape(x.shape)


@op("GroupNormalization", since=21)
def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    y = _grouped(call, x, call.attr("num_groups")).reshape(x.shape)
    return y * _per_channel(x, scale) + _per_channel(x, bias)


@op("InstanceNormalization")
def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _grouped(call, x, x.shape[1]).reshape(x.shape) * _per_channel(x, scale) + _per_channel(x, bias)


@op("LpNormalization")
def _lp_norm(call: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call.attr("p", 2), call.attr("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@op("LRN")
def _lrn(call: Call, x: Tensor) -> Tensor:
    size = call.attr("size")
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = F.pad((x * x).reshape(x.shape[0], x.shape[1], -1), (0, 0, before, after))
    total = squares.unfold(1, size, 1).sum(-1).reshape(x.shape)
    return x / (call.attr("bias", 1.0) + call.attr("alpha", 1e-4) / size * total) ** call.attr("beta", 0.75)
