"""Rounds the inputs of linear layers to a few bits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.quant import read_weight
from qc.passes.base import BlockPass, Context, Contract, Lossy, Outcome, Result, Site, check_patterns, site_name

__all__ = ["QuantizeActivations"]

_CHOICES = {"bits": (4, 5, 6, 7, 8, 16), "granularity": ("tensor", "token"), "mode": ("dynamic",)}


@dataclasses.dataclass(frozen=True)
class QuantizeActivations(BlockPass):
    """Quantizes the inputs of linear layers with quantized weights, at run time.

    ``x -> x'``: with a grid of ``2^bits`` points from the smallest to the largest entry of the tensor or token (and
    zero), ``|x - x'| <= (max - min) / (2 (2^bits - 1))`` for every entry. Asymmetric 8 bits per tensor are written as
    ``DequantizeLinear(DynamicQuantizeLinear(x))``, everything else as ``qc.DynamicQuantize`` (see `qc.ir.dialect`).
    Layers that read the same value share one node. Integer kernels compute the same product without the float round
    trip; choosing them is the target's work.

    Left alone, with the reason: layers with float weights unless `float_weights`.

    Attributes:
        bits: Width of the activation codes: 4 to 8, or 16.
        granularity: What shares a grid: tensor, or token (each vector along the last axis).
        mode: When grids are found: dynamic, from each input at run time, without calibration.
        symmetric: Whether grids are symmetric around zero.
        clip: What ranges are multiplied with, at most 1; entries beyond are clipped.
        float_weights: Whether to quantize the inputs of layers with float weights too.
        exclude: Regular expressions of layers whose input is left as it is.
    """

    contract: ClassVar[Contract] = Lossy()

    bits: int = 8
    granularity: str = "tensor"
    mode: str = "dynamic"
    symmetric: bool = False
    clip: float = 1.0
    float_weights: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            found = getattr(self, option)
            if found not in choices:
                known = " or ".join(map(str, choices))
                raise InputError(f"Expected {option} of quantize-activations to be {known}, found {found!r}.")
        if not 0 < self.clip <= 1:
            raise InputError(f"Expected clip of quantize-activations above 0 and at most 1, found {self.clip}.")
        check_patterns(self.exclude)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        context = dataclasses.replace(context, exclude=(*context.exclude, *self.exclude))
        rounded: dict[ir.Value, ir.Value] = {}
        linears = [n for n in model.graph if dialect.is_op(n, "Linear") and context.covers(n)]
        return Result.of(model, [self._site(node, rounded, context) for node in linears])

    def _site(self, node: ir.Node, rounded: dict[ir.Value, ir.Value], context: Context) -> Site:
        name, x = site_name(node), node.inputs[0]
        pattern = context.excluded(name)
        if pattern is not None:
            return Site(name, Outcome.SKIPPED, f"excluded by {pattern}")
        weight = read_weight(node.inputs[1])
        if x is None or not (self.float_weights or (weight is not None and weight.format is not None)):
            return Site(name, Outcome.SKIPPED, "its weight is float: quantize weights first, or set float-weights")
        if _is_rounded(x):
            return Site(name, Outcome.MATCHED, "its input is already quantized")
        if x.dtype not in (None, ir.DataType.FLOAT):
            return Site(name, Outcome.SKIPPED, f"its input is {x.dtype.name}, not FLOAT")
        if x not in rounded:
            rounded[x] = self._rounded(x, node)
        node.replace_input_with(0, rounded[x])
        facts = {"bits": self.bits, "mode": self.mode, "granularity": self.granularity, "symmetric": self.symmetric}
        return Site(name, Outcome.CHANGED, "", facts | {"value": x.name})

    def _rounded(self, x: ir.Value, before: ir.Node) -> ir.Value:
        """Inserts the rounding of `x` in front of the first layer that reads it."""
        standard = (self.bits, self.granularity, self.symmetric, self.clip) == (8, "tensor", False, 1.0)
        nodes = _standard(x) if standard else [self._own(x)]
        out = nodes[-1].outputs[0]
        out.name, out.dtype, out.shape = f"{x.name}.quantized", ir.DataType.FLOAT, x.shape
        assert before.graph is not None
        before.graph.insert_before(before, nodes)
        return out

    def _own(self, x: ir.Value) -> ir.Node:
        token = self.granularity == "token"
        return dialect.dynamic_quantize(x, bits=self.bits, token=token, symmetric=self.symmetric, clip=self.clip)


def _is_rounded(x: ir.Value) -> bool:
    producer = x.producer()
    return producer is not None and (
        producer.op_type == "DequantizeLinear" or dialect.is_op(producer, "DynamicQuantize")
    )


def _standard(x: ir.Value) -> list[ir.Node]:
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    for value, suffix, dtype, shape in zip(
        quantize.outputs,
        ("codes", "scale", "zero_point"),
        (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
        (x.shape, ir.Shape([]), ir.Shape([])),
        strict=True,
    ):
        value.name, value.dtype, value.shape = f"{x.name}.{suffix}", dtype, shape
    return [quantize, ir.node("DequantizeLinear", list(quantize.outputs))]
