"""Tracers of operators that move channels and leave their numbers as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qc.ir._channels_table import Rule
from qc.ir._channels_trace import Trace, register
from qc.ir._channels_view import View, dims_of, reshape, transpose

__all__ = ["attribute", "integers", "numbers"]

_SMALL = 4096
"""Elements; a constant that steers an operator (axes, sizes, an exponent) is never larger."""


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """The value of an attribute, or `default`."""
    held = node.attributes.get(name)
    return default if held is None else held.value


def numbers(value: ir.Value | None) -> np.ndarray | None:
    """The entries of a small constant, else None; no weight is read."""
    if value is None or value.is_graph_input():
        return None
    tensor, node = value.const_value, value.producer()
    if tensor is None and node is not None and node.op_type == "Constant":
        held = next(iter(node.attributes.values()))
        if held.type != ir.AttributeType.TENSOR:
            return np.asarray(held.value).reshape(-1)
        tensor = held.as_tensor()
    return tensor.numpy().reshape(-1) if tensor is not None and tensor.size <= _SMALL else None


def integers(value: ir.Value | None) -> list[int] | None:
    """The entries of a small constant of integers, else None."""
    held = numbers(value)
    return [int(i) for i in held] if held is not None and held.dtype.kind in "iu" else None


def _start(trace: Trace, node: ir.Node) -> View | None:
    """The view of the first operand; a constant that has none yet gets one over its last axis, where channels lie."""
    value = node.inputs[0]
    view = trace.views.get(value)
    if view is not None or not trace.is_constant(value) or not _floating(value):
        return view
    return _constant_view(trace, node, 0)


def _constant_view(trace: Trace, node: ir.Node, slot: int) -> View | None:
    dims = dims_of(node.inputs[slot])
    wide = [a for a, d in enumerate(dims or ()) if d != 1]
    if not wide:
        return None
    axes = [wide[-1]]
    ids = trace.parameter(node, slot, "producer", axes)
    return View.of(axes, ids)


def _floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


@register("transpose")
def _transpose(trace: Trace, node: ir.Node, rule: Rule) -> None:
    perm = attribute(node, "perm")
    dims = dims_of(node.inputs[0])
    if perm is None and dims is None:
        trace.opaque(node)
        return
    perm = list(perm) if perm is not None else list(range(len(dims)))[::-1]
    trace.set(node.outputs[0], transpose(trace.views[node.inputs[0]], perm))


@register("reshape")
def _reshape(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view = trace.views.get(node.inputs[0])
    if view is None:
        return
    before, after = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    moved = reshape(view, before, after) if before is not None and after is not None else None
    if moved is None:
        trace.opaque(node)
        return
    trace.limit(moved.ids, node.op_type, node)
    trace.set(node.outputs[0], moved)


@register("expand")
def _expand(trace: Trace, node: ir.Node, rule: Rule) -> None:
    before, after = dims_of(node.inputs[0]), dims_of(node.outputs[0])
    if before is None or after is None:
        trace.opaque(node)
        return
    view = _start(trace, node)
    if view is None:
        return
    added = len(after) - len(before)
    axes = [a + added for a in view.axes]
    if any(after[a] != before[a - added] for a in axes):
        trace.opaque(node)
        return
    trace.set(node.outputs[0], View(tuple(axes), view.ids))


@register("concat")
def _concat(trace: Trace, node: ir.Node, rule: Rule) -> None:
    if not any(v in trace.views for v in node.inputs):
        return
    rank = len(dims_of(node.outputs[0]) or ())
    known = [trace.views[v].axes for v in node.inputs if v in trace.views]
    axis = int(attribute(node, "axis")) % max(rank, 1)
    axes = tuple(sorted({a for k in known for a in k}))
    parts = []
    for slot, value in enumerate(node.inputs):
        if value not in trace.views and trace.is_constant(value):
            dims = dims_of(value)
            static = dims is not None and all(isinstance(dims[a], int) for a in axes)
            parts.append(trace.parameter(node, slot, "producer", axes) if static else None)
        else:
            parts.append(trace.channels(value, axes, node))
    if rank == 0 or any(p is None for p in parts):
        trace.opaque(node, "mixed axes")
        return
    if axis in axes:
        ids = np.concatenate(parts, axis=axes.index(axis))
        trace.limit(ids, "Concat", node)
    else:
        ids = parts[0]
        for part in parts[1:]:
            trace.tie(ids, part)
    trace.set(node.outputs[0], View.of(axes, ids))


@register("split")
def _split(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view = trace.views[node.inputs[0]]
    dims = dims_of(node.inputs[0])
    axis = int(attribute(node, "axis", 0)) % len(dims)
    if axis not in view.axes:
        for out in node.outputs:
            trace.set(out, view)
        return
    lengths = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if lengths is None:
        chunk = -(-dims[axis] // len(node.outputs))
        lengths = [min(chunk, dims[axis] - i * chunk) for i in range(len(node.outputs))]
    trace.limit(view.ids, "Split", node)
    start, along = 0, view.axes.index(axis)
    for out, length in zip(node.outputs, lengths, strict=True):
        trace.set(out, View.of(view.axes, np.take(view.ids, range(start, start + length), axis=along)))
        start += length


@register("slice")
def _slice(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view = trace.views[node.inputs[0]]
    dims = dims_of(node.inputs[0])
    starts, ends, axes, steps = [*map(integers, node.inputs[1:]), None, None, None, None][:4]
    if len(node.inputs) > 3 and axes is None:
        trace.opaque(node)
        return
    touched = axes if axes is not None else list(range(len(starts) if starts is not None else len(dims)))
    touched = [a % len(dims) for a in touched]
    ids = view.ids
    for i, axis in enumerate(touched):
        if axis not in view.axes:
            continue
        if starts is None or ends is None or (len(node.inputs) > 4 and steps is None):
            trace.opaque(node)
            return
        step = 1 if steps is None else steps[i]
        index = range(dims[axis])[slice(starts[i], None if step < 0 and ends[i] < -dims[axis] else ends[i], step)]
        ids = np.take(ids, index, axis=view.axes.index(axis))
    if ids is not view.ids:
        trace.limit(view.ids, "Slice", node)
    trace.set(node.outputs[0], View.of(view.axes, ids))


@register("gather")
def _gather(trace: Trace, node: ir.Node, rule: Rule) -> None:
    data, index = node.inputs
    axis = int(attribute(node, "axis", 0))
    dims, rank = dims_of(data), len(dims_of(index) or ())
    if dims is None or dims_of(index) is None:
        trace.opaque(node)
        return
    axis %= len(dims)
    view = trace.views.get(data)
    if view is None:
        if not (trace.is_constant(data) and _floating(data)) or len(dims) < 2 or axis != 0:
            return
        # A table: every row is an embedding.
        axes = [a for a in range(1, len(dims)) if dims[a] != 1]
        if axes:
            ids = trace.parameter(node, 0, "producer", axes)
            trace.set(node.outputs[0], View.of([a - 1 + rank for a in axes], ids))
        return
    if axis in view.axes:
        chosen = integers(index)
        if chosen is None or not _regular(chosen, dims[axis]):
            trace.opaque(node)
            return
        ids = np.take(view.ids, np.array(chosen).reshape(dims_of(index)), axis=view.axes.index(axis))
        axes = _shifted([a for a in view.axes if a < axis], 0)
        axes += list(range(axis, axis + rank)) + _shifted([a for a in view.axes if a > axis], rank - 1)
        trace.limit(view.ids, "Slice", node)
        trace.set(node.outputs[0], View.of(axes, ids))
        return
    axes = [a if a < axis else a + rank - 1 for a in view.axes]
    trace.set(node.outputs[0], View(tuple(axes), view.ids))


def _regular(chosen: Sequence[int], size: object) -> bool:
    """Whether all channels are chosen, or a range of them.

    Others would divide the channels of everything that they move together with into those chosen and those not.
    """
    return len(set(chosen)) == size or len(np.unique(np.diff(chosen))) <= 1


@register("gathernd")
def _gathernd(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view, index = trace.views.get(node.inputs[0]), dims_of(node.inputs[1])
    if view is None or index is None or not isinstance(index[-1], int) or attribute(node, "batch_dims", 0):
        trace.opaque(node)
        return
    depth, moved = index[-1], len(index) - 1
    axes, ids = [a - depth + moved for a in view.axes if a >= depth], view.ids
    if view.axes[0] < depth:
        chosen = integers(node.inputs[1])
        if depth != 1 or chosen is None:
            trace.opaque(node)
            return
        ids = np.take(ids, np.array(chosen).reshape(index[:-1]), axis=0)
        axes = [*range(moved), *axes]
        trace.limit(view.ids, "GatherND", node)
    trace.set(node.outputs[0], View.of(axes, ids))


def _shifted(axes: Sequence[int], by: int) -> list[int]:
    return [a + by for a in axes]


@register("shape")
def _shape(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view = trace.views[node.inputs[0]]
    rank = len(dims_of(node.inputs[0]) or ())
    first, last = int(attribute(node, "start", 0)), int(attribute(node, "end", rank))
    read = range(rank)[first:last]
    if any(a in read for a in view.axes):
        trace.limit(view.ids, "Shape", node)


@register("pad")
def _pad(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view = trace.views[node.inputs[0]]
    rank = len(dims_of(node.inputs[0]))
    pads = integers(node.inputs[1])
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(rank))
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    held = numbers(filler)
    zero = filler is None or (held is not None and not held.any())
    plain = pads is not None and (not any(pads) or (zero and attribute(node, "mode", "constant") == "constant"))
    if not plain or axes is None:
        trace.opaque(node)
        return
    if any(axes[i % len(axes)] % rank in view.axes and p for i, p in enumerate(pads)):
        trace.opaque(node)
        return
    if any(pads):
        trace.limit(view.ids, "Pad", node)
    trace.set(node.outputs[0], view)


@register("reduce")
def _reduce(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view = trace.views[node.inputs[0]]
    rank = len(dims_of(node.inputs[0]))
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    if axes is None:
        trace.opaque(node, "reduced")
        return
    axes = sorted(a % rank for a in axes)
    if set(axes) & set(view.axes):
        trace.limit(view.ids, "reduced", node)
        return
    trace.limit(view.ids, node.op_type, node)
    kept = bool(attribute(node, "keepdims", 1))
    moved = view.axes if kept else tuple(a - sum(r < a for r in axes) for a in view.axes)
    trace.set(node.outputs[0], View(moved, view.ids))


@register("pool")
def _pool(trace: Trace, node: ir.Node, rule: Rule) -> None:
    view = trace.views[node.inputs[0]]
    if view.axes != (1,):
        trace.opaque(node)
        return
    trace.limit(view.ids, node.op_type, node)
    padded = any(attribute(node, "pads", ())) or str(attribute(node, "auto_pad", "NOTSET")) not in ("NOTSET", "VALID")
    if node.op_type == "AveragePool" and padded and attribute(node, "count_include_pad", 0):
        trace.limit(view.ids, "AveragePool:padded", node)
    trace.set(node.outputs[0], view)
