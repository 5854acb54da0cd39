"""Recurrent layers whose batch comes first read and yield turned values instead: no runtime has kernels for them."""

from __future__ import annotations

import onnx_ir as ir

from qc.ir.recurrent import is_recurrent
from qc.ir.simplify import all_graphs

__all__ = ["put_time_first"]

_SWAPPED = [1, 0, 2]
_INPUTS = (0, 5, 6)
"""The sequence, and the first states of layers and cells; lengths, the fifth, have one axis."""

_RESULTS = ([2, 0, 1, 3], _SWAPPED, _SWAPPED)
"""How every state, the last one, and that of cells become those of ``layout = 1``."""


def put_time_first(model: ir.Model) -> None:
    """Rewrites ``y = LSTM<layout = 1>(x, ...)`` to ``y = Transpose(LSTM(Transpose(x), ...))``, and the like. Exact."""
    for graph in all_graphs(model):
        for node in tuple(graph):
            held = node.attributes.get("layout") if is_recurrent(node) else None
            if held is not None and node.attributes.pop("layout").as_int() == 1:
                _turn(node)


def _turn(node: ir.Node) -> None:
    graph = node.graph
    assert graph is not None
    for slot in _INPUTS:
        value = node.inputs[slot] if slot < len(node.inputs) else None
        if value is not None:
            turned = ir.node("Transpose", [value], {"perm": _SWAPPED})
            graph.insert_before(node, turned)
            node.replace_input_with(slot, turned.outputs[0])
    for value, perm in zip(node.outputs, _RESULTS, strict=False):
        back = ir.node("Transpose", [value], {"perm": perm})
        out = back.outputs[0]
        out.name, out.type, out.shape = value.name, value.type, value.shape
        value.replace_all_uses_with(out, replace_graph_outputs=True)
        back.replace_input_with(0, value)
        value.name, value.shape = None, None
        graph.insert_after(node, back)
