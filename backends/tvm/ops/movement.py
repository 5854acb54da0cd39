"""What moves data or says where it lies. Most of it is a view; shapes are followed as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.loops import broadcast, copy, fill, loop
from qc.backends.tvm.program import Tensor, dense
from qc.backends.tvm.shapes import Dim, Size, bounded, dim, divide, largest, product, smallest, stride_of

__all__ = [
    "concat",
    "constant_of_shape",
    "expand",
    "flatten",
    "identity",
    "pad",
    "range_",
    "reshape",
    "reshaped",
    "shape",
    "size",
    "slice_",
    "split",
    "squeeze",
    "tile",
    "transpose",
    "unsqueeze",
]


def _numbers_of(at: Lowering, node: ir.Node, slot: int, what: str) -> tuple[Dim, ...] | None:
    tensor = at.input(node, slot)
    if tensor is None:
        return None
    if tensor.values is None:
        raise at.refuse(node, f"its {what} depend on values that are computed")
    return tensor.values


def _constants_of(at: Lowering, node: ir.Node, slot: int, what: str) -> list[int] | None:
    numbers = _numbers_of(at, node, slot, what)
    if numbers is None:
        return None
    if any(n.constant is None for n in numbers):
        raise at.refuse(node, f"its {what} are not constant")
    return [n.constant for n in numbers if n.constant is not None]


@operator("Identity", "Dropout")
def identity(at: Lowering, node: ir.Node) -> None:
    """The same."""
    at.set(node.outputs[0], at.get(node.inputs[0]))  # type: ignore[arg-type]


@operator("Shape")
def shape(at: Lowering, node: ir.Node) -> None:
    """The sizes of a tensor."""
    x = at.input(node, 0)
    assert x is not None
    start, end = at.attribute(node, "start", 0), at.attribute(node, "end", len(x.shape))
    at.set(node.outputs[0], at.numbers(x.shape[slice(int(start), int(end))]))  # type: ignore[call-overload]


@operator("Size")
def size(at: Lowering, node: ir.Node) -> None:
    """The number of elements."""
    x = at.input(node, 0)
    assert x is not None
    at.set(node.outputs[0], at.numbers([x.elements], scalar=True))


@operator("Range")
def range_(at: Lowering, node: ir.Node) -> None:
    """Running integers."""
    start, limit, delta = (at.get(v) for v in node.inputs if v is not None)
    if any(t.values is None for t in (start, limit, delta)):
        raise at.refuse(node, "its limits are computed")
    (first,), (end,), (every,) = start.values, limit.values, delta.values  # type: ignore[misc]
    if every.constant is None or every.constant < 1:
        raise at.refuse(node, "its step is not positive and constant")
    count = largest(divide(end - first + (every.constant - 1), every), 0)
    y = at.result(node.outputs[0], (count,), start.dtype)
    at.program.count(y, first, every)


@operator("ConstantOfShape")
def constant_of_shape(at: Lowering, node: ir.Node) -> None:
    """One number everywhere."""
    sizes = _numbers_of(at, node, 0, "sizes")
    held = node.attributes.get("value")
    number = held.as_tensor().numpy().reshape(-1)[0] if held is not None else np.float32(0)
    dtype = held.as_tensor().dtype if held is not None else ir.DataType.FLOAT
    assert sizes is not None
    y = at.result(node.outputs[0], sizes, dtype)
    copy(at, at.program.array(np.asarray(number), dtype), y)


@operator("Reshape")
def reshape(at: Lowering, node: ir.Node) -> None:
    """Another shape of the same elements."""
    x, sizes = at.input(node, 0), _numbers_of(at, node, 1, "sizes")
    assert x is not None
    assert sizes is not None
    if x.values is not None and len(sizes) <= 1:
        at.set(node.outputs[0], at.numbers(x.values, x.dtype, scalar=not sizes))
        return
    zeros = bool(at.attribute(node, "allowzero", 0))
    wanted = [x.shape[i] if s.constant == 0 and not zeros else s for i, s in enumerate(sizes)]
    open_axes = [i for i, s in enumerate(wanted) if s.constant == -1]
    for i in open_axes:
        known = at.spelled(node.outputs[0], i)  # right for no elements, too
        wanted[i] = known if known is not None else _rest(x.shape, [s for s in wanted if s.constant != -1])
    at.program.require_equal(product(wanted), x.elements)
    at.set(node.outputs[0], reshaped(at, x, wanted))


def _rest(shape: Sequence[Dim], known: Sequence[Dim]) -> Dim:
    """The size that makes up for what is left, common factors taken out first."""
    left, rest = list(shape), []
    for size in known:
        if size in left:
            left.remove(size)
        else:
            rest.append(size)
    return divide(product(left), product(rest))


def reshaped(at: Lowering, x: Tensor, shape: Sequence[Size]) -> Tensor:
    """A view if the strides allow one, else a copy."""
    sizes = tuple(map(dim, shape))
    x = at.stored(x)
    strides = _view_strides(x, sizes)
    if strides is None:
        x = at.contiguous(x)
        strides = dense(sizes)
    return x.view(sizes, strides)


def _view_strides(x: Tensor, sizes: Sequence[Dim]) -> tuple[Dim, ...] | None:
    """Strides of a new shape over the same elements, where only axes without gaps are split or merged."""
    if x.contiguous:
        return dense(sizes)
    found: list[Dim] = []
    old = list(zip(x.shape, x.strides, strict=True))
    new = list(sizes)
    while new:
        size = new.pop(0)
        if old and old[0][0] == size:
            found.append(old.pop(0)[1])
            continue
        if size == dim(1):
            found.append(dim(1))
            continue
        while old and old[0][0] == dim(1):
            old.pop(0)
        if not old:
            return None
        # split one old axis into several new ones
        group = [size]
        length, stride = old[0]
        while new and product(group) != length:
            group.append(new.pop(0))
        if product(group) == length:
            old.pop(0)
            found += [s * stride for s in dense(group)]
            continue
        # or merge neighbouring old axes into one new axis
        new[:0] = group[1:]
        merged, last = old.pop(0)
        while old and merged != size:
            n, s = old.pop(0)
            if last != s * n:
                return None
            merged, last = merged * n, s
        if merged != size:
            return None
        found.append(last)
    return tuple(found) if all(n == dim(1) for n, _ in old) else None


@operator("Flatten")
def flatten(at: Lowering, node: ir.Node) -> None:
    """Two axes."""
    x = at.input(node, 0)
    assert x is not None
    axis = int(at.attribute(node, "axis", 1))  # type: ignore[call-overload]
    axis = axis + len(x.shape) if axis < 0 else axis
    at.set(node.outputs[0], reshaped(at, x, (product(x.shape[:axis]), product(x.shape[axis:]))))


@operator("Squeeze")
def squeeze(at: Lowering, node: ir.Node) -> None:
    """Without axes of size 1."""
    x, axes = at.input(node, 0), _constants_of(at, node, 1, "axes")
    assert x is not None
    gone = range(len(x.shape)) if axes is None else [a % len(x.shape) for a in axes]
    gone = [a for a in gone if axes is not None or x.shape[a] == dim(1)]
    for a in gone:
        at.program.require_equal(x.shape[a], 1)
    if x.values is not None:
        at.set(node.outputs[0], at.numbers(x.values, x.dtype, scalar=True) if gone else x)
        return
    keep = [i for i in range(len(x.shape)) if i not in gone]
    at.set(node.outputs[0], x.along(keep))


@operator("Unsqueeze")
def unsqueeze(at: Lowering, node: ir.Node) -> None:
    """With axes of size 1."""
    x, axes = at.input(node, 0), _constants_of(at, node, 1, "axes")
    assert x is not None
    assert axes is not None
    rank = len(x.shape) + len(axes)
    new = {a % rank for a in axes}
    if x.values is not None and rank == 1:
        at.set(node.outputs[0], at.numbers(x.values, x.dtype))
        return
    x = at.stored(x)
    old = iter(zip(x.shape, x.strides, strict=True))
    pairs = [(dim(1), dim(1)) if i in new else next(old) for i in range(rank)]
    at.set(node.outputs[0], x.view([p[0] for p in pairs], [p[1] for p in pairs]))


@operator("Transpose")
def transpose(at: Lowering, node: ir.Node) -> None:
    """Axes in another order."""
    x = at.input(node, 0)
    assert x is not None
    x = at.stored(x)
    order = [int(i) for i in at.attribute(node, "perm", range(len(x.shape))[::-1])]  # type: ignore[attr-defined]
    at.set(node.outputs[0], x.along(order))


@operator("Expand")
def expand(at: Lowering, node: ir.Node) -> None:
    """Repeated along axes of size 1."""
    x, sizes = at.input(node, 0), _numbers_of(at, node, 1, "sizes")
    assert x is not None
    assert sizes is not None
    x = at.stored(x)
    wanted = broadcast(at, [x.shape, sizes])
    missing = len(wanted) - len(x.shape)
    strides = [dim(0)] * missing
    for have, stride, want in zip(x.shape, x.strides, wanted[missing:], strict=True):
        if have == want:
            strides.append(stride)
        else:
            strides.append(stride_of(have, stride))
    at.set(node.outputs[0], x.view(wanted, strides))


@operator("Split")
def split(at: Lowering, node: ir.Node) -> None:
    """Parts of an axis, as views."""
    x, sizes = at.input(node, 0), _numbers_of(at, node, 1, "sizes")
    assert x is not None
    x = at.stored(x)
    axis = int(at.attribute(node, "axis", 0)) % len(x.shape)  # type: ignore[call-overload]
    if sizes is None:
        count = len(node.outputs)
        each = divide(x.shape[axis] + (count - 1), count)
        sizes = (*[each] * (count - 1), x.shape[axis] - each * (count - 1))
    at.program.require_sizes(sizes)
    at.program.require_equal(sum(sizes, dim(0)), x.shape[axis])
    start = dim(0)
    for value, length in zip(node.outputs, sizes, strict=True):
        shape = [*x.shape[:axis], length, *x.shape[axis + 1 :]]
        at.set(value, x.view(shape, x.strides, x.strides[axis] * start))
        start = start + length


@operator("Slice")
def slice_(at: Lowering, node: ir.Node) -> None:
    """A range of axes, as a view."""
    x = at.input(node, 0)
    starts, ends = (_numbers_of(at, node, i, "limits") for i in (1, 2))
    axes, steps = (_constants_of(at, node, i, w) for i, w in ((3, "axes"), (4, "steps")))
    assert x is not None
    assert starts is not None
    assert ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(axes) if steps is None else steps
    if x.values is not None:
        _slice_numbers(at, node, x, starts, ends, steps)
        return
    shape, strides, offset = list(x.shape), list(x.strides), dim(0)
    for given, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = given % len(shape)
        n = shape[axis]
        first, last = (bounded(start, n), bounded(end, n)) if step > 0 else _backwards(at, node, start, end, n)
        length = last - first if dim(0) == first or last == n else largest(last - first, 0)
        shape[axis] = divide(length + (abs(step) - 1), abs(step))
        offset = offset + strides[axis] * (first if step > 0 else last - 1)
        strides[axis] = strides[axis] * step
    view = x.view(shape, strides, offset)
    turned = min(steps, default=1) < 0
    at.set(node.outputs[0], copy(at, view, at.result(node.outputs[0], shape, x.dtype)) if turned else view)


def _backwards(at: Lowering, node: ir.Node, start: Dim, end: Dim, n: Dim) -> tuple[Dim, Dim]:
    """The same range from its other end: from behind `end` to `start`, which is the first element at least."""
    if start.constant is None or end.constant is None:
        raise at.refuse(node, "it steps backwards between computed places")
    first, last = (n if limit.constant == -1 else bounded(limit + 1, n) for limit in (end, start))
    return first, smallest(largest(last, 1), n)


def _slice_numbers(
    at: Lowering, node: ir.Node, x: Tensor, starts: Sequence[Dim], ends: Sequence[Dim], steps: Sequence[int]
) -> None:
    bounds = [starts[0].constant, ends[0].constant]
    if len(starts) != 1 or None in bounds or x.values is None:
        raise at.refuse(node, "its limits are not constant")
    at.set(node.outputs[0], at.numbers(x.values[slice(bounds[0], bounds[1], steps[0])], x.dtype))


@operator("Concat")
def concat(at: Lowering, node: ir.Node) -> None:
    """Tensors one after the other."""
    parts = [at.get(v) for v in node.inputs if v is not None]
    axis = int(at.attribute(node, "axis")) % max(len(parts[0].shape), 1)  # type: ignore[call-overload]
    if all(p.values is not None for p in parts):
        at.set(node.outputs[0], at.numbers([v for p in parts for v in p.values or ()], parts[0].dtype))
        return
    total = dim(0)
    for part in parts:
        total = total + part.shape[axis]
        for i in range(len(part.shape)):
            if i != axis:
                at.program.require_equal(part.shape[i], parts[0].shape[i])
    y = at.result(node.outputs[0], (*parts[0].shape[:axis], total, *parts[0].shape[axis + 1 :]), parts[0].dtype)
    start = dim(0)
    for part in parts:
        copy(at, part, y.view(part.shape, y.strides, y.strides[axis] * start))
        start = start + part.shape[axis]


@operator("Tile")
def tile(at: Lowering, node: ir.Node) -> None:
    """Repetitions of a tensor."""
    x, times = at.input(node, 0), _numbers_of(at, node, 1, "repeats")
    assert x is not None
    assert times is not None
    x = at.stored(x)
    shape = [s for n, t in zip(x.shape, times, strict=True) for s in (t, n)]
    strides = [s for stride in x.strides for s in (dim(0), stride)]
    y = at.result(node.outputs[0], [n * t for n, t in zip(x.shape, times, strict=True)], x.dtype)
    copy(at, x.view(shape, strides), y.view(shape, dense(tuple(shape))))


@operator("Pad")
def pad(at: Lowering, node: ir.Node) -> None:
    """A frame around a tensor: of one number, or of its own elements. Negative widths cut."""
    x, pads, axes = at.input(node, 0), _numbers_of(at, node, 1, "widths"), _constants_of(at, node, 3, "axes")
    assert x is not None
    assert pads is not None
    held = node.attributes.get("mode")
    mode, rank = held.as_string() if held is not None else "constant", len(x.shape)
    axes = list(range(rank)) if axes is None else [a % rank for a in axes]
    x, widths = at.stored(x), {}
    for axis, *given in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        cut = [dim(max(-(w.constant or 0), 0)) for w in given]
        x = _cut(at, x, axis, cut)
        widths[axis] = [w + c for w, c in zip(given, cut, strict=True)]
    widths = {axis: pair for axis, pair in widths.items() if pair != [dim(0), dim(0)]}
    at.program.require_sizes([w for pair in widths.values() for w in pair])
    if not widths:
        at.set(node.outputs[0], x)
    elif mode == "constant":
        _frame(at, node, x, widths)
    else:
        _repeat(at, node, x, widths, mode)


def _cut(at: Lowering, x: Tensor, axis: int, cut: Sequence[Dim]) -> Tensor:
    """Without so many elements at both ends of an axis."""
    size = x.shape[axis] - cut[0] - cut[1]
    at.program.require_sizes([size])
    return x.view([*x.shape[:axis], size, *x.shape[axis + 1 :]], x.strides, x.strides[axis] * cut[0])


def _wider(x: Tensor, widths: Mapping[int, Sequence[Dim]]) -> list[Dim]:
    return [sum(widths.get(i, ()), n) for i, n in enumerate(x.shape)]


def _frame(at: Lowering, node: ir.Node, x: Tensor, widths: Mapping[int, Sequence[Dim]]) -> None:
    number, y = at.input(node, 2), at.result(node.outputs[0], _wider(x, widths), x.dtype)
    if number is None:
        fill(at, y, "0")
    else:
        loop(at, "{a}", [number], y)
    start = sum((y.strides[axis] * front for axis, (front, _) in widths.items()), dim(0))
    copy(at, x, y.view(x.shape, y.strides, start))


def _repeat(at: Lowering, node: ir.Node, x: Tensor, widths: Mapping[int, Sequence[Dim]], mode: str) -> None:
    """One axis after the other: what is in front of it and behind is the ``edge``, a mirror image, or the other end."""
    for axis, (front, behind) in widths.items():
        n, step = x.shape[axis], x.strides[axis]
        last = axis == list(widths)[-1]
        shape = _wider(x, {axis: (front, behind)})
        y = at.result(node.outputs[0], shape, x.dtype) if last else at.program.tensor(shape, x.dtype)
        copy(at, x, y.view(x.shape, y.strides, y.strides[axis] * front))
        sources, turned, most = {
            "edge": ((dim(0), n - 1), 0, None),
            "reflect": ((front, n - 2), -1, n - 1),
            "wrap": ((n - front, dim(0)), 1, n),
        }[mode]
        for source, width, target in zip(sources, (front, behind), (dim(0), front + n), strict=True):
            if width == dim(0):
                continue
            at.program.require_within(*((1, n) if most is None else (width, most)))
            part = [*x.shape[:axis], width, *x.shape[axis + 1 :]]
            strides = [*x.strides[:axis], step * turned, *x.strides[axis + 1 :]]
            copy(at, x.view(part, strides, step * source), y.view(part, y.strides, y.strides[axis] * target))
        x = y
