"""Attention and rotary position embedding for the torch executor."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from qc.ir._torch_ops import Call, op

Tensor = torch.Tensor


def _heads(x: Tensor, count: int) -> Tensor:
    """``[batch, sequence, heads * size]`` to ``[batch, heads, sequence, size]``."""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _bias(
    call: Call, query: Tensor, keys: int, mask: Tensor | None, offset: int | Tensor, filled: Tensor | None
) -> Tensor:
    """What is added to the scores: the mask, the causal frontier, the window and the padding; broadcastable.

    A query at position i of its block stands at ``offset + i``.
    """
    bias = torch.zeros(query.shape[2], keys, dtype=query.dtype, device=query.device)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = _excluded(~mask, query)
        missing = keys - mask.shape[-1]
        if missing > 0:
            mask = torch.cat([mask, mask.new_full((*mask.shape[:-1], missing), -torch.inf)], -1)
        bias = bias + mask
    start = offset.reshape(-1, 1, 1, 1) if isinstance(offset, Tensor) else offset
    j = torch.arange(keys, device=query.device)
    distance = torch.arange(query.shape[2], device=query.device).unsqueeze(1) + start - j
    left, right = call.attr("left_window_size", -1), call.attr("right_window_size", -1)
    right = 0 if call.attr("is_causal", 0) else right
    for bound, side in ((left, distance), (right, -distance)):
        if bound >= 0:
            bias = bias + _excluded(side > bound, bias)
    if filled is not None:
        bias = bias + _excluded(j >= filled.reshape(-1, 1, 1, 1), bias)
    return bias


def _excluded(where: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(where.shape, dtype=like.dtype, device=like.device).masked_fill(where, -torch.inf)


@op("Attention", since=23)
def _attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled dot-product attention with grouped heads and a cache; a query that sees no key yields zero."""
    flat = query.dim() == 3
    if flat:
        query = _heads(query, call.attr("q_num_heads"))
        key, value = (_heads(x, call.attr("kv_num_heads")) for x in (key, value))
    offset: int | Tensor = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    elif filled is not None:
        offset = filled - query.shape[2]
    bias = _bias(call, query, key.shape[2], mask, offset, filled)

    repeats = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    # The square root of the scale on either side keeps half-precision products in range.
    root = math.sqrt(call.attr("scale", 1 / math.sqrt(query.shape[-1])))
    scores = (query * root) @ (keys * root).transpose(-1, -2)
    mode, captured = call.attr("qk_matmul_output_mode", 0), scores
    softcap = call.attr("softcap", 0.0)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
        captured = scores if mode == 1 else captured
    scores = scores + bias
    captured = scores if mode == 2 else captured
    precision = call.attr("softmax_precision")
    wide = scores if precision is None else scores.to(call.context.torch_dtype(ir.DataType(precision)))
    blind = torch.isneginf(bias).all(-1, keepdim=True)
    if blind.device.type == "cpu" and not blind.any():  # other devices would have to be waited for
        weights = torch.softmax(wide, -1).to(query.dtype)
    else:
        # A blind row is replaced before the softmax too: a NaN there would reach the gradients.
        weights = torch.softmax(wide.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0).to(query.dtype)
    captured = weights if mode == 3 else captured
    output = weights @ values
    if flat:
        output = output.transpose(1, 2).flatten(2)
    return output, key, value, captured


@op("RotaryEmbedding", since=23)
def _rotary(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotates pairs of channels: the halves of the rotated part, or neighbours when interleaved."""
    heads = x if x.dim() == 4 else _heads(x, call.attr("num_heads"))
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = call.attr("rotary_embedding_dim", 0) or heads.shape[-1]
    turned, kept = heads[..., :size], heads[..., size:]
    interleaved = call.attr("interleaved", 0)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    pair = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    y = torch.cat([pair, kept], -1)
    return y if x.dim() == 4 else y.transpose(1, 2).reshape(x.shape)
