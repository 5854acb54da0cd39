"""Convolution and pooling of images. A signal over one axis is an image of one row, an image of two is one deep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.elementwise import per_channel
from qc.backends.tvm.ops.loops import fill, loop
from qc.backends.tvm.ops.products import Tail, product_of
from qc.backends.tvm.pack import pack_columns
from qc.backends.tvm.program import Tensor, dense
from qc.backends.tvm.shapes import Dim, dim, listed, product
from qc.backends.tvm.windows import AXES, Numbers, Window
from qc.ir.quant import Weight, read_weight

__all__ = [
    "Convolution",
    "as_image",
    "average_pool",
    "convolution",
    "max_pool",
    "transposed_convolution",
    "transposed_window",
    "window_of",
]


def as_image(x: Tensor) -> Tensor:
    """A tensor without gaps, whose first two axes are batch and channels, as images."""
    shape = (*x.shape[:2], *[dim(1)] * (2 + AXES - len(x.shape)), *x.shape[2:])
    return x.view(shape, dense(shape))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """What a convolution reads, transposed or not.

    Attributes:
        x: Images, or signals, as they are.
        weight: For each output channel, or input channel of a transposed one, the others of its group.
        bias: Of output channels, None if there is none.
        groups: In how many groups of channels.
    """

    x: Tensor
    weight: Weight
    bias: Tensor | None
    groups: int

    @classmethod
    def of(cls, at: Lowering, node: ir.Node) -> Convolution:
        """Reads a node."""
        x, weight, bias = at.input(node, 0), read_weight(node.inputs[1]), at.input(node, 2)
        assert x is not None
        if weight is None:
            raise at.refuse(node, "its weight is computed")
        return cls(x, weight, bias, int(at.attribute(node, "group", 1)))  # type: ignore[call-overload]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the window, along the axes that the images have."""
        return self.weight.shape[2:]


def window_of(at: Lowering, node: ir.Node, x: Tensor, sizes: Sequence[int]) -> Window:
    """The window of a node that moves over the last axes of x."""
    steps, rank, rule = _steps(at, node, x, sizes), len(sizes), _rule(node)
    if rule.startswith("SAME"):
        axes = zip(as_image(x).shape[2:], *steps, strict=True)
        return _distributed(steps, [_missing(at, node, *axis) for axis in axes], rule)
    none = [0] * (2 * rank)
    pads: list[int] = at.attribute(node, "pads", none) if rule == "NOTSET" else none  # type: ignore[assignment]
    return Window(*steps, _numbers(pads[:rank], 0), _numbers(pads[rank:], 0))


_Steps = tuple[Numbers, Numbers, Numbers]


def _steps(at: Lowering, node: ir.Node, x: Tensor, sizes: Sequence[int]) -> _Steps:
    """Sizes, strides and dilations of a window."""
    rank = len(sizes)
    if not 1 <= rank <= AXES or len(x.shape) != 2 + rank or x.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, "it is not over one to three axes of float32")
    strides, dilations = (_numbers(at.attribute(node, n, [1] * rank), 1) for n in ("strides", "dilations"))  # type: ignore[arg-type]
    return _numbers(sizes, 1), strides, dilations


def _numbers(numbers: Sequence[int], absent: int) -> Numbers:
    """Numbers of the last axes, with those of the axes that are absent."""
    depth, height, width = (*[absent] * (AXES - len(numbers)), *map(int, numbers))
    return depth, height, width


def _rule(node: ir.Node) -> str:
    held = node.attributes.get("auto_pad")
    return held.as_string() if held is not None else "NOTSET"


