"""Weights of recurrent layers in canonical form: one matrix ``[N, K]`` for each direction, as linear layers have.

``LSTM``, ``GRU`` and ``RNN`` read stacks ``W [directions, gates * hidden, inputs]`` and ``R [directions, gates *
hidden, hidden]``. In canonical form a stack is ``Unsqueeze(matrix, 0)``, of two directions the ``Concat`` of two of
them on axis 0; so a matrix can be quantized and packed as any other weight is. A runtime that folds constants sees no
difference.
"""

from __future__ import annotations

import onnx_ir as ir

from qc.ir.quant import Weight, read_weight

__all__ = ["GATES", "STACKS", "direction_weights", "is_recurrent", "is_stack", "stack_readers"]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Recurrent operators, and how many matrices lie below each other in one weight."""

STACKS = (1, 2)
"""Their inputs W and R."""


def direction_weights(value: ir.Value | None) -> list[Weight] | None:
    """The matrices that a stack is made of, in order; None if it is not in canonical form."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "":
        return None
    parts = list(node.inputs) if node.op_type == "Concat" else [value]
    weights = [read_weight(_only_operand(part)) for part in parts]
    matrices = [w for w in weights if w is not None and len(w.shape) == 2]
    return matrices if len(matrices) == len(parts) else None


def _only_operand(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    unsqueezed = node is not None and node.domain == "" and node.op_type == "Unsqueeze"
    return node.inputs[0] if unsqueezed and node is not None else None


def is_stack(node: ir.Node) -> bool:
    """Whether a node is part of a stack in canonical form that recurrent layers alone read."""
    if node.domain != "" or node.op_type not in ("Unsqueeze", "Concat"):
        return False
    readers = stack_readers(node)
    return bool(readers) and all(
        is_recurrent(n) and slot in STACKS and direction_weights(n.inputs[slot]) is not None for n, slot in readers
    )


def stack_readers(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """What reads the output of a node, itself or behind ``Concat``, and in which slot."""
    found = []
    for use in node.outputs[0].uses():
        joined = use.node.domain == "" and use.node.op_type == "Concat" and node.op_type == "Unsqueeze"
        found += stack_readers(use.node) if joined else [(use.node, use.idx)]
    return found


def is_recurrent(node: ir.Node) -> bool:
    """Whether a node is a recurrent layer."""
    return node.domain == "" and node.op_type in GATES
