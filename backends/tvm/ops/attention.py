"""Attention: with a cache that the library keeps, or on values that the graph computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.kernels.attention import Heads, attend_few, attend_many, rotate
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.loops import loop
from qc.backends.tvm.ops.movement import reshaped
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, Size, dim

__all__ = ["attention", "group_query_attention", "rotary_embedding"]

_FEW = 3
"""Up to so many queries stream through the keys; more are worth transposing them."""


def _heads(at: Lowering, x: Tensor, heads: int) -> Tensor:
    """``[batch, length, heads * channels]``, or heads apart already, as ``[batch, heads, length, channels]``."""
    if len(x.shape) == 3:
        width = x.shape[-1].constant
        assert width is not None
        x = reshaped(at, x, (x.shape[0], x.shape[1], heads, width // heads))
        x = x.view([x.shape[i] for i in (0, 2, 1, 3)], [x.strides[i] for i in (0, 2, 1, 3)])
    return x if x.strides[-1] == dim(1) else at.contiguous(x)


@operator("GroupQueryAttention", domain="com.microsoft")
def group_query_attention(at: Lowering, node: ir.Node) -> None:
    """Causal attention on a cache: new keys and values are appended, rotated if asked for, then attended to."""
    heads, kv = (int(at.attribute(node, n)) for n in ("num_heads", "kv_num_heads"))  # type: ignore[call-overload]
    q, k, v = _projections(at, node, heads, kv)
    batch, _, s, width = q.shape
    channels = width.constant
    past = node.inputs[3]
    assert channels is not None
    assert past is not None
    caches = [_cache(at, node.inputs[i], node.outputs[i - 2], kv, channels) for i in (3, 4)]
    lengths = at.get(node.inputs[5])  # type: ignore[arg-type]  # number of keys of each text, less one
    length = at.get(past).shape[2]
    before = _once(at, ("past", lengths.buffer), lambda: _past(at, lengths, batch, s, length))
    positions = _once(at, ("positions", before.buffer), lambda: _positions(at, before, batch, s))
    rotary = bool(at.attribute(node, "do_rotary", 0))
    tables = [at.contiguous(at.get(node.inputs[i])) for i in (7, 8)] if rotary else [before, before]  # type: ignore[arg-type]
    rotated = 2 * (tables[0].shape[-1].constant or 0) if rotary else 0
    interleaved = bool(at.attribute(node, "rotary_interleaved", 0))
    if rotary:
        turned = at.program.tensor((batch, s, heads, channels))
        turned = turned.view([turned.shape[i] for i in (0, 2, 1, 3)], [turned.strides[i] for i in (0, 2, 1, 3)])
        _rotate(at, q, turned, tables, positions, channels, rotated, interleaved, before=None)
        q = turned
    _rotate(at, k, caches[0], tables, positions, channels, rotated, interleaved, before=before)
    _rotate(at, v, caches[1], tables, positions, channels, 0, False, before=before)
    scale = float(at.attribute(node, "scale", 0.0) or channels**-0.5)  # type: ignore[arg-type]
    window = int(at.attribute(node, "local_window_size", -1))  # type: ignore[call-overload]
    softcap = float(at.attribute(node, "softcap", 0.0))  # type: ignore[arg-type]
    shape = Heads(channels, channels, heads // kv, True, max(window, 0), False, scale, softcap)
    y = at.result(node.outputs[0], (batch, s, heads * channels))
    split = _heads(at, y, heads)
    _attend(at, shape, q, caches[0], caches[1], split, y, before, length + s, None, kv)
    for value, cache in zip(node.outputs[1:3], caches, strict=True):
        at.set(value, cache)


def _projections(at: Lowering, node: ir.Node, heads: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    packed = at.input(node, 0)
    assert packed is not None
    if node.inputs[1] is not None:
        k, v = at.get(node.inputs[1]), at.get(node.inputs[2])  # type: ignore[arg-type]
        return _heads(at, packed, heads), _heads(at, k, kv), _heads(at, v, kv)
    width = packed.shape[-1].constant
    assert width is not None
    each = width // (heads + 2 * kv)
    parts, start = [], 0
    for count in (heads, kv, kv):
        part = packed.view((*packed.shape[:-1], count * each), packed.strides, start)
        parts.append(_heads(at, part, count))
        start += count * each
    return parts[0], parts[1], parts[2]


def _cache(at: Lowering, past: ir.Value | None, present: ir.Value, kv: int, channels: int) -> Tensor:
    """The library's own memory for one cache: ``[batch, heads, room, channels]`` at the limits of an instance."""
    assert past is not None
    if past not in at.cached:
        if not past.is_graph_input() or not present.is_graph_output():
            raise at.refuse(present.producer(), "its cache is not an input and output of the model")  # type: ignore[arg-type]
        at.cached[past] = at.program.cache((dim("qc_batch"), kv, dim("qc_room"), channels))
    return at.cached[past]


