"""Which nodes of a lowered model an NPU computes with integers, and why it does not the others."""

from __future__ import annotations

import onnx_ir as ir

from qc.backends.ort.npu.outside import outside_nodes
from qc.backends.target import Coverage
from qc.passes.canonicalize._graph import made_by, stored

__all__ = ["coverage"]

_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_FOLDED = ("Constant", "Shape")
"""Operators of which none is left once shapes are fixed."""


def coverage(model: ir.Model) -> Coverage:
    """Counts the nodes of the graph by operator and by the reason why they do not compute with integers.

    What runs beside the NPU and on lengths alone is not counted: it is no node of the NPU's graph.
    """
    beside = outside_nodes(model.graph)
    return Coverage.counted(
        (node, _why_not(node, beside))
        for node in model.graph
        if node not in beside and node.op_type not in _FOLDED and any(map(_is_float, (*node.inputs, *node.outputs)))
    )


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _why_not(node: ir.Node, beside: set[ir.Node]) -> str:
    if node.op_type in _ROUNDING:
        return ""
    activations = [v for v in node.inputs if _is_float(v) and stored(v) is None]
    if not all(made_by(v, "DequantizeLinear") is not None for v in activations):
        return "computes in half precision: its input has no grid, because it was not observed on calibration data"
    readers = {
        u.node.op_type for out in node.outputs for u in out.uses() if u.node not in beside and u.node.op_type != "Shape"
    }
    return "" if readers <= {"QuantizeLinear"} else "computes in half precision: its result has no grid"
