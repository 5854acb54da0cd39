"""Computes products with 8-bit weights on 8-bit activations."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.quant import read_weight
from qc.passes.base import Context, Contract, Lossy, Outcome, Pass, Result, Site, site_name

__all__ = ["QuantizeActivations"]

_CHOICES = {"bits": (8,), "granularity": ("tensor",), "mode": ("dynamic",)}


@dataclasses.dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Quantizes the inputs of linear layers with int8 per-channel weights, at run time, to asymmetric 8-bit codes.

    ``x -> DequantizeLinear(DynamicQuantizeLinear(x))``: scale and zero point are those of the smallest range that holds
    the tensor and zero, so ``|x - x'| <= (max - min) / 510`` for every entry. Layers that read the same value share one
    pair. Integer kernels compute the same product without the float round trip; choosing them is the target's work.

    Left alone, with the reason: layers with float weights or weights in another format, for which there is no kernel.

    Attributes:
        bits: Width of the activation codes; 8.
        granularity: What shares a scale: tensor.
        mode: When scales are found: dynamic, from each input at run time, without calibration.
    """

    contract: ClassVar[Contract] = Lossy()

    bits: int = 8
    granularity: str = "tensor"
    mode: str = "dynamic"

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            found = getattr(self, option)
            if found not in choices:
                known = " or ".join(map(str, choices))
                raise InputError(f"Expected {option} of quantize-activations to be {known}, found {found!r}.")

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        decoded: dict[ir.Value, ir.Value] = {}
        sites = [_site(node, decoded) for node in tuple(model.graph) if dialect.is_op(node, "Linear")]
        return Result.of(model, sites)


def _site(node: ir.Node, decoded: dict[ir.Value, ir.Value]) -> Site:
    name, x = site_name(node), node.inputs[0]
    weight = read_weight(node.inputs[1])
    format = weight.format if weight is not None else None
    if x is None or format is None:
        return Site(name, Outcome.SKIPPED, "its weight is float: quantize weights to int8, group 0, first")
    if not (format.values.bits == 8 and format.values.symmetric and format.group is None):
        return Site(name, Outcome.SKIPPED, f"its weight is {format}: integer kernels want int8 per channel")
    producer = x.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return Site(name, Outcome.MATCHED, "its input is already quantized")
    if x.dtype not in (None, ir.DataType.FLOAT):
        return Site(name, Outcome.SKIPPED, f"its input is {x.dtype.name}, not FLOAT")
    facts = {"bits": 8, "mode": "dynamic", "granularity": "tensor", "value": x.name}
    if x not in decoded:
        decoded[x] = _quantized(x, node)
    node.replace_input_with(0, decoded[x])
    return Site(name, Outcome.CHANGED, "", facts)


def _quantized(x: ir.Value, before: ir.Node) -> ir.Value:
    """Inserts the pair in front of the first layer that reads `x`."""
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    codes, scale, zero_point = quantize.outputs
    dequantize = ir.node("DequantizeLinear", [codes, scale, zero_point])
    out = dequantize.outputs[0]
    for value, suffix, dtype, shape in (
        (codes, "codes", ir.DataType.UINT8, x.shape),
        (scale, "scale", ir.DataType.FLOAT, ir.Shape([])),
        (zero_point, "zero_point", ir.DataType.UINT8, ir.Shape([])),
        (out, "quantized", ir.DataType.FLOAT, x.shape),
    ):
        value.name, value.dtype, value.shape = f"{x.name}.{suffix}", dtype, shape
    assert before.graph is not None
    before.graph.insert_before(before, [quantize, dequantize])
    return out