def _once(at: Lowering, key: object, make) -> Tensor:
    if key not in at.shared:
        at.shared[key] = make()
    return at.shared[key]


def _past(at: Lowering, lengths: Tensor, batch: Dim, s: Dim, length: Dim) -> Tensor:
    """Tokens in the cache of each text: all of it but the new ones, none where a first prompt is padded.

    A mask that counts more than there are must not reach beyond the cache.
    """
    y = at.program.tensor((batch,), ir.DataType.INT32)
    sizes = [at.numbers([n], ir.DataType.INT32) for n in (s, length)]
    flat = lengths.view((lengths.elements,), (1,))
    loop(at, "{a} + 1 < {b} ? 0 : {a} + 1 - {b} > {c} ? {c} : {a} + 1 - {b}", [flat, *sizes], y)
    return y


def _positions(at: Lowering, before: Tensor, batch: Dim, s: Dim) -> Tensor:
    y = at.program.tensor((batch, s), ir.DataType.INT64)
    text = (
        f"{{ const int32_t *a = {before.c}; int64_t *p = {y.c}; for (int64_t b = 0; b < {batch.c}; b++) "
        f"for (int64_t i = 0; i < {s.c}; i++) p[b * {s.c} + i] = a[b] + i; }}"
    )
    at.program.add(text, [before], [y])
    return y


def _rotate(
    at: Lowering, x: Tensor, y: Tensor, tables: list[Tensor], positions: Tensor, width: int, rotated: int,
    interleaved: bool, *, before: Tensor | None,
) -> None:  # fmt: skip
    """Rotates heads into `y`; into a cache behind what it holds if `before` tells how much that is."""
    if rotated:
        at.program.use("check_range")
        rows = tables[0].shape[0]
        at.program.add(f"TRY(check_range({positions.c}, {positions.elements.c}, {rows.c}));", [positions], [])
    batch, heads, s, _ = x.shape
    kernel = at.program.kernel(
        "rotate", rotate, width, rotated, interleaved, before is not None, pointers=5, integers=9
    )
    target = y.view(y.shape, y.strides)
    integers: list[Size] = [heads, s, positions.strides[0]]
    integers += [x.strides[0], x.strides[1], x.strides[2], y.strides[0], y.strides[1], y.strides[2]]
    at.program.call(kernel, [x, target, *tables, positions], integers, batch * s, writes=[y])


def _attend(
    at: Lowering, shape: Heads, q: Tensor, k: Tensor, v: Tensor, y4: Tensor, y: Tensor, before: Tensor | None,
    keys: Dim, bias: tuple[Tensor, list[Dim]] | None, kv: int,
) -> None:  # fmt: skip
    """Calls the kernel that fits the number of queries."""
    batch, _, s, _ = q.shape
    units = batch * kv
    past = before if before is not None else at.program.array(np.zeros(1, np.int32))
    strides = [t for x in (q, k, v, y4) for t in (x.strides[0], x.strides[1], x.strides[2])]
    extra, more = ([], []) if bias is None else ([bias[0]], bias[1])
    lanes = at.isa.lanes
    few_fits = shape.width % lanes == 0 and shape.value_width % lanes == 0
    room = dim(f"qc_up({keys.c}, {2 * lanes})")
    per_key, _ = shape.scratch(at.isa, True, 0)
    work = at.program.tensor((units * room * max(per_key, shape.share),))
    pointers, integers = 6 + len(extra), 16 + len(more)
    many = at.program.kernel("attend_many", attend_many, shape, pointers=pointers, integers=integers)
    names = [many]
    if few_fits:
        names.insert(0, at.program.kernel("attend_few", attend_few, shape, pointers=pointers, integers=integers))
    addresses = ", ".join(t.c for t in (q, k, v, y4, work, past, *extra))
    numbers = ", ".join(dim(i).c for i in (kv, s, keys, room, *strides, *more))
    lines = [f"CALL({n}, {pointers}, {integers}, PTRS({addresses}), INTS({numbers}), {units.c}, 1);" for n in names]
    text = lines[0] if len(lines) == 1 else f"if ({s.c} <= {_FEW}) {{ {lines[0]} }} else {{ {lines[1]} }}"
    at.program.add(text, [q, k, v, past, work, *extra], [y, work])


