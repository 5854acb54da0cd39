"""Operators of the torch executor that make, move, select or scatter elements."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch.nn import functional as F  # noqa: N812

from qc.ir._torch_ops import Call, op, place, to_torch

Tensor = torch.Tensor


@op("Constant")
def _constant(call: Call) -> Tensor:
    name = next(n for n in ("value", "value_float", "value_floats", "value_int", "value_ints") if n in call.attributes)
    value = call.attr(name)
    if name != "value":
        dtype = call.context.torch_dtype(ir.DataType.FLOAT) if "float" in name else torch.int64
        value = torch.tensor(value, dtype=dtype)
    return place(to_torch(value, call.context), call.context)


@op("ConstantOfShape", host=(0,))
def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.attr("value")
    if value is None:
        fill = torch.zeros((), dtype=call.context.torch_dtype(ir.DataType.FLOAT))
    else:
        fill = to_torch(value, call.context)
    return place(fill.reshape(()).expand(shape.tolist()), call.context)


@op("EyeLike")
def _eye_like(call: Call, x: Tensor) -> Tensor:
    to = call.attr("dtype")
    dtype = x.dtype if to is None else call.context.torch_dtype(ir.DataType(to))
    diagonal = torch.diag_embed(torch.ones(max(x.shape), device=x.device), call.attr("k", 0))
    return diagonal[: x.shape[0], : x.shape[1]].to(dtype)


@op("Range", host=(0, 1, 2))
def _range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    values = torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)
    return values.to(call.context.device)


@op("Shape")
def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[call.attr("start", 0) : call.attr("end")], dtype=torch.int64)


@op("Size")
def _size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@op("Reshape", host=(1,))
def _reshape(call: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    dims = call.ints(shape, "shape") or []
    if not call.attr("allowzero", 0):
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


@op("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.attr("axis", 1)
    return x.reshape(x.shape[: axis if axis >= 0 else axis + x.dim()].numel(), -1)


@op("Transpose")
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.attr("perm", tuple(reversed(range(x.dim())))))


@op("Squeeze", host=(1,))
def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = call.ints(axes, "axes")
    return x.squeeze() if found is None else x.squeeze([a % x.dim() for a in found])


@op("Unsqueeze", host=(1,))
def _unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = call.ints(axes, "axes") or []
    rank = x.dim() + len(found)
    for axis in sorted(a % rank for a in found):
        x = x.unsqueeze(axis)
    return x


@op("Concat")
def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, call.attr("axis", 1))


@op("Split", host=(1,))
def _split(call: Call, x: Tensor, split: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.attr("axis", 0)
    sizes = call.ints(split, "split")
    if sizes is None:
        parts = call.attr("num_outputs", call.outputs())
        size = -(-x.shape[axis] // parts)
        sizes = [size] * (parts - 1) + [x.shape[axis] - size * (parts - 1)]
    return torch.split(x, sizes, axis)


@op("Slice", host=(1, 2, 3, 4))
def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    begin, end = call.ints(starts, "starts") or [], call.ints(ends, "ends") or []
    dims = call.ints(axes, "axes", list(range(len(begin)))) or []
    for first, last, dim, step in zip(begin, end, dims, call.ints(steps, default=[1] * len(begin)) or [], strict=True):
        bounds = range(x.shape[dim])[first:last:step]
        if step > 0:
            x = x[(slice(None),) * (dim % x.dim()) + (slice(bounds.start, bounds.stop, step),)]
        else:
            x = x.index_select(dim, torch.tensor(list(bounds), dtype=torch.int64, device=x.device))
    return x


@op("Expand", host=(1,))
def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


@op("Tile", host=(1,))
def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


@op("Pad", host=(1, 3))
def _pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    amounts = call.ints(pads, "pads", []) or []
    dims = [a % x.dim() for a in call.ints(axes, default=list(range(x.dim()))) or []]
    mode = call.attr("mode", "constant")
    if mode == "constant":
        flat = [0] * (2 * x.dim())
        for i, dim in enumerate(dims):
            # torch counts from the last axis
            flat[2 * (x.dim() - 1 - dim)], flat[2 * (x.dim() - 1 - dim) + 1] = amounts[i], amounts[i + len(dims)]
        return F.pad(x, flat, value=call.attr("value", 0.0) if value is None else value.item())
    for i, dim in enumerate(dims):
        size = x.shape[dim]
        index = torch.arange(-amounts[i], size + amounts[i + len(dims)], device=x.device)
        if mode == "edge":
            index = index.clamp(0, size - 1)
        elif mode == "wrap":
            index = index % size
        else:
            index = (size - 1) - ((index % max(2 * (size - 1), 1)) - (size - 1)).abs()
        x = x.index_select(dim, index)
    return x


@op("Trilu", host=(1,))
def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if call.attr("upper", 1) else torch.tril(x, diagonal)


@op("NonZero")
def _non_zero(call: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x).T


@op("OneHot", host=(1,))
def _one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int(depth), call.attr("axis", -1)
    wanted = indices.to(torch.int64).unsqueeze(axis)
    shape = [1] * wanted.dim()
    shape[axis] = count
    classes = torch.arange(count, device=indices.device).reshape(shape)
    inside = (wanted >= -count) & (wanted < count)
    return torch.where((wanted % count == classes) & inside, values[1], values[0])


@op("Compress")
def _compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    axis = call.attr("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


def _wrapped(index: Tensor, size: int) -> Tensor:
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@op("Gather")
def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.attr("axis", 0) % x.dim()
    rows = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return rows.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@op("GatherElements")
def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.attr("axis", 0)
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _linear_index(indices: Tensor, shape: torch.Size) -> Tensor:
    """Maps index tuples ``[..., r]`` into a tensor of `shape` (rank r) to positions in its flattened form."""
    position = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for i, size in enumerate(shape):
        position = position * size + _wrapped(indices[..., i], size)
    return position


@op("GatherND")
def _gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    batch, rank = call.attr("batch_dims", 0), indices.shape[-1]
    shape = x.shape[batch : batch + rank]
    count = x.shape[:batch].numel()
    position = _linear_index(indices, shape).reshape(count, -1)
    position = position + torch.arange(count, device=x.device).unsqueeze(1) * shape.numel()
    rows = x.reshape(count * shape.numel(), *x.shape[batch + rank :])
    return rows.index_select(0, position.reshape(-1)).reshape([*indices.shape[:-1], *x.shape[batch + rank :]])


_REDUCE = {"mul": "prod", "max": "amax", "min": "amin"}


@op("ScatterElements", "Scatter")
def _scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = call.attr("axis", 0), call.attr("reduction", "none")
    index = _wrapped(indices, x.shape[axis])
    if how == "none":
        return torch.scatter(x, axis, index, updates)
    if how == "add":
        return torch.scatter_add(x, axis, index, updates)
    return torch.scatter_reduce(x, axis, index, updates, _REDUCE[how])


@op("ScatterND")
def _scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    rank, how = indices.shape[-1], call.attr("reduction", "none")
    rest = x.shape[rank:]
    rows = x.reshape(x.shape[:rank].numel(), *rest)
    position = _linear_index(indices, x.shape[:rank]).reshape(-1)
    source = updates.reshape(-1, *rest)
    if how == "none":
        rows = rows.index_copy(0, position, source)
    elif how == "add":
        rows = rows.index_add(0, position, source)
    else:
        rows = rows.index_reduce(0, position, source, _REDUCE[how])
    return rows.reshape(x.shape)


@op("TensorScatter")
def _tensor_scatter(call: Call, cache: Tensor, update: Tensor, write: Tensor | None = None) -> Tensor:
    """Writes `update` into the sequence axis of each batch entry of `cache`, from position ``write[batch]`` on."""
    axis = call.attr("axis", -2) % cache.dim()
    length, count = cache.shape[axis], update.shape[axis]
    none = torch.zeros(cache.shape[0], dtype=torch.int64, device=cache.device)
    start = none if write is None else write.to(torch.int64)
    position = start.unsqueeze(1) + torch.arange(count, device=cache.device)
    if call.attr("mode", "linear") == "circular":
        position = position % length
    shape = [1] * cache.dim()
    shape[0], shape[axis] = cache.shape[0], count
    return torch.scatter(cache, axis, position.reshape(shape).expand(update.shape), update)


@op("DepthToSpace")
def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = call.attr("blocksize")
    if call.attr("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // b**2, h * b, w * b)


@op("SpaceToDepth")
def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = call.attr("blocksize")
    order = (0, 3, 5, 1, 2, 4) if call.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    y = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return y.reshape(n, c * b**2, h // b, w // b)
