"""Which values lie between the product that yields logits and the output: each computed of the one before it alone."""

from __future__ import annotations

import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import read_weight
from qc.passes.canonicalize._graph import stored

__all__ = ["behind_head"]

_EACH = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub",
    "Tanh",
})  # fmt: skip
"""Operators that yield an element of one element, and of constants."""


def behind_head(graph: ir.Graph) -> list[ir.Value]:
    """The values from the product of a head to the logits, the first first: a bias, a scale, a soft cap.

    Each is read by the next alone, and has its shape and type. Empty if anything else lies in between, or if more is
    computed of the logits.
    """
    logits = next((v for v in graph.outputs if v.metadata_props.get("qc.role") == "logits"), None)
    if logits is None or logits.uses():
        return []
    found = [logits]
    while not dialect.is_op(node := found[-1].producer(), "Linear"):
        value = _computed(node)
        if value is None or value.dtype != logits.dtype:
            return []
        found.append(value)
    return found[::-1]


def _computed(node: ir.Node | None) -> ir.Value | None:
    """What a node alone reads, if it yields a value of the same shape of it and of constants that all rows share."""
    if node is None or node.domain or node.op_type not in _EACH:
        return None
    held = [(v, _shape(v)) for v in node.inputs if v is not None]
    computed = [v for v, shape in held if shape is None]
    if len(computed) != 1 or len(computed[0].uses()) != 1 or computed[0].is_graph_output():
        return None
    whole = (computed[0].shape or [None])[-1]
    rank = len(computed[0].shape or ())
    fits = all(len(s) <= rank and {*s[:-1]} <= {1} and {*s[-1:]} <= {1, whole} for _, s in held if s is not None)
    return computed[0] if fits else None


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a constant; None if the value is computed."""
    weight, tensor = read_weight(value), stored(value)
    if weight is not None:
        return weight.shape
    return None if tensor is None else tensor.shape.numpy()