def _distributed(steps: _Steps, total: Sequence[int], rule: str) -> Window:
    """A window with so much padding along each axis, an odd element in front unless the rule is ``SAME_UPPER``."""
    less, more = _numbers([t // 2 for t in total], 0), _numbers([t - t // 2 for t in total], 0)
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
    held = Convolution.of(at, node)
    (out, each, *sizes), groups = held.weight.shape, held.groups
    window = window_of(at, node, held.x, sizes)
    x = as_image(at.contiguous(held.x))
    at.program.require_equal(x.shape[1], each * groups)
    places = window.places(x.shape[2:])
    y = as_image(at.result(node.outputs[0], (x.shape[0], out, *places[-len(sizes) :])))
    if each == 1 and groups > 1:
        _depthwise(at, x, held, y, window)
        return
    at.program.use("turn")
    columns, count, share = held.weight.matrix[1], product(places), out // groups
    for g in range(groups):
        patches = at.program.tensor((x.shape[0] * count, columns))
        _windows(at, x, patches, window, places, g * each, each, back=False)

        def matrix(held: np.ndarray, g: int = g) -> np.ndarray:
            return held.reshape(groups, -1, columns)[g]

        made = at.program.tensor((x.shape[0], count, share))
        part = None if held.bias is None else at.contiguous(held.bias).view((share,), (1,), g * share)
        _multiply(at, node, patches, held.weight, g, matrix, columns, part, made)
        numbers = f"{x.shape[0].c}, {count.c}, {share}, {out}, {g * share}"
        at.program.add(f"turn({made.c}, {y.c}, {numbers});", [made], [y])


def _windows(
    at: Lowering, image: Tensor, rows: Tensor, window: Window, places: Sequence[Dim], first: int, count: int, *,
    back: bool,
) -> None:  # fmt: skip
    """What lies under the window at each place as a row, of `count` channels; or rows are added to the image."""
    at.program.use("reach")
    at.program.use("windows")
    batch, channels, *sizes = image.shape
    numbers = f"{batch.c}, {channels.c}, {first}, {count}, {listed(sizes)}, {listed(places)}, {window.c}"
    source, made = (rows, image) if back else (image, rows)
    at.program.add(f"windows({image.c}, {rows.c}, {int(back)}, {numbers});", [source], [made])


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


def _depthwise(at: Lowering, x: Tensor, held: Convolution, y: Tensor, window: Window) -> None:
    weight = held.weight

    def make() -> np.ndarray:
        return np.ascontiguousarray(weight.numpy(), np.float32)

    size = weight.matrix[0] * weight.matrix[1]
    packed = at.program.constant((weight.value, "depthwise"), make, 4 * size, weight.shape, ir.DataType.FLOAT)
    extra = [] if held.bias is None else [at.contiguous(held.bias)]
    pointers = f"{x.c}, {packed.c}, {extra[0].c if extra else 'NULL'}, {y.c}"
    counts = f"{x.shape[0].c}, {held.groups}, {weight.shape[0] // held.groups}"
    at.program.use("reach")
    at.program.use("depthwise")
    at.program.add(
        f"depthwise({pointers}, {counts}, {listed(x.shape[2:])}, {listed(y.shape[2:])}, {window.c});",
        [x, *extra],
        [y],
    )


@operator("ConvTranspose")
def transposed_convolution(at: Lowering, node: ir.Node) -> None:
    """Pixels as rows, times the weight; what comes out is added to the windows of the result.

    ``y[b, o, p * stride + (i, j) * dilation - pad] = sum_{c, p, i, j} x[b, c, p] w[c, o, i, j] + bias[o]``
    """
    held = Convolution.of(at, node)
    (inner, each, *_), groups = held.weight.shape, held.groups
    window, covered = transposed_window(at, node, held)
    image = as_image(at.contiguous(held.x))
    batch, channels, *places = image.shape
    at.program.require_equal(channels, inner)
    y = as_image(at.result(node.outputs[0], (batch, each * groups, *covered[-len(held.sizes) :])))
    if held.bias is None:
        fill(at, y, "0")
    else:
        loop(at, "{a}", [per_channel(y, held.bias)], y)
    columns, pixels = inner // groups, product(places)
    for g in range(groups):

        def matrix(held: np.ndarray, g: int = g) -> np.ndarray:
            return held.reshape(groups, columns, -1)[g].T

        rows = image.view((batch, pixels, columns), (channels * pixels, 1, pixels), pixels * (g * columns))
        made = at.program.tensor((batch, pixels, held.weight.matrix[1]))
        _multiply(at, node, rows, held.weight, g, matrix, columns, None, made)
        _windows(at, y, made, window, places, g * each, each, back=True)


def transposed_window(at: Lowering, node: ir.Node, held: Convolution) -> tuple[Window, list[Dim]]:
    """The window that moves over the result of a transposed convolution, and the sizes of that as an image."""
    steps, places = _steps(at, node, held.x, held.sizes), as_image(held.x).shape[2:]
    more = _numbers(at.attribute(node, "output_padding", [0] * len(held.sizes)), 0)  # type: ignore[arg-type]
    window = _window_of_result(at, node, held, steps, places, more)
    return window, window.covered(places, more)


def _window_of_result(
    at: Lowering, node: ir.Node, held: Convolution, steps: _Steps, places: Sequence[Dim], more: Numbers
) -> Window:
    """The window, padded as the size of the result wants if that is given."""
    rule = _rule(node)
    given: list[int] | None = at.attribute(node, "output_shape")  # type: ignore[assignment]
    if given is not None:
        wanted = list(map(dim, _numbers(given, 1)))
    elif rule.startswith("SAME"):
        wanted = [n * stride for n, stride in zip(places, steps[1], strict=True)]
    else:
        return window_of(at, node, held.x, held.sizes)
    whole = Window(*steps, (0, 0, 0), (0, 0, 0)).covered(places, more)
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
