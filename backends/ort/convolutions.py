"""Lowering of convolutions with quantized weights: ONNX Runtime has kernels for them on quantized inputs alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.quant import DECODES, Weight, read_weight
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import add_constant, drop_unused, made_by, main_nodes

__all__ = ["LowerFloatConvolution"]


@dataclasses.dataclass(frozen=True)
class LowerFloatConvolution(Pass):
    """Rewrites ``Conv(x, DequantizeLinear(codes, scale))`` to ``Conv(x, Mul(Cast(codes), scale))`` where x is float.

    The runtime computes the second form once, when it loads the model, and the first on each call. So the file is
    small and the convolution as fast as with a float weight. Where x comes from a ``DequantizeLinear`` too, the
    convolution stays as it is: the runtime fuses both into one on integers. Exact.
    """

    contract: ClassVar[Contract] = Exact(0.0)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites, decoded = [], {}
        for node in main_nodes(model, "Conv"):
            weight = read_weight(node.inputs[1])
            if weight is None or weight.format is None:
                continue
            if made_by(node.inputs[0], "DequantizeLinear") is not None:
                sites.append(Site(site_name(node), Outcome.SKIPPED, "its input is quantized: the runtime fuses both"))
                continue
            if weight.value not in decoded:
                decoded[weight.value] = _decode(weight)
            node.replace_input_with(1, decoded[weight.value])
            sites.append(Site(site_name(node), Outcome.CHANGED, details={"format": str(weight.format)}))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _decode(weight: Weight) -> ir.Value:
    """``(codes - zero_point) * scale``, the parameters shaped such that they meet the first axis."""
    decode, graph = weight.value.producer(), weight.value.producer().graph
    shape = (-1, *[1] * (len(weight.shape) - 1))
    nodes = [ir.node("Cast", [weight.data], {"to": int(ir.DataType.FLOAT)})]
    for operator, name in (("Sub", "zero_point"), ("Mul", "scale")):
        if name in weight.params:
            held = weight.params[name]
            numbers = held.const_value.numpy().astype(np.float32).reshape(shape)
            constant = add_constant(graph, f"{held.name}.shaped", ir.tensor(numbers))
            nodes.append(ir.node(operator, [nodes[-1].outputs[0], constant]))
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(weight.shape)
        node.metadata_props[DECODES] = str(weight.format)
    graph.insert_before(decode, nodes)
    return nodes[-1].outputs[0]
