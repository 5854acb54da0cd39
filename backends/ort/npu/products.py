"""Products with weights in the forms that accelerators of phones take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer, finished
from qc.backends.ort.npu.weights import decoded_weight
from qc.ir import dialect
from qc.ir.quant import Weight, read_weight
from qc.passes.base import Context, Contract, Exact, Lossy, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import Decline, constant, made_by, replace, rewritten
from qc.passes.statistics import Request, Statistic

__all__ = ["LowerToConvolution", "LowerToMatMul"]


def _linears(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if dialect.is_op(n, "Linear")]


@dataclasses.dataclass(frozen=True)
class LowerToMatMul(Pass):
    """Rewrites ``qc::Linear`` to ``MatMul(x, Transpose(weight))`` [+ ``Add``]; the runtime transposes once. Exact."""

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in _linears(model):
            x, weight, bias = (*node.inputs, None)[:3]
            write = Writer(model.graph, node)
            turned = write.add("Transpose", weight, perm=[1, 0])
            out = write.add("MatMul", x, turned)
            if bias is not None:
                write.add("Add", out, bias)
            replace(node.outputs[0], write.nodes, like=node)
            sites.append(Site(site_name(node), Outcome.CHANGED))
        return finished(model, sites)


_ENDS = (Statistic.MIN, Statistic.MAX)

_LARGE = 0.9
"""The share of channels that are no larger than what is not divided: room above what was seen of most of them."""


@dataclasses.dataclass(frozen=True)
class LowerToConvolution(Pass):
    """Rewrites ``qc::Linear`` to a convolution with a kernel of one point [* ``size``] [+ ``Add``].

    Channels become the second of four axes, ``[B, K, 1, S]``. It is the product with one scale per output channel that
    NNAPI has: the weights of its matrix products have one scale. A quantized weight becomes int8 per channel (exact if
    it is that already, else as `weights.LowerWeights` says), a float one stays.

    The result of an integer product is on one grid for all channels, which a few large ones would make coarse for all.
    So channel n of such a weight is divided by ``size_n = max(m_n, m)``, by which the float result is multiplied:
    ``m_n = max |y_n|`` of the product y as seen on calibration data, m its quantile 0.9 over channels, and all are in
    proportion to the largest. Exact: scales of the weight change, no code does.

    What a recipe has put on a grid is moved before it is rounded, so that the grid is the one that the product reads.

    Left alone: computed weights, inputs whose rank is not known. Products that were not observed, or were not finite,
    are not divided.
    """

    contract: ClassVar[Contract] = Lossy()

    def needs(self, model: ir.Model) -> list[Request]:
        return [Request(s, n.outputs[0]) for n in _linears(model) for s in _ENDS if _width(n) is not None]

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        readers: dict[ir.Value, list[ir.Node]] = {}
        for node in _linears(model):
            readers.setdefault(node.inputs[1], []).append(node)
        kernels: dict[ir.Value, _Kernel] = {}
        images: dict[ir.Value, ir.Value] = {}

        def rewrite(node: ir.Node) -> Mapping[str, object]:
            source, x = node.inputs[1], node.inputs[0]
            weight = read_weight(source)
            if weight is None:
                raise Decline("its weight is computed")
            if x.shape is None or x.shape.rank() < 2 or not isinstance(x.shape[-1], int):
                raise Decline("the rank of its input is not known")
            if source not in kernels:
                kernels[source] = _kernel(model, weight, context, readers[source])
            _convolve(model.graph, node, weight, kernels[source], images)
            sizes = kernels[source].sizes
            return {} if sizes is None else {"smallest_size": float(sizes.min())}

        return finished(model, rewritten(_linears(model), rewrite))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A weight as convolutions read it, and the factors of their results."""

    value: ir.Value
    sizes: np.ndarray | None


def _width(node: ir.Node) -> int | None:
    """The number of output channels, if it is known."""
    shape = node.outputs[0].shape
    return shape[-1] if shape is not None and shape.rank() and isinstance(shape[-1], int) else None


