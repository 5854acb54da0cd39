"""Lowering of convolutions with quantized weights: ONNX Runtime has kernels for them on quantized inputs alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.backends.ort.decoding import decoded
from qc.ir.quant import read_weight
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import drop_unused, made_by, main_nodes

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
        sites, held = [], {}
        for node in main_nodes(model, "Conv"):
            weight = read_weight(node.inputs[1])
            if weight is None or weight.format is None:
                continue
            if made_by(node.inputs[0], "DequantizeLinear") is not None:
                sites.append(Site(site_name(node), Outcome.SKIPPED, "its input is quantized: the runtime fuses both"))
                continue
            if weight.value not in held:
                held[weight.value] = decoded(weight)
            node.replace_input_with(1, held[weight.value])
            sites.append(Site(site_name(node), Outcome.CHANGED, details={"format": str(weight.format)}))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result