@operator("Attention")
def attention(at: Lowering, node: ir.Node) -> None:
    """Attention on values that the graph computes, with a mask or a bias on the scores."""
    q, k, v = (at.get(value) for value in node.inputs[:3])  # type: ignore[arg-type]
    if any(value is not None for value in node.inputs[4:]) or any(x.uses() for x in node.outputs[1:]):
        raise at.refuse(node, "it has a cache of its own, or its scores are read")
    merged = len(q.shape) == 3
    if merged:
        heads, kv = (int(at.attribute(node, n)) for n in ("q_num_heads", "kv_num_heads"))  # type: ignore[call-overload]
    else:
        found = q.shape[1].constant, k.shape[1].constant
        if None in found:
            raise at.refuse(node, "its number of heads is unknown")
        heads, kv = found  # type: ignore[assignment]
    q, k, v = _heads(at, q, heads), _heads(at, k, kv), _heads(at, v, kv)
    width, value_width = q.shape[3].constant, v.shape[3].constant
    if width is None or value_width is None:
        raise at.refuse(node, "the width of its heads is unknown")
    batch, s, t = q.shape[0], q.shape[2], k.shape[2]
    held = at.attribute(node, "scale")
    scale = float(held) if held is not None else width**-0.5  # type: ignore[arg-type]
    softcap = float(at.attribute(node, "softcap", 0.0))  # type: ignore[arg-type]
    causal = bool(at.attribute(node, "is_causal", 0))
    mask = at.input(node, 3)
    bias = None if mask is None else _bias(at, mask, batch, heads, s, t)
    if softcap and bias is not None:
        raise at.refuse(node, "it has both a mask and a soft cap")
    shape = Heads(width, value_width, heads // kv, causal, 0, bias is not None, scale, softcap)
    if merged:
        y = at.result(node.outputs[0], (batch, s, heads * value_width))
        split = _heads(at, y, heads)
    else:
        y = at.result(node.outputs[0], (batch, heads, s, value_width))
        split = y
    before = _once(at, ("zeros", batch), lambda: _zeros(at, batch)) if causal else None
    _attend(at, shape, q, k, v, split, y, before, t, bias, kv)


def _zeros(at: Lowering, batch: Dim) -> Tensor:
    y = at.program.tensor((batch,), ir.DataType.INT32)
    at.program.add(f"memset({y.c}, 0, (size_t){batch.c} * 4);", [], [y])
    return y


def _bias(at: Lowering, mask: Tensor, batch: Dim, heads: int, s: Dim, t: Dim) -> tuple[Tensor, list[Dim]]:
    """What is added to the scores, with its strides: minus infinity where a mask says no."""
    key = ("bias", mask.buffer, mask.offset, mask.strides)

    def make() -> Tensor:
        if mask.dtype == ir.DataType.BOOL:
            y = at.program.tensor(mask.shape)
            loop(at, "{a} ? 0.0f : -INFINITY", [mask], y)
            return y
        return mask if mask.strides[-1] == dim(1) else at.contiguous(mask)

    bias = _once(at, key, make)
    missing = 4 - len(bias.shape)
    sizes = (*[dim(1)] * missing, *bias.shape)
    strides = (*[dim(0)] * missing, *bias.strides)
    steps = []
    for size, stride, wanted in zip(sizes[:3], strides[:3], (batch, dim(heads), s), strict=True):
        steps.append(stride if size == wanted and size != dim(1) else dim(f"({size.c} == 1 ? 0 : {stride.c})"))
    steps = [dim(0) if size == dim(1) else step for size, step in zip(sizes[:3], steps, strict=True)]
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
        x4 = _heads(at, x, heads)
    else:
        x4 = x if x.strides[-1] == dim(1) else at.contiguous(x)
    width = x4.shape[3].constant
    half = cos.shape[-1].constant
    if width is None or half is None:
        raise at.refuse(node, "the width of its heads is unknown")
    y = at.result(node.outputs[0], x.shape)
    y4 = _heads(at, y, int(x4.shape[1].constant or 0)) if len(x.shape) == 3 else y
    tables = [at.contiguous(cos), at.contiguous(sin)]
    interleaved = bool(at.attribute(node, "interleaved", 0))
    _rotate(at, x4, y4, tables, at.contiguous(positions), width, 2 * half, interleaved, before=None)
