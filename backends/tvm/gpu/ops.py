"""Operators that are lowered in another way for a GPU: products, convolutions, and look-ups in quantized tables."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qc.backends.integers import rounded_source
from qc.backends.tvm.gpu import images, lookups, products
from qc.backends.tvm.gpu.program import GpuProgram
from qc.backends.tvm.gpu.weights import Words, why_decoded, words_of
from qc.backends.tvm.kernels.caches import Cells
from qc.backends.tvm.lower import Handler, Lowering, supported
from qc.backends.tvm.ops.images import Convolution, as_image, transposed_window, window_of
from qc.backends.tvm.ops.loops import copy
from qc.backends.tvm.ops.products import Tail, gather_values, last_rows, matrices, tail_of
from qc.backends.tvm.ops.rounding import round_in_float
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, dim, product
from qc.backends.tvm.windows import Numbers, Window
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.quant import Weight, read_weight
from qc.ir.recurrent import GATES

__all__ = ["GpuLowering", "lower_for_gpu"]


def lower_for_gpu(model: Model, cells: Cells) -> tuple[GpuProgram, Lowering]:
    """Lowers a model to launches.

    Raises:
        UnsupportedError: If an operator, a type or a shape has no kernel; names the node.
    """
    program = GpuProgram()
    lowering = GpuLowering(model, program, exact=True, cells=cells)
    lowering.run()
    return program, lowering


class GpuLowering(Lowering):
    """A lowering in which some operators have other handlers."""

    program: GpuProgram

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """What lowers each operator, by domain and name."""
        return supported() | _HANDLERS  # type: ignore[operator]


def _start(at: GpuLowering, x: Tensor) -> Tensor:
    """The tensor at the start of a buffer and without gaps, copied if it is not."""
    x = at.stored(x)
    if x.contiguous and x.offset.constant == 0:
        return x
    return copy(at, x, at.program.tensor(x.shape, x.dtype))


def _linear(at: GpuLowering, node: ir.Node) -> None:
    """``x @ weight.T + bias``, with what follows it."""
    weight = read_weight(node.inputs[1])
    if weight is None or len(weight.shape) != 2:
        raise at.refuse(node, "its weight is computed")
    x, bias = at.input(node, 0), at.input(node, 2)
    assert x is not None
    shape = (*x.shape[:-1], dim(weight.shape[0]))
    tail = tail_of(at, node, shape)
    x, shape = last_rows(at, tail, x, shape)
    y = at.result(tail.value, shape)
    rows, columns = weight.shape
    m = product(x.shape[:-1])
    x = _start(at, x).view((m, columns), (columns, 1))
    held = _weight(at, weight)
    extra = [_start(at, t) for t in (bias, tail.residual) if t is not None]
    _multiply(at, weight, [x, *held, y.view((m, rows), (rows, 1)), *extra], m, bias is not None, tail)


def _multiply(
    at: GpuLowering, weight: Weight, tensors: list[Tensor], m: Dim, bias: bool, tail: Tail
) -> None:  # fmt: skip
    """One kernel for a row, one for several; which of them runs is known when it does."""
    words, options = _words(weight), (bias, tail.residual is not None, tail.activation)
    stem, y = "float" if words is None else "words", [tensors[1 + len(_weight(at, weight))]]
    if m.constant != 1:
        arguments = (words, *weight.shape, False, *options)
        at.program.multiply(stem, products.linear, arguments, tensors, [m], y, "" if m.constant else f"{m.c} != 1")
    if m.constant in (None, 1):
        arguments = (words, *weight.shape, True, *options)
        at.program.multiply(stem, products.linear, arguments, tensors, [], y, "" if m.constant else f"{m.c} == 1")


def _words(weight: Weight) -> Words | None:
    """How a weight lies; None if in float."""
    return words_of(weight.format) if weight.format is not None and not why_decoded(weight.format) else None


def _weight(at: GpuLowering, weight: Weight) -> list[Tensor]:
    """A weight on the device, in as many buffers as its format needs."""
    words = _words(weight)
    if words is None:
        return [at.get(weight.value)]

    def make(name: str) -> np.ndarray:
        packed = words.pack(weight.quantized(), name)
        weight.release()
        return packed

    made = []
    for name, shape in words.shapes(*weight.matrix).items():
        size = 4 * int(np.prod(shape))
        key = (weight.data, "words", name)
        made.append(at.program.constant(key, lambda n=name: make(n), size, shape, ir.DataType.FLOAT))
    return made


def _convolution(at: GpuLowering, node: ir.Node) -> None:
    """A convolution, with what follows it."""
    held = Convolution.of(at, node)
    window, weight = window_of(at, node, held.x, held.sizes), held.weight
    at.program.require_equal(held.x.shape[1], weight.shape[1] * held.groups)
    places = window.places(as_image(held.x).shape[2:])
    _convolve(at, node, held, window, (1, 1, 1), _words(weight), _weight(at, weight), weight.matrix, places)


def _transposed_convolution(at: GpuLowering, node: ir.Node) -> None:
    """A convolution of images whose pixels lie apart, by a window turned round, with what follows it."""
    held = Convolution.of(at, node)
    (window, sizes), weight, groups = transposed_window(at, node, held), held.weight, held.groups
    inner, each = weight.shape[:2]
    at.program.require_equal(held.x.shape[1], inner)

    def make() -> np.ndarray:
        whole = np.asarray(weight.numpy(), np.float32).reshape(groups, inner // groups, each, -1)
        turned = np.ascontiguousarray(whole.transpose(0, 2, 1, 3)[..., ::-1])
        weight.release()
        return turned

    shape = each * groups, inner // groups * (weight.matrix[1] // each)
    key = (weight.value, node.op_type, groups)
    turned = at.program.constant(key, make, 4 * math.prod(shape), shape, ir.DataType.FLOAT)
    _convolve(at, node, held, window.turned(), window.strides, None, [turned], shape, sizes)


def _convolve(
    at: GpuLowering, node: ir.Node, held: Convolution, window: Window, apart: Numbers, words: Words | None,
    weights: list[Tensor], matrix: tuple[int, int], places: list[Dim],
) -> None:  # fmt: skip
    image = as_image(at.contiguous(held.x))
    shape = (image.shape[0], dim(matrix[0]), *places[-len(held.sizes) :])
    tail = tail_of(at, node, shape)
    y = at.result(tail.value, shape)
    extra = [at.contiguous(t) for t in (held.bias, tail.residual) if t is not None]
    options = (held.bias is not None, tail.residual is not None, tail.activation)
    arguments = (window, apart, held.groups, words, *matrix, *options)
    integers = [image.shape[0], *image.shape[2:], *places]
    at.program.launch("conv", images.convolve, arguments, [image, *weights, y, *extra], integers, [y])


def _gather(at: GpuLowering, node: ir.Node) -> None:
    """Rows of a quantized table, or of any other."""
    weight, axis = read_weight(node.inputs[0]), int(at.attribute(node, "axis", 0))  # type: ignore[call-overload]
    if weight is None or axis != 0 or len(weight.shape) != 2 or _words(weight) is None:
        gather_values(at, node)
        return
    indices = at.input(node, 1)
    assert indices is not None
    indices = at.contiguous(indices)
    y = at.result(node.outputs[0], (*indices.shape, weight.shape[1]))
    arguments = (_words(weight), *weight.shape)
    tensors = [*_weight(at, weight), indices, y, at.program.status]
    at.program.launch("decode", lookups.decode_rows, arguments, tensors, [indices.elements], [y])


def _matmul(at: GpuLowering, node: ir.Node) -> None:
    """A product of two computed values."""
    a, b, y = matrices(at, node)
    *lead, m, n = y.shape
    columns, batch = a.shape[-1], product(lead)
    operands = []
    for x, last in ((a, (m, columns)), (b, (columns, n))):
        whole = (*lead, *last)
        same = tuple(x.shape) == whole
        held = _start(at, x) if same else copy(at, x, at.program.tensor(whole))
        operands.append(held.view((batch, *last), (last[0] * last[1], last[1], 1)))
    at.program.multiply(
        "batched", products.batched, (), [*operands, y.view((batch, m, n), (m * n, n, 1))], [batch, columns, m, n], [y]
    )


def _dequantize(at: GpuLowering, node: ir.Node) -> None:
    """Rounds in float: no product multiplies codes here."""
    round_in_float(at, node, rounded_source(node.outputs[0]))


def _recurrent(at: GpuLowering, node: ir.Node) -> None:
    raise at.refuse(node, "a table of launches has no loop over time")


_HANDLERS = {
    **{("", op): _recurrent for op in GATES},
    ("", "Conv"): _convolution,
    ("", "ConvTranspose"): _transposed_convolution,
    ("", "DequantizeLinear"): _dequantize,
    ("", "Gather"): _gather,
    ("", "MatMul"): _matmul,
    (dialect.DOMAIN, "DynamicQuantize"): _dequantize,
    (dialect.DOMAIN, "Linear"): _linear,
}
