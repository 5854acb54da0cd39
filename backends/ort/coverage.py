"""Which nodes of a lowered model run on a fast kernel, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qc.backends.ort import capability
from qc.backends.target import Coverage
from qc.ir import dialect
from qc.ir.quant import DECODES
from qc.passes.canonicalize._graph import made_by

__all__ = ["SLOW", "coverage", "why_off_target"]

SLOW = "qc.slow"
"""Metadata property of a node that a lowering knows to be slow: the reason."""

_QUANTIZING = ("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear")
_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "Conv", "ConvTranspose", "Gather", "Einsum"})


def coverage(model: ir.Model, limits: Sequence[capability.Limit] = capability.LIMITS) -> Coverage:
    """Counts the nodes of the graph and its subgraphs by operator and by the reason why they are slow.

    Args:
        model: A lowered model.
        limits: What is slow where the model is to run.
    """
    local = {key[:2] for key in model.functions}
    imports = model.graph.opset_imports
    return Coverage.counted(
        (node, "" if (node.domain, node.op_type) in local else why_off_target(node, imports, limits))
        for node in model.graph.all_nodes()
    )


def why_off_target(
    node: ir.Node, imports: dict[str, int], limits: Sequence[capability.Limit] = capability.LIMITS
) -> str:
    """Why `node` runs slowly or not at all; empty if it runs on a kernel made for the job."""
    if SLOW in node.metadata_props:
        return node.metadata_props[SLOW]
    if node.domain == dialect.DOMAIN:
        return "an operator of the compiler that was not lowered"
    limit = capability.limit_of(f"{node.domain}::{node.op_type}", capability.facts_of(node), limits)
    if limit is not None:
        return limit.reason
    decodes = node.metadata_props.get(DECODES)
    if decodes is not None:
        return f"decodes a weight in {decodes}, which no kernel reads: it is float in memory once the model is loaded"
    if node.domain == "" and node.op_type == "DequantizeLinear" and _is_constant(node.inputs[0]):
        return "decodes a whole weight on each call"
    if node.domain == "" and node.op_type in _QUANTIZING and not _feeds_integers(node):
        return "rounds activations for a product that then runs in float"
    if node.op_type in _PRODUCTS and any(_decodes_weight(v) for v in node.inputs):
        return "reads a weight that is decoded whole on each call"
    if not capability.has_kernel(node, imports):
        return "the installed runtime has no CPU kernel for it"
    return ""


def _feeds_integers(node: ir.Node) -> bool:
    """Whether the codes that `node` makes are read as codes."""
    readers = {use.node.op_type for use in node.outputs[0].uses()}
    return node.op_type != "DequantizeLinear" and bool(readers) and "DequantizeLinear" not in readers


def _decodes_weight(value: ir.Value | None) -> bool:
    node = made_by(value, "DequantizeLinear")
    return node is not None and _is_constant(node.inputs[0])


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.is_graph_input()
