"""Products with weights in the forms that accelerators of phones take."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer, finished
from qc.backends.ort.npu.weights import decoded_weight
from qc.ir import dialect
from qc.ir.quant import Weight, read_weight
from qc.passes.base import Context, Contract, Exact, Lossy, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import Decline, replace, rewritten

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


@dataclasses.dataclass(frozen=True)
class LowerToConvolution(Pass):
    """Rewrites ``qc::Linear`` to a convolution with a kernel of one point [+ ``Add``].

    Channels become the second of four axes, ``[B, K, 1, S]``. It is the product with one scale per output channel that
    NNAPI has: the weights of its matrix products have one scale. A quantized weight becomes int8 per channel (exact if
    it is that already, else as `weights.LowerWeights` says), a float one stays. Left alone: computed weights, inputs
    whose rank is not known.
    """

    contract: ClassVar[Contract] = Lossy()

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        kernels: dict[ir.Value, ir.Value] = {}
        images: dict[ir.Value, ir.Value] = {}

        def rewrite(node: ir.Node) -> None:
            weight = read_weight(node.inputs[1])
            x = node.inputs[0]
            if weight is None:
                raise Decline("its weight is computed")
            if x.shape is None or x.shape.rank() < 2 or not isinstance(x.shape[-1], int):
                raise Decline("the rank of its input is not known")
            if weight.value not in kernels:
                kernels[weight.value] = _kernel(model, weight, context, node)
            _convolve(model.graph, node, weight, kernels[weight.value], images)

        return finished(model, rewritten(_linears(model), rewrite))


def _kernel(model: ir.Model, weight: Weight, context: Context, before: ir.Node) -> ir.Value:
    if weight.format is not None:
        return decoded_weight(model, weight, context, before, shape=(*weight.shape, 1, 1))
    write = Writer(model.graph, before)
    kernel = write.add("Unsqueeze", weight.value, write.integers("points", 2, 3))
    kernel.shape = ir.Shape([*weight.shape, 1, 1])
    write.before(before)
    return kernel


def _convolve(
    graph: ir.Graph, node: ir.Node, weight: Weight, kernel: ir.Value, images: dict[ir.Value, ir.Value]
) -> None:
    x, bias, (rows, columns) = node.inputs[0], (*node.inputs, None)[2], weight.shape
    write = Writer(graph, node)
    if x not in images:
        flat = write.add("Reshape", x, write.integers("image", 1, 1, -1, columns))
        flat.shape = ir.Shape([1, 1, None, columns])
        images[x] = write.add("Transpose", flat, perm=[0, 3, 1, 2])
        images[x].shape = ir.Shape([1, columns, 1, None])
    product = write.add("Conv", images[x], kernel, kernel_shape=[1, 1])
    product.shape = ir.Shape([1, rows, 1, None])
    back = write.add("Transpose", product, perm=[0, 2, 3, 1])
    out = _as_before(write, back, x, rows)
    if bias is not None:
        write.add("Add", out, bias)
    replace(node.outputs[0], write.nodes, like=node)


def _as_before(write: Writer, product: ir.Value, x: ir.Value, rows: int) -> ir.Value:
    """The rows of a product in the shape of the input."""
    ahead = list(x.shape)[:-1]
    if sum(not isinstance(d, int) for d in ahead) <= 1:
        sizes = write.constant("shape", np.array([*(d if isinstance(d, int) else -1 for d in ahead), rows], np.int64))
    else:
        shape = write.add("Shape", x, dtype=ir.DataType.INT64, start=0, end=-1)
        sizes = write.add("Concat", shape, write.integers("rows", rows), axis=0)
    return write.add("Reshape", product, sizes)
