"""Normalization, softmax and reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.c_loops import REDUCTIONS
from qc.backends.tvm.kernels.rows import normalize, softmax
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.elementwise import per_channel
from qc.backends.tvm.ops.loops import copy, fill, loop
from qc.backends.tvm.program import Tensor, dense
from qc.backends.tvm.shapes import dim, product, smallest

__all__ = [
    "arg_max",
    "cum_sum",
    "global_pool",
    "instance_normalization",
    "normalization",
    "reduce",
    "softmax_",
    "top_k",
]


@operator("RMSNormalization", "LayerNormalization")
def normalization(at: Lowering, node: ir.Node) -> None:
    """Normalization of the last axes."""
    x, weight, bias = at.input(node, 0), at.input(node, 1), at.input(node, 2)
    assert x is not None
    axis = int(at.attribute(node, "axis", -1)) % len(x.shape)  # type: ignore[call-overload]
    if x.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, f"it normalizes {x.dtype.name}")
    for held in (weight, bias):
        if held is not None and held.shape != x.shape[axis:]:
            raise at.refuse(node, "its gain does not have the shape of what it normalizes")
    y = at.result(node.outputs[0], x.shape)
    if axis < len(x.shape) - 1:
        shape = (product(x.shape[:axis]), product(x.shape[axis:]))
        x = at.contiguous(x).view(shape, dense(shape))
    _normalize(at, node, x, weight, bias, y)


def _normalize(at: Lowering, node: ir.Node, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    eps = at.program.array(np.array([at.attribute(node, "epsilon", 1e-5)], np.float32))
    x, m, n, ldx = at.rows(x)
    extra = [at.contiguous(t) for t in (weight, bias) if t is not None]
    kind = "rms" if node.op_type.startswith("RMS") else "layer"
    name = at.program.kernel(
        kind, normalize, kind, weight is not None, bias is not None, pointers=3 + len(extra), integers=3
    )
    at.program.call(name, [x, y, eps, *extra], [n, ldx, n], m, writes=[y])


@operator("InstanceNormalization")
def instance_normalization(at: Lowering, node: ir.Node) -> None:
    """Normalization of each channel of each image."""
    x, scale, bias = (at.get(v) for v in node.inputs if v is not None)
    if x.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, f"it normalizes {x.dtype.name}")
    for held in (scale, bias):
        at.program.require_equal(held.shape[0], x.shape[1])
    count = product(x.shape[2:])
    x = at.contiguous(x)
    normal = at.program.tensor(x.shape)
    rows = x.view((x.shape[0] * x.shape[1], count), (count, 1))
    _normalize(at, node, rows, None, None, normal)
    factors = [per_channel(x, t) for t in (scale, bias)]
    loop(at, "{a} * {b} + {c}", [normal, *factors], at.result(node.outputs[0], x.shape))


@operator("Softmax")
def softmax_(at: Lowering, node: ir.Node) -> None:
    """Softmax of one axis."""
    x = at.input(node, 0)
    assert x is not None
    axis = int(at.attribute(node, "axis", -1)) % len(x.shape)  # type: ignore[call-overload]
    turned, m, n, ldx = at.rows(x.with_last(axis))
    last = axis == len(x.shape) - 1
    y = at.result(node.outputs[0], x.shape) if last else at.program.tensor(turned.shape)
    name = at.program.kernel("softmax", softmax, pointers=2, integers=3)
    at.program.call(name, [turned, y], [n, ldx, n], m, writes=[y])
    if not last:
        at.set(node.outputs[0], y.with_last_at(axis))


@operator(*REDUCTIONS)
def reduce(at: Lowering, node: ir.Node) -> None:
    """One number of some axes."""
    x, axes = at.input(node, 0), at.input(node, 1)
    assert x is not None
    x = at.stored(x)
    rank = len(x.shape)
    held: Any = at.attribute(node, "axes", ())
    if axes is not None:
        if axes.values is None or any(v.constant is None for v in axes.values):
            raise at.refuse(node, "its axes are computed")
        held = [v.constant for v in axes.values]
    every = not held and not at.attribute(node, "noop_with_empty_axes", 0)
    gone = list(range(rank)) if every else [int(a) % rank for a in held]
    keep = [i for i in range(rank) if i not in gone]
    with_ones = bool(at.attribute(node, "keepdims", 1))
    shape = [dim(1) if i in gone else x.shape[i] for i in range(rank)] if with_ones else [x.shape[i] for i in keep]
    y = at.result(node.outputs[0], shape, x.dtype)
    order = keep + gone
    turned = x.along(order)
    at.program.reduce(node.op_type, turned, len(keep), y)


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(at: Lowering, node: ir.Node) -> None:
    """The mean or the largest element of each channel."""
    x = at.input(node, 0)
    assert x is not None
    y = at.result(node.outputs[0], (*x.shape[:2], *[1] * (len(x.shape) - 2)))
    at.program.reduce("ReduceMean" if node.op_type == "GlobalAveragePool" else "ReduceMax", at.stored(x), 2, y)


@operator("ArgMax")
def arg_max(at: Lowering, node: ir.Node) -> None:
    """The index of the largest element of an axis, the first of equals."""
    x = at.input(node, 0)
    assert x is not None
    axis = int(at.attribute(node, "axis", 0)) % len(x.shape)  # type: ignore[call-overload]
    if at.attribute(node, "select_last_index", 0):
        raise at.refuse(node, "it takes the last of equals")
    x = at.stored(x)
    keep = [i for i in range(len(x.shape)) if i != axis]
    turned = at.contiguous(x.with_last(axis))
    shape = list(x.shape)
    shape[axis] = dim(1)
    if not at.attribute(node, "keepdims", 1):
        shape = [x.shape[i] for i in keep]
    y = at.result(node.outputs[0], shape, ir.DataType.INT64)
    at.program.top_k(turned, at.program.tensor(y.shape, x.dtype), y, dim(1), largest=True)


@operator("CumSum")
def cum_sum(at: Lowering, node: ir.Node) -> None:
    """Running sums of an axis, from its first element or its last, with the element itself or without."""
    x, axis = at.input(node, 0), at.input(node, 1)
    assert x is not None
    number = axis.values[0].constant if axis is not None and axis.values is not None else None
    if number is None:
        raise at.refuse(node, "its axis is computed")
    number %= len(x.shape)
    back = bool(at.attribute(node, "reverse", 0))
    x = at.contiguous(_reversed(at.stored(x), number) if back else x)
    if at.attribute(node, "exclusive", 0):
        x = _behind_zero(at, x, number)
    y = at.program.tensor(x.shape, x.dtype) if back else at.result(node.outputs[0], x.shape, x.dtype)
    at.program.cum_sum(x, y, number)
    if back:
        copy(at, _reversed(y, number), at.result(node.outputs[0], x.shape, x.dtype))


def _reversed(x: Tensor, axis: int) -> Tensor:
    """An axis from its end, as a view."""
    step = x.strides[axis]
    strides = [*x.strides[:axis], step * -1, *x.strides[axis + 1 :]]
    return x.view(x.shape, strides, step * (x.shape[axis] - 1))


def _behind_zero(at: Lowering, x: Tensor, axis: int) -> Tensor:
    """All elements of an axis but the last, behind a zero."""
    first = smallest(x.shape[axis], 1)
    part = [*x.shape[:axis], x.shape[axis] - first, *x.shape[axis + 1 :]]
    y = at.program.tensor(x.shape, x.dtype)
    fill(at, y, "0")
    copy(at, x.view(part, x.strides), y.view(part, y.strides, y.strides[axis] * first))
    return y


@operator("TopK")
def top_k(at: Lowering, node: ir.Node) -> None:
    """The largest or smallest elements of an axis in order, with their places."""
    x, k = at.input(node, 0), at.input(node, 1)
    assert x is not None
    count = k.values[0] if k is not None and k.values is not None else None
    axis = int(at.attribute(node, "axis", -1)) % len(x.shape)  # type: ignore[call-overload]
    if count is None:
        raise at.refuse(node, "its count is computed")
    x, last = at.stored(x), axis == len(x.shape) - 1
    x = at.contiguous(x.with_last(axis))
    at.program.require_within(count, x.shape[-1])
    shape = (*x.shape[:-1], count)
    found = [
        at.result(value, shape, dtype) if last else at.program.tensor(shape, dtype)
        for value, dtype in zip(node.outputs, (x.dtype, ir.DataType.INT64), strict=True)
    ]
    at.program.top_k(x, *found, count, largest=bool(at.attribute(node, "largest", 1)))
    if not last:
        for value, y in zip(node.outputs, found, strict=True):
            at.set(value, y.with_last_at(axis))
