"""Convolution and pooling of images."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.products import Tail, product_of
from qc.backends.tvm.pack import pack_columns
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, divide
from qc.ir.quant import Weight, read_weight

__all__ = ["average_pool", "convolution", "max_pool"]


def _window(at: Lowering, node: ir.Node, kernel: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and padding (begin and end of each axis) of two axes."""
    rank = len(kernel)
    automatic = node.attributes.get("auto_pad")
    if rank != 2 or (automatic is not None and automatic.as_string() not in ("NOTSET", "VALID")):
        raise at.refuse(node, "it is not over two axes, or pads by a rule")
    strides = [int(i) for i in at.attribute(node, "strides", [1] * rank)]  # type: ignore[attr-defined]
    dilations = [int(i) for i in at.attribute(node, "dilations", [1] * rank)]  # type: ignore[attr-defined]
    pads = [int(i) for i in at.attribute(node, "pads", [0] * (2 * rank))]  # type: ignore[attr-defined]
    return strides, dilations, pads


def _places(size: Dim, kernel: int, stride: int, dilation: int, begin: int, end: int, ceil: bool = False) -> Dim:
    left = size + (begin + end - dilation * (kernel - 1) - 1 + (stride - 1 if ceil else 0))
    return divide(left, stride) + 1


@operator("Conv")
def convolution(at: Lowering, node: ir.Node) -> None:
    """Patches as rows, times the weight; or, with one channel to a group, directly.

    ``y[b, o, p] = sum_{c, i, j} x[b, c, p * stride + (i, j) * dilation - pad] w[o, c, i, j] + bias[o]``
    """
    x, weight, bias = at.input(node, 0), read_weight(node.inputs[1]), at.input(node, 2)
    assert x is not None
    if weight is None or len(weight.shape) != 4:
        raise at.refuse(node, "its weight is computed, or not over two axes")
    out, each, *kernel = weight.shape
    groups = int(at.attribute(node, "group", 1))  # type: ignore[call-overload]
    strides, dilations, pads = _window(at, node, tuple(kernel))
    batch, channels, height, width = x.shape
    places = [
        _places(n, kernel[i], strides[i], dilations[i], pads[i], pads[i + 2]) for i, n in enumerate((height, width))
    ]
    y = at.result(node.outputs[0], (batch, out, *places))
    numbers = ", ".join(map(str, (*kernel, *strides, *dilations, *pads[:2])))
    x = at.contiguous(x)
    if each == 1 and groups > 1:
        _depthwise(at, x, weight, bias, y, groups, numbers)
        return
    at.program.use("patches")
    columns, rows = each * math.prod(kernel), batch * places[0] * places[1]
    wide = at.isa.tile[1]
    unit = wide * at.isa.lanes
    for g in range(groups):
        patches = at.program.tensor((rows, columns))
        at.program.add(
            f"patches({x.c}, {patches.c}, {batch.c}, {channels.c}, {g * each}, {each}, {height.c}, {width.c}, "
            f"{places[0].c}, {places[1].c}, {numbers});",
            [x],
            [patches],
        )
        packed = _packed(at, weight, g, out // groups, columns, unit)
        product = at.program.tensor((batch, places[0] * places[1], out // groups))
        part = None if bias is None else at.contiguous(bias).view((out // groups,), (1,), g * (out // groups))
        product_of(at, patches, packed, "f32", wide, columns, part, Tail(node.outputs[0], None, "none"), product)
        at.program.use("turn")
        at.program.add(
            f"turn({product.c}, {y.c}, {batch.c}, {(places[0] * places[1]).c}, {out // groups}, {out}, "
            f"{g * (out // groups)});",
            [product],
            [y],
        )


def _packed(at: Lowering, weight: Weight, group: int, rows: int, columns: int, unit: int) -> Tensor:
    count = -(-rows // unit) * unit * columns

    def make() -> np.ndarray:
        matrix = np.asarray(weight.numpy(), np.float32).reshape(-1, columns)[group * rows : (group + 1) * rows]
        packed = pack_columns(matrix, unit)
        weight.release()
        return packed

    return at.program.constant((weight.value, "conv", group), make, 4 * count, (count,), ir.DataType.UINT8)


def _depthwise(
    at: Lowering, x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, groups: int, numbers: str
) -> None:
    size = math.prod(weight.shape)

    def make() -> np.ndarray:
        return np.ascontiguousarray(weight.numpy(), np.float32)

    held = at.program.constant((weight.value, "depthwise"), make, 4 * size, weight.shape, ir.DataType.FLOAT)
    extra = [] if bias is None else [at.contiguous(bias)]
    at.program.use("depthwise")
    at.program.add(
        f"depthwise({x.c}, {held.c}, {extra[0].c if extra else 'NULL'}, {y.c}, {x.shape[0].c}, {groups}, "
        f"{weight.shape[0] // groups}, {x.shape[2].c}, {x.shape[3].c}, {y.shape[2].c}, {y.shape[3].c}, {numbers});",
        [x, *extra],
        [y],
    )


@operator("MaxPool")
def max_pool(at: Lowering, node: ir.Node) -> None:
    """The largest number of each window."""
    _pool(at, node, "1")


@operator("AveragePool")
def average_pool(at: Lowering, node: ir.Node) -> None:
    """The mean of each window."""
    _pool(at, node, "2" if at.attribute(node, "count_include_pad", 0) else "0")


def _pool(at: Lowering, node: ir.Node, kind: str) -> None:
    x = at.input(node, 0)
    assert x is not None
    kernel = tuple(int(i) for i in at.attribute(node, "kernel_shape"))  # type: ignore[attr-defined]
    strides, dilations, pads = _window(at, node, kernel)
    if any(v.uses() for v in node.outputs[1:]) or len(x.shape) != 4:
        raise at.refuse(node, "its indices are read, or it is not over images")
    ceil = bool(at.attribute(node, "ceil_mode", 0))
    places = [
        _places(n, kernel[i], strides[i], dilations[i], pads[i], pads[i + 2], ceil) for i, n in enumerate(x.shape[2:])
    ]
    x = at.contiguous(x)
    y = at.result(node.outputs[0], (*x.shape[:2], *places))
    numbers = ", ".join(map(str, (*kernel, *strides, *dilations, *pads)))
    at.program.use("pool")
    at.program.add(
        f"pool({kind}, {x.c}, {y.c}, {(x.shape[0] * x.shape[1]).c}, {x.shape[2].c}, {x.shape[3].c}, {places[0].c}, "
        f"{places[1].c}, {numbers});",
        [x],
        [y],
    )
