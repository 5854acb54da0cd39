"""Operators that are lowered in another way for a GPU: products, convolutions, and look-ups in quantized tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qc.backends.integers import rounded_source
from qc.backends.tvm.gpu import images, lookups, products
from qc.backends.tvm.gpu.program import GpuProgram
from qc.backends.tvm.gpu.weights import Words, why_decoded, words_of
from qc.backends.tvm.kernels.caches import Cells
from qc.backends.tvm.lower import Handler, Lowering, supported
from qc.backends.tvm.ops.images import as_image, window_of
from qc.backends.tvm.ops.loops import broadcast, copy
from qc.backends.tvm.ops.products import Tail, gather_values, last_rows, tail_of
from qc.backends.tvm.ops.rounding import round_in_float
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, dim, product
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.quant import Weight, read_weight

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
    x, weight, bias = at.input(node, 0), read_weight(node.inputs[1]), at.input(node, 2)
    assert x is not None
    if weight is None:
        raise at.refuse(node, "its weight is computed")
    groups, (rows, columns) = int(at.attribute(node, "group", 1)), weight.matrix  # type: ignore[call-overload]
    window = window_of(at, node, x, weight.shape[2:])
    image = as_image(at.contiguous(x))
    batch, _, height, width = image.shape
    down, right = window.places((height, width))
    shape = (batch, rows, *(down, right)[-len(weight.shape[2:]) :])
    tail = tail_of(at, node, shape)
    y = at.result(tail.value, shape)
    extra = [at.contiguous(t) for t in (bias, tail.residual) if t is not None]
    tensors = [image, *_weight(at, weight), y, *extra]
    arguments = (window, groups, _words(weight), rows, columns, bias is not None, tail.residual is not None,
                 tail.activation)  # fmt: skip
    at.program.launch("conv", images.convolve, arguments, tensors, [batch, height, width, down, right], [y])


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
    a, b = (at.get(v) for v in node.inputs if v is not None)
    if len(a.shape) < 2 or len(b.shape) < 2 or a.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, "one of its operands is a vector or not in float32")
    lead = broadcast(at, [a.shape[:-2], b.shape[:-2]])
    m, columns, n = a.shape[-2], a.shape[-1], b.shape[-1]
    batch = product(lead)
    y = at.result(node.outputs[0], (*lead, m, n))
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


_HANDLERS = {
    ("", "Conv"): _convolution,
    ("", "DequantizeLinear"): _dequantize,
    ("", "Gather"): _gather,
    ("", "MatMul"): _matmul,
    (dialect.DOMAIN, "DynamicQuantize"): _dequantize,
    (dialect.DOMAIN, "Linear"): _linear,
}
