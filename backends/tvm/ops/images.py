"""Convolution and pooling of images. A signal over one axis is an image of one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.elementwise import per_channel
from qc.backends.tvm.ops.loops import fill, loop
from qc.backends.tvm.ops.products import Tail, product_of
from qc.backends.tvm.pack import pack_columns
from qc.backends.tvm.program import Tensor, dense
from qc.backends.tvm.shapes import Dim, dim
from qc.backends.tvm.windows import AXES, Window
from qc.ir.quant import Weight, read_weight

__all__ = ["as_image", "average_pool", "convolution", "max_pool", "transposed_convolution", "window_of"]


def as_image(x: Tensor) -> Tensor:
    """A tensor without gaps, whose first two axes are batch and channels, as images."""
    shape = (*x.shape[:2], *[dim(1)] * (2 + AXES - len(x.shape)), *x.shape[2:])
    return x.view(shape, dense(shape))


def window_of(at: Lowering, node: ir.Node, x: Tensor, sizes: Sequence[int]) -> Window:
    """The window of a node that moves over the last axes of x."""
    steps, rank, rule = _steps(at, node, x, sizes), len(sizes), _rule(node)
    if rule.startswith("SAME"):
        axes = zip(as_image(x).shape[2:], *steps, strict=True)
        return _distributed(steps, [_missing(at, node, *axis) for axis in axes], rule)
    none = [0] * (2 * rank)
    pads: list[int] = at.attribute(node, "pads", none) if rule == "NOTSET" else none  # type: ignore[assignment]
    return Window(*steps, _pair(pads[:rank], 0), _pair(pads[rank:], 0))


_Steps = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def _steps(at: Lowering, node: ir.Node, x: Tensor, sizes: Sequence[int]) -> _Steps:
    """Sizes, strides and dilations of a window."""
    rank = len(sizes)
    if not 1 <= rank <= AXES or len(x.shape) != 2 + rank or x.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, "it is not over one or two axes of float32")
    strides, dilations = (_pair(at.attribute(node, n, [1] * rank), 1) for n in ("strides", "dilations"))  # type: ignore[arg-type]
    return _pair(sizes, 1), strides, dilations


def _pair(numbers: Sequence[int], absent: int) -> tuple[int, int]:
    first, second = (*[absent] * (AXES - len(numbers)), *map(int, numbers))
    return first, second


def _rule(node: ir.Node) -> str:
    held = node.attributes.get("auto_pad")
    return held.as_string() if held is not None else "NOTSET"


def _distributed(steps: _Steps, total: Sequence[int], rule: str) -> Window:
    """A window with so much padding along each axis, an odd element in front unless the rule is ``SAME_UPPER``."""
    less, more = _pair([t // 2 for t in total], 0), _pair([t - t // 2 for t in total], 0)
    return Window(*steps, *((less, more) if rule == "SAME_UPPER" else (more, less)))


def _missing(at: Lowering, node: ir.Node, n: Dim, size: int, stride: int, dilation: int) -> int:
    """The padding with which there are ``ceil(n / stride)`` places."""
    reach = dilation * (size - 1) + 1
    if stride == 1:
        return reach - 1
    if n.constant is None:
        raise at.refuse(node, "it pads an image of unknown size by a rule")
    return max((-(-n.constant // stride) - 1) * stride + reach - n.constant, 0)


@operator("Conv")
def convolution(at: Lowering, node: ir.Node) -> None:
    """Patches as rows, times the weight; or, with one channel to a group, directly.

    ``y[b, o, p] = sum_{c, i, j} x[b, c, p * stride + (i, j) * dilation - pad] w[o, c, i, j] + bias[o]``
    """
    x, weight, bias = at.input(node, 0), read_weight(node.inputs[1]), at.input(node, 2)
    assert x is not None
    if weight is None:
        raise at.refuse(node, "its weight is computed")
    out, each, *sizes = weight.shape
    groups = int(at.attribute(node, "group", 1))  # type: ignore[call-overload]
    window, rank = window_of(at, node, x, sizes), len(sizes)
    x = as_image(at.contiguous(x))
    batch, channels, height, width = x.shape
    at.program.require_equal(channels, each * groups)
    places = window.places((height, width))
    y = as_image(at.result(node.outputs[0], (batch, out, *places[-rank:])))
    if each == 1 and groups > 1:
        _depthwise(at, x, weight, bias, y, groups, window)
        return
    at.program.use("patches")
    columns, rows = weight.matrix[1], batch * places[0] * places[1]
    for g in range(groups):
        patches = at.program.tensor((rows, columns))
        at.program.add(
            f"patches({x.c}, {patches.c}, {batch.c}, {channels.c}, {g * each}, {each}, {height.c}, {width.c}, "
            f"{places[0].c}, {places[1].c}, {window.c});",
            [x],
            [patches],
        )

        def matrix(held: np.ndarray, g: int = g) -> np.ndarray:
            return held.reshape(groups, -1, columns)[g]

        product = at.program.tensor((batch, places[0] * places[1], out // groups))
        part = None if bias is None else at.contiguous(bias).view((out // groups,), (1,), g * (out // groups))
        _multiply(at, node, patches, weight, g, matrix, columns, part, product)
        at.program.use("turn")
        at.program.add(
            f"turn({product.c}, {y.c}, {batch.c}, {(places[0] * places[1]).c}, {out // groups}, {out}, "
            f"{g * (out // groups)});",
            [product],
            [y],
        )


def _multiply(
    at: Lowering, node: ir.Node, x: Tensor, weight: Weight, group: int, matrix: Callable[[np.ndarray], np.ndarray],
    columns: int, bias: Tensor | None, y: Tensor,
) -> None:  # fmt: skip
    """Rows times the weight of a group, of which `matrix` takes the rows of `columns` numbers."""
    rows, wide = y.shape[-1].constant, at.isa.tile[1]
    assert rows is not None
    unit = wide * at.isa.lanes
    count = -(-rows // unit) * unit * columns

    def make() -> np.ndarray:
        packed = pack_columns(matrix(np.asarray(weight.numpy(), np.float32)), unit)
        weight.release()
        return packed

    key = (weight.value, node.op_type, rows, columns, group)
    packed = at.program.constant(key, make, 4 * count, (count,), ir.DataType.UINT8)
    product_of(at, x, packed, "f32", wide, columns, bias, Tail(node.outputs[0], None, "none"), y)


def _depthwise(
    at: Lowering, x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, groups: int, window: Window
) -> None:
    size = weight.matrix[0] * weight.matrix[1]

    def make() -> np.ndarray:
        return np.ascontiguousarray(weight.numpy(), np.float32)

    held = at.program.constant((weight.value, "depthwise"), make, 4 * size, weight.shape, ir.DataType.FLOAT)
    extra = [] if bias is None else [at.contiguous(bias)]
    at.program.use("depthwise")
    at.program.add(
        f"depthwise({x.c}, {held.c}, {extra[0].c if extra else 'NULL'}, {y.c}, {x.shape[0].c}, {groups}, "
        f"{weight.shape[0] // groups}, {x.shape[2].c}, {x.shape[3].c}, {y.shape[2].c}, {y.shape[3].c}, {window.c});",
        [x, *extra],
        [y],
    )


@operator("ConvTranspose")
def transposed_convolution(at: Lowering, node: ir.Node) -> None:
    """Pixels as rows, times the weight; what comes out is added to the windows of the result.

    ``y[b, o, p * stride + (i, j) * dilation - pad] = sum_{c, p, i, j} x[b, c, p] w[c, o, i, j] + bias[o]``
    """
    x, weight, bias = at.input(node, 0), read_weight(node.inputs[1]), at.input(node, 2)
    assert x is not None
    if weight is None:
        raise at.refuse(node, "its weight is computed")
    inner, each, *sizes = weight.shape
    groups = int(at.attribute(node, "group", 1))  # type: ignore[call-overload]
    more = _pair(at.attribute(node, "output_padding", [0] * len(sizes)), 0)  # type: ignore[arg-type]
    window = _window_of_result(at, node, x, sizes, more)
    image = as_image(at.contiguous(x))
    batch, channels, *places = image.shape
    at.program.require_equal(channels, inner)
    covered = window.covered(places, more)
    y = as_image(at.result(node.outputs[0], (batch, each * groups, *covered[-len(sizes) :])))
    at.program.use("spread")
    if bias is None:
        fill(at, y, "0")
    else:
        loop(at, "{a}", [per_channel(y, bias)], y)
    columns, pixels = inner // groups, places[0] * places[1]
    for g in range(groups):

        def matrix(held: np.ndarray, g: int = g) -> np.ndarray:
            return held.reshape(groups, columns, -1)[g].T

        rows = image.view((batch, pixels, columns), (channels * pixels, 1, pixels), pixels * (g * columns))
        product = at.program.tensor((batch, pixels, each * window.sizes[0] * window.sizes[1]))
        _multiply(at, node, rows, weight, g, matrix, columns, None, product)
        numbers = ", ".join(s.c for s in (*y.shape[2:], *places))
        at.program.add(
            f"spread({product.c}, {y.c}, {batch.c}, {each * groups}, {g * each}, {each}, {numbers}, {window.c});",
            [product],
            [y],
        )


def _window_of_result(at: Lowering, node: ir.Node, x: Tensor, sizes: Sequence[int], more: tuple[int, int]) -> Window:
    """The window that moves over the result of a transposed convolution, padded as its size wants if that is given."""
    steps, rule = _steps(at, node, x, sizes), _rule(node)
    places = as_image(x).shape[2:]
    given: list[int] | None = at.attribute(node, "output_shape")  # type: ignore[assignment]
    if given is not None:
        wanted = list(map(dim, _pair(given, 1)))
    elif rule.startswith("SAME"):
        wanted = [n * stride for n, stride in zip(places, steps[1], strict=True)]
    else:
        return window_of(at, node, x, sizes)
    whole = Window(*steps, (0, 0), (0, 0)).covered(places, more)
    total = [(size - least).constant for size, least in zip(whole, wanted, strict=True)]
    if any(t is None or t < 0 for t in total):
        raise at.refuse(node, "its padding follows from sizes that are unknown, or that no window reaches")
    return _distributed(steps, [t for t in total if t is not None], rule)


@operator("MaxPool")
def max_pool(at: Lowering, node: ir.Node) -> None:
    """The largest number of each window."""
    _pool(at, node, "largest")


@operator("AveragePool")
def average_pool(at: Lowering, node: ir.Node) -> None:
    """The mean of each window."""
    _pool(at, node, "padded" if at.attribute(node, "count_include_pad", 0) else "inside")


def _pool(at: Lowering, node: ir.Node, kind: str) -> None:
    x, sizes = at.input(node, 0), node.attributes["kernel_shape"].as_ints()
    assert x is not None
    window = window_of(at, node, x, sizes)
    image = as_image(at.contiguous(x))
    places = window.places(image.shape[2:], ceil=bool(at.attribute(node, "ceil_mode", 0)))
    y = at.result(node.outputs[0], (*x.shape[:2], *places[-len(sizes) :]))
    at.program.pool(kind, window, image, as_image(y))
