"""Lowering of matrix products and table look-ups to the runtime's kernels.

| canonical | becomes | why |
|---|---|---|
| Linear, float weight | ``FusedMatMul(transB)`` [+ Add] | as fast as ``MatMul``, and the weight is not transposed |
| Linear, 2/4/8-bit weight | ``MatMulNBits`` | the runtime never decodes the weight |
| Linear, 8 bits per channel, 8-bit input | see `qc.backends.ort.integers` | one int8 product |
| Gather, 2/4/8-bit table | ``GatherBlockQuantized`` | decodes the rows that are read only |

A float weight stored in bf16 or fp16 keeps its ``Cast``: the runtime folds it once at load, and the file is half the
size.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.backends.integers import code_bits, rounded_source
from qc.backends.ort._lowering import MICROSOFT, finish
from qc.backends.ort.packed import Held, PackedWeights, consumes_weight, has_kernel
from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.quant import Weight, read_weight
from qc.passes.base import Contract, Exact, Lossy, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import replace

__all__ = ["LowerFloatLinear", "LowerQuantizedWeights"]

_KERNEL_BITS = 8
"""What ``MatMulNBits`` rounds activations to at accuracy level 4."""

_FAST_IN_FLOAT = 4
"""Bits of weights whose kernel is fast with float activations too."""


@dataclasses.dataclass(frozen=True)
class LowerFloatLinear(Pass):
    """Rewrites ``qc::Linear`` to ``FusedMatMul(x, weight, transB=1)`` [+ ``Add``], or ``MatMul(x, Transpose(weight))``.

    The second form is for element types other than float32, for which ``FusedMatMul`` has no kernel. It also takes
    weights that are decoded by other operators; coverage then tells that they are decoded on each call.
    Exact up to the order of summation.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in _linears(model):
            x, weight, bias = (*node.inputs, None)[:3]
            assert weight is not None
            if weight.dtype in (None, ir.DataType.FLOAT):
                nodes = [_node("FusedMatMul", [x, weight], MICROSOFT, transB=1)]
            else:
                turn = _node("Transpose", [weight], perm=[1, 0])
                nodes = [turn, _node("MatMul", [x, turn.outputs[0]])]
            kernel = nodes[-1].op_type
            if bias is not None:
                nodes.append(_node("Add", [nodes[-1].outputs[0], bias]))
            replace(node.outputs[0], nodes, like=node)
            sites.append(Site(site_name(node), Outcome.CHANGED, details={"kernel": kernel}))
        return finish(model, sites)


@dataclasses.dataclass(frozen=True)
class LowerQuantizedWeights(Pass):
    """Fuses Linears with 2, 4 or 8-bit weights into ``MatMulNBits``, look-ups into ``GatherBlockQuantized``.

    At accuracy level 4 ``MatMulNBits`` rounds activations to int8 per block, 4e-3 to 1e-2 of the largest output; that
    is the only inexact step. It makes a quantization of the same input to 8 bits or more redundant, so the
    kernel reads the value in front of it; one to fewer bits stays, and 4-bit weights are multiplied at level 0 then. At
    level 0 activations stay float and the result is exact, but only 4 bits are fast. The verifying runtime keeps them
    float at either level, so the rounding shows in what is measured on the artifact.

    A table that is also the weight of a Linear (tied embedding and head) is stored once, shared through a ``Reshape``.

    Attributes:
        accuracy_level: 4 or 0.
    """

    accuracy_level: int = 4
    contract: ClassVar[Contract] = Lossy()

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4):
            raise InputError(f"Expected accuracy level 4 (int8 activations) or 0 (float), found {self.accuracy_level}.")

    def call(self, model: ir.Model, context: object = None) -> Result:
        """Fuses all sites, or raises before it changes the first.

        Raises:
            UnsupportedError: If a weight's format has no fast kernel at this accuracy level.
        """
        sites, found = [], []
        for node in tuple(model.graph):
            if not consumes_weight(node):
                continue
            weight = read_weight(node.inputs[_weight_slot(node)])
            reason = _why_not(node, weight)
            if reason is None:
                found.append((node, weight))
            elif reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, reason))
        packed = PackedWeights(model.graph, self.accuracy_level)
        for _, weight in found:
            packed.plan(weight)
        for node, weight in found:
            held = packed.of(weight, node)
            fused = self._gather(node, held) if node.op_type == "Gather" else self._linear(node, held)
            details = {"kernel": fused.op_type, "format": str(weight.format), "block": held.block}
            sites.append(Site(site_name(node), Outcome.CHANGED, details=details))
            replace(node.outputs[0], [fused], like=node)
        return finish(model, sites)

    def _linear(self, node: ir.Node, held: Held) -> ir.Node:
        x, bias = node.inputs[0], (*node.inputs, None)[2]
        source, level = rounded_source(x), self.accuracy_level
        if source is not None and level == 4:
            if code_bits(source) >= _KERNEL_BITS:
                x = source.inputs[0]
            elif held.values.bits == _FAST_IN_FLOAT:
                level = 0  # a second rounding would add to the error of the first
        rows, columns = held.weight.shape
        return _node(
            "MatMulNBits",
            [x, held.blocks, held.scale, held.zero_points, None, bias],
            MICROSOFT,
            K=columns,
            N=rows,
            bits=held.values.bits,
            block_size=held.block,
            accuracy_level=level,
        )

    def _gather(self, node: ir.Node, held: Held) -> ir.Node:
        return _node(
            "GatherBlockQuantized",
            [held.rows, node.inputs[1], held.scale, held.zero_points],
            MICROSOFT,
            bits=held.values.bits,
            block_size=held.block,
            gather_axis=0,
            quantize_axis=1,
        )


def _weight_slot(node: ir.Node) -> int:
    return 0 if node.op_type == "Gather" else 1


def _why_not(node: ir.Node, weight: Weight | None) -> str | None:
    """Why a consumer of weights cannot be fused; empty if it is none of our business, None if it can."""
    if weight is None or weight.format is None:
        return "" if node.op_type == "Gather" else "its weight is float"
    if not has_kernel(weight.format):
        return f"the runtime has no kernel for {weight.format}: the weight is decoded to float when the model is loaded"
    if node.op_type == "Gather":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if axis % 2:
            return "it gathers columns, the kernel gathers rows"
        if weight.shape[1] * weight.format.values.bits % 8:
            return f"its rows of {weight.shape[1]} codes do not fill whole bytes"
    return None


def _linears(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if dialect.is_op(node, "Linear")]


def _node(op_type: str, inputs: list[ir.Value | None], domain: str = "", **attributes: int | list[int]) -> ir.Node:
    while inputs[-1] is None:
        inputs = inputs[:-1]
    return ir.node(op_type, inputs, attributes, domain=domain)
