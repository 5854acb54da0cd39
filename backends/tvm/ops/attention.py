"""Attention: with a cache that the library keeps, or on values that the graph computes."""

from __future__ import annotations

import onnx_ir as ir

from qc.backends.tvm.kernels.attention import Heads
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.loops import fill, loop
from qc.backends.tvm.ops.movement import reshaped
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, dim, stride_of

__all__ = [
    "attention", "bias_of", "cache_of", "group_query_attention", "once", "past_of", "positions_of", "projections",
    "rotary_embedding", "split_heads", "zeros_of",
]  # fmt: skip


def split_heads(at: Lowering, x: Tensor, heads: int) -> Tensor:
    """``[batch, length, heads * channels]``, or heads apart already, as ``[batch, heads, length, channels]``."""
    if len(x.shape) == 3:
        width = x.shape[-1].constant
        assert width is not None
        x = reshaped(at, x, (x.shape[0], x.shape[1], heads, width // heads))
        x = x.along((0, 2, 1, 3))
    return x if x.strides[-1] == dim(1) else at.contiguous(x)


@operator("GroupQueryAttention", domain="com.microsoft")
def group_query_attention(at: Lowering, node: ir.Node) -> None:
    """Causal attention on a cache: new keys and values are appended, rotated if asked for, then attended to."""
    heads, kv = (int(at.attribute(node, n)) for n in ("num_heads", "kv_num_heads"))  # type: ignore[call-overload]
    q, k, v = projections(at, node, heads, kv)
    batch, _, s, width = q.shape
    channels = width.constant
    past = node.inputs[3]
    assert channels is not None
    assert past is not None
    caches = [cache_of(at, node.inputs[i], node.outputs[i - 2], kv, channels) for i in (3, 4)]
    lengths = at.get(node.inputs[5])  # type: ignore[arg-type]  # number of keys of each text, less one
    length = at.get(past).shape[2]
    for size, wanted in ((lengths.elements, batch), (at.get(past).shape[0], batch), (k.shape[2], s), (v.shape[2], s)):
        at.program.require_equal(size, wanted)
    before = once(at, ("past", lengths.buffer), lambda: past_of(at, lengths, batch, s, length))
    positions = once(at, ("positions", before.buffer), lambda: positions_of(at, before, batch, s))
    rotary = bool(at.attribute(node, "do_rotary", 0))
    tables = [at.contiguous(at.get(node.inputs[i])) for i in (7, 8)] if rotary else [before, before]  # type: ignore[arg-type]
    rotated = 2 * (tables[0].shape[-1].constant or 0) if rotary else 0
    interleaved = bool(at.attribute(node, "rotary_interleaved", 0))
    if rotary:
        turned = at.program.tensor((batch, s, heads, channels))
        turned = turned.along((0, 2, 1, 3))
        at.program.rotate(q, turned, tables, positions, channels, rotated, interleaved, before=None)
        q = turned
    for x, cache, turns in ((k, caches[0], rotated), (v, caches[1], 0)):
        _keep(at, x, cache, before, positions, tables, turns, interleaved)
    scale = float(at.attribute(node, "scale", 0.0) or channels**-0.5)  # type: ignore[arg-type]
    window = int(at.attribute(node, "local_window_size", -1))  # type: ignore[call-overload]
    softcap = float(at.attribute(node, "softcap", 0.0))  # type: ignore[arg-type]
    shape = Heads(channels, channels, heads // kv, True, max(window, 0), False, scale, softcap, at.cells)
    y = at.result(node.outputs[0], (batch, s, heads * channels))
    split = split_heads(at, y, heads)
    at.program.attend(shape, q, caches[0], caches[1], split, y, before, length + s, None, kv)
    for value, cache in zip(node.outputs[1:3], caches, strict=True):
        at.set(value, cache)


def _keep(
    at: Lowering, x: Tensor, cache: Tensor, before: Tensor, positions: Tensor, tables: list[Tensor], rotated: int,
    interleaved: bool,
) -> None:  # fmt: skip
    """Appends new heads to a cache, rotated if asked for."""
    channels = x.shape[3].constant
    assert channels is not None
    if not at.cells.narrow:
        at.program.rotate(x, cache, tables, positions, channels, rotated, interleaved, before=before)
        return
    held = x
    if rotated:
        held = at.program.tensor(x.shape)
        at.program.rotate(x, held, tables, positions, channels, rotated, interleaved, before=None)
    at.program.append(held, cache, positions, channels, at.cells)


def projections(at: Lowering, node: ir.Node, heads: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each with its heads apart."""
    packed = at.input(node, 0)
    assert packed is not None
    if node.inputs[1] is not None:
        k, v = at.get(node.inputs[1]), at.get(node.inputs[2])  # type: ignore[arg-type]
        return split_heads(at, packed, heads), split_heads(at, k, kv), split_heads(at, v, kv)
    width = packed.shape[-1].constant
    assert width is not None
    each = width // (heads + 2 * kv)
    parts, start = [], 0
    for count in (heads, kv, kv):
        part = packed.view((*packed.shape[:-1], count * each), packed.strides, start)
        parts.append(split_heads(at, part, count))
        start += count * each
    return parts[0], parts[1], parts[2]


def cache_of(at: Lowering, past: ir.Value | None, present: ir.Value, kv: int, channels: int) -> Tensor:
    """The library's own memory for one cache: ``[batch, heads, room, row]`` at the limits of an instance."""
    assert past is not None
    if past not in at.cached:
        if not past.is_graph_input() or not present.is_graph_output():
            raise at.refuse(present.producer(), "its cache is not an input and output of the model")  # type: ignore[arg-type]
        row, dtype = channels, ir.DataType.FLOAT
        if at.cells.narrow:
            dtype = ir.DataType.UINT8
            size = at.program.bytes_of(dtype)
            if present.uses() or channels * at.cells.bits % (8 * size):
                reason = (
                    f"its cache, of {channels} channels, cannot be kept as {at.cells.name} in units of {size} bytes"
                )
                raise at.refuse(present.producer(), reason)  # type: ignore[arg-type]
            row = at.cells.row_bytes(channels) // size
        at.cached[past] = at.program.cache((dim("qc_batch"), kv, dim("qc_room"), row), dtype)
    return at.cached[past]


def once(at: Lowering, key: object, make) -> Tensor:
    """What several nodes use, made by the first of them."""
    if key not in at.shared:
        at.shared[key] = make()
    return at.shared[key]


def past_of(at: Lowering, lengths: Tensor, batch: Dim, s: Dim, length: Dim) -> Tensor:
    """Tokens in the cache of each text: all of it but the new ones, none where a first prompt is padded.

    A mask that counts more than there are must not reach beyond the cache.
    """
    y = at.program.tensor((batch,), ir.DataType.INT32)
    sizes = [at.numbers([n], ir.DataType.INT32) for n in (s, length)]
    flat = lengths.view((lengths.elements,), (1,))
    loop(at, "{a} + 1 < {b} ? 0 : {a} + 1 - {b} > {c} ? {c} : {a} + 1 - {b}", [flat, *sizes], y)
    return y


def positions_of(at: Lowering, before: Tensor, batch: Dim, s: Dim) -> Tensor:
    """The positions of new tokens, behind those before."""
    y, places = (at.program.tensor(shape, ir.DataType.INT64) for shape in ((batch, s), (s,)))
    at.program.count(places, dim(0), dim(1))
    loop(at, "{a} + {b}", [before.view((batch, 1), (1, 0)), places], y)
    return y


@operator("Attention")
def attention(at: Lowering, node: ir.Node) -> None:
    """Attention on values that the graph computes, with a mask or a bias on the scores."""
    q, k, v = (at.get(value) for value in node.inputs[:3])  # type: ignore[arg-type]
    if any(value is not None for value in node.inputs[4:]):
        raise at.refuse(node, "it has a cache of its own")
    if any(int(at.attribute(node, f"{side}_window_size", -1)) >= 0 for side in ("left", "right")):  # type: ignore[call-overload]
        raise at.refuse(node, "its queries see a window")
    merged = len(q.shape) == 3
    if merged:
        heads, kv = (int(at.attribute(node, n)) for n in ("q_num_heads", "kv_num_heads"))  # type: ignore[call-overload]
    else:
        found = q.shape[1].constant, k.shape[1].constant
        if None in found:
            raise at.refuse(node, "its number of heads is unknown")
        heads, kv = found  # type: ignore[assignment]
    q, k, v = split_heads(at, q, heads), split_heads(at, k, kv), split_heads(at, v, kv)
    width, value_width = q.shape[3].constant, v.shape[3].constant
    if width is None or value_width is None:
        raise at.refuse(node, "the width of its heads is unknown")
    batch, s, t = q.shape[0], q.shape[2], k.shape[2]
    for x, wanted in ((k, (batch, kv, t, width)), (v, (batch, kv, t, value_width))):
        for size, needed in zip(x.shape, wanted, strict=True):
            at.program.require_equal(size, needed)
    held = at.attribute(node, "scale")
    scale = float(held) if held is not None else width**-0.5  # type: ignore[arg-type]
    softcap = float(at.attribute(node, "softcap", 0.0))  # type: ignore[arg-type]
    causal = bool(at.attribute(node, "is_causal", 0))
    mask = at.input(node, 3)
    bias = None if mask is None else bias_of(at, mask, batch, heads, s, t)
    if softcap and bias is not None:
        raise at.refuse(node, "it has both a mask and a soft cap")
    shape = Heads(width, value_width, heads // kv, causal, 0, bias is not None, scale, softcap)
    if merged:
        y = at.result(node.outputs[0], (batch, s, heads * value_width))
        split = split_heads(at, y, heads)
    else:
        y = at.result(node.outputs[0], (batch, heads, s, value_width))
        split = y
    before = once(at, ("zeros", batch), lambda: zeros_of(at, batch)) if causal else None
    at.program.attend(shape, q, k, v, split, y, before, t, bias, kv)


def zeros_of(at: Lowering, batch: Dim) -> Tensor:
    """A zero for each text."""
    y = at.program.tensor((batch,), ir.DataType.INT32)
    fill(at, y, "0")
    return y


def bias_of(at: Lowering, mask: Tensor, batch: Dim, heads: int, s: Dim, t: Dim) -> tuple[Tensor, list[Dim]]:
    """What is added to the scores, with its strides: minus infinity where a mask says no."""
    key = ("bias", mask.buffer, mask.offset, mask.strides)

    def make() -> Tensor:
        if mask.dtype == ir.DataType.BOOL:
            y = at.program.tensor(mask.shape)
            loop(at, "{a} ? 0.0f : -INFINITY", [mask], y)
            return y
        return mask if mask.strides[-1] == dim(1) else at.contiguous(mask)

    bias = once(at, key, make)
    missing = 4 - len(bias.shape)
    sizes = (*[dim(1)] * missing, *bias.shape)
    strides = (*[dim(0)] * missing, *bias.strides)
    steps = []
    at.program.require_equal(sizes[3], t)
    for size, stride, wanted in zip(sizes[:3], strides[:3], (batch, dim(heads), s), strict=True):
        at.program.require_spread(size, wanted)
        steps.append(stride if size == wanted and size != dim(1) else stride_of(size, stride))
    return bias, steps


@operator("RotaryEmbedding")
def rotary_embedding(at: Lowering, node: ir.Node) -> None:
    """Rotation of heads by tables and positions."""
    x, cos, sin = (at.get(v) for v in node.inputs[:3])  # type: ignore[arg-type]
    positions = at.input(node, 3)
    if positions is None:
        raise at.refuse(node, "its tables are not indexed by positions")
    if len(x.shape) == 3:
        heads = int(at.attribute(node, "num_heads", 0))  # type: ignore[call-overload]
        x4 = split_heads(at, x, heads)
    else:
        x4 = x if x.strides[-1] == dim(1) else at.contiguous(x)
    width = x4.shape[3].constant
    half = cos.shape[-1].constant
    if width is None or half is None:
        raise at.refuse(node, "the width of its heads is unknown")
    y = at.result(node.outputs[0], x.shape)
    y4 = split_heads(at, y, int(x4.shape[1].constant or 0)) if len(x.shape) == 3 else y
    for size, wanted in zip(positions.shape, (x4.shape[0], x4.shape[2]), strict=True):
        at.program.require_equal(size, wanted)
    tables = [at.contiguous(cos), at.contiguous(sin)]
    interleaved = bool(at.attribute(node, "interleaved", 0))
    at.program.rotate(x4, y4, tables, at.contiguous(positions), width, 2 * half, interleaved, before=None)