def _kernel(model: ir.Model, weight: Weight, context: Context, readers: Sequence[ir.Node]) -> _Kernel:
    shape, first = (*weight.shape, 1, 1), readers[0]
    if weight.format is not None:
        sizes = _sizes(readers, context.statistics)
        return _Kernel(decoded_weight(model, weight, context, first, shape=shape, divisors=sizes), sizes)
    write = Writer(model.graph, first)
    kernel = write.add("Unsqueeze", weight.value, write.integers("points", 2, 3))
    kernel.shape = ir.Shape(shape)
    write.before(first)
    return _Kernel(kernel, None)


def _sizes(readers: Sequence[ir.Node], statistics: Mapping[Request, np.ndarray]) -> np.ndarray | None:
    """How large each channel of the products with one weight is, beside the largest; None if that is not known."""
    found = []
    for node in readers:
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.float32(0)
        ends = [statistics.get(Request(s, node.outputs[0])) for s in _ENDS]
        if bias is None or any(e is None or not np.isfinite(e).all() for e in ends):
            return None
        found += [np.abs(e - bias) for e in ends]
    size = np.max(found, axis=0)
    size = np.maximum(size, np.quantile(size, _LARGE))
    return (size / size.max()).astype(np.float32) if size.min() > 0 and size.min() < size.max() else None


def _convolve(
    graph: ir.Graph, node: ir.Node, weight: Weight, kernel: _Kernel, images: dict[ir.Value, ir.Value]
) -> None:
    read, bias, rows = node.inputs[0], (*node.inputs, None)[2], weight.shape[0]
    x, encode = _before_rounding(read)
    write = Writer(graph, node)
    if read not in images:
        images[read] = _image(write, x, encode)
    product = write.add("Conv", images[read], kernel.value, kernel_shape=[1, 1])
    product.shape = ir.Shape([1, rows, 1, None])
    back = write.add("Transpose", product, perm=[0, 2, 3, 1])
    out = _as_before(write, back, x, rows)
    if kernel.sizes is not None:
        out = write.add("Mul", out, write.constant("sizes", kernel.sizes))
    if bias is not None:
        write.add("Add", out, bias)
    replace(node.outputs[0], write.nodes, like=node)


def _before_rounding(x: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """What a recipe has put on one grid, and the node that does; any other value as it is."""
    decode = made_by(x, "DequantizeLinear")
    encode = made_by(decode.inputs[0], "QuantizeLinear") if decode is not None else None
    scale = constant(encode.inputs[1]) if encode is not None else None
    return (encode.inputs[0], encode) if scale is not None and scale.ndim == 0 else (x, None)


def _image(write: Writer, x: ir.Value, encode: ir.Node | None) -> ir.Value:
    """The rows of a value as points of an image, on the grid of `encode`."""
    columns = x.shape[-1]
    flat = write.add("Reshape", x, write.integers("image", 1, 1, -1, columns))
    flat.shape = ir.Shape([1, 1, None, columns])
    image = write.add("Transpose", flat, perm=[0, 3, 1, 2])
    image.shape = ir.Shape([1, columns, 1, None])
    if encode is None:
        return image
    _, scale, zero = encode.inputs
    codes = write.add("QuantizeLinear", image, scale, zero, dtype=zero.dtype)
    return write.add("DequantizeLinear", codes, scale, zero, dtype=image.dtype)


def _as_before(write: Writer, product: ir.Value, x: ir.Value, rows: int) -> ir.Value:
    """The rows of a product in the shape of the input."""
    ahead = list(x.shape)[:-1]
    if sum(not isinstance(d, int) for d in ahead) <= 1:
        sizes = write.constant("shape", np.array([*(d if isinstance(d, int) else -1 for d in ahead), rows], np.int64))
    else:
        shape = write.add("Shape", x, dtype=ir.DataType.INT64, start=0, end=-1)
        sizes = write.add("Concat", shape, write.integers("rows", rows), axis=0)
    return write.add("Reshape", product, sizes)
