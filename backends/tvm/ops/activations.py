"""Which activation function a node computes, by the name that kernels know it under."""

from __future__ import annotations

import onnx_ir as ir

from qc.ir import dialect

__all__ = ["activation_of"]


def activation_of(node: ir.Node | None) -> str | None:
    """The name that kernels give to the activation function that a node computes, or None if it is none."""
    if node is None:
        return None
    if dialect.is_op(node, "Swish"):
        alpha = node.attributes["alpha"].as_float()
        return {1.0: "silu"}.get(alpha, "quick_gelu" if abs(alpha - 1.702) < 1e-6 else None)
    if node.domain:
        return None
    if node.op_type == "Gelu":
        approximate = node.attributes.get("approximate")
        return "gelu_tanh" if approximate is not None and approximate.as_string() == "tanh" else "gelu"
    return {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}.get(node.op_type)
