"""Operators that are lowered in another way for a GPU: products, and look-ups in quantized tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qc.backends.integers import rounded_source
from qc.backends.tvm.gpu import kernels, products
from qc.backends.tvm.gpu.program import GpuProgram
from qc.backends.tvm.gpu.weights import why_decoded, words_of
from qc.backends.tvm.lower import Handler, Lowering, supported
from qc.backends.tvm.ops.loops import broadcast, copy
from qc.backends.tvm.ops.products import Tail, gather_values, last_rows, tail_of
from qc.backends.tvm.ops.rounding import round_in_float
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, dim, product
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.quant import Weight, read_weight

__all__ = ["GpuLowering", "lower_for_gpu"]


def lower_for_gpu(model: Model) -> tuple[GpuProgram, Lowering]:
    """Lowers a model to launches.

    Raises:
        UnsupportedError: If an operator, a type or a shape has no kernel; names the node.
    """
    program = GpuProgram()
    lowering = GpuLowering(model, program, exact=True)
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
    x, y = last_rows(at, tail, x, at.result(tail.value, shape))
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
    coded = weight.format is not None and not why_decoded(weight.format)
    kind = (words_of(weight.format),) if coded and weight.format is not None else ()
    stem, generator = ("words", products.word_product) if coded else ("float", products.float_product)
    options = (bias, tail.residual is not None, tail.activation)
    y = [tensors[1 + len(_names(weight))]]
    if m.constant != 1:
        arguments = (*kind, *weight.shape, False, *options)
        at.program.multiply(stem, generator, arguments, tensors, [m], y, "" if m.constant else f"{m.c} != 1")
    if m.constant in (None, 1):
        arguments = (*kind, *weight.shape, True, *options)
        at.program.multiply(stem, generator, arguments, tensors, [], y, "" if m.constant else f"{m.c} == 1")


def _names(weight: Weight) -> list[str]:
    """The parameters of a weight."""
    coded = weight.format is not None and not why_decoded(weight.format)
    return list(words_of(weight.format).pointers) if coded and weight.format is not None else ["w"]


def _weight(at: GpuLowering, weight: Weight) -> list[Tensor]:
    """A weight on the device, in as many buffers as its format needs."""
    rows, columns = weight.shape
    if _names(weight) == ["w"]:
        return [at.get(weight.value)]
    assert weight.format is not None
    words = words_of(weight.format)

    def make(name: str) -> np.ndarray:
        packed = words.pack(weight.quantized(), name)
        weight.release()
        return packed

    made = []
    for name, shape in words.shapes(rows, columns).items():
        size = 4 * int(np.prod(shape))
        key = (weight.data, "words", name)
        made.append(at.program.constant(key, lambda n=name: make(n), size, shape, ir.DataType.FLOAT))
    return made


def _gather(at: GpuLowering, node: ir.Node) -> None:
    """Rows of a quantized table, or of any other."""
    weight, axis = read_weight(node.inputs[0]), int(at.attribute(node, "axis", 0))  # type: ignore[call-overload]
    if weight is None or axis != 0 or len(weight.shape) != 2 or len(_names(weight)) == 1:
        gather_values(at, node)
        return
    assert weight.format is not None
    indices = at.input(node, 1)
    assert indices is not None
    indices = at.contiguous(indices)
    y = at.result(node.outputs[0], (*indices.shape, weight.shape[1]))
    arguments = (words_of(weight.format), *weight.shape)
    tensors = [*_weight(at, weight), indices, y, at.program.status]
    at.program.launch("decode", kernels.decode_rows, arguments, tensors, [indices.elements], [y])


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
    ("", "DequantizeLinear"): _dequantize,
    ("", "Gather"): _gather,
    ("", "MatMul"): _matmul,
    (dialect.DOMAIN, "DynamicQuantize"): _dequantize,
    (dialect.DOMAIN, "Linear"): _linear,
}
