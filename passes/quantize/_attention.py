"""Puts both products of an attention on grids: ``softmax(Q' K'^T s + M)' V'``.

An ``Attention`` that is one operator hides its probabilities, so it is written out first. The scale of the scores goes
into the step with which codes of queries are decoded, and a mask that selects is turned into one that adds: either
would take a pass over all scores otherwise. Masks are no operands of a product and stay as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.passes.canonicalize._graph import add_constant, replace
from qc.passes.quantize._ranges import Grid
from qc.passes.quantize._static import pair

__all__ = ["operands", "why_not", "write_out"]

_FORBIDDEN = {"is_causal": "it is causal", "softcap": "it caps its scores", "qk_matmul_output_mode": "it yields scores"}
"""Attributes of an ``Attention`` that must be zero, and the reason otherwise."""

_LOWEST = float(np.finfo(np.float32).min)


def why_not(node: ir.Node) -> str:
    """Why an ``Attention`` is left alone; empty if it can be written out."""
    if any(v is not None for v in node.inputs[4:]) or any(o.uses() for o in node.outputs[1:]):
        return "it reads or yields a key-value cache"
    for name, reason in _FORBIDDEN.items():
        if name in node.attributes and node.attributes[name].value:
            return reason
    shapes = [v.shape if v is not None else None for v in node.inputs[:3]]
    if any(s is None or s.rank() != 4 for s in shapes):
        return "its operands are not separate heads"
    heads = {s[1] for s in shapes if s is not None}
    if len(heads) != 1 or not all(isinstance(h, int) for h in heads):
        return "its queries have more heads than its keys"
    if any(v is None or v.dtype != ir.DataType.FLOAT for v in node.inputs[:3]):
        return "its operands are not FLOAT"
    if not isinstance(shapes[0][3], int):  # type: ignore[index]
        return "the size of its heads is not known"
    return ""


def operands(node: ir.Node) -> list[ir.Value]:
    """Queries, keys and values."""
    return [v for v in node.inputs[:3] if v is not None]


def write_out(model: ir.Model, node: ir.Node, grids: list[Grid]) -> None:
    """Replaces an ``Attention`` by products of queries, keys, probabilities and values on grids.

    Args:
        model: The model.
        node: An ``Attention`` for which `why_not` is empty.
        grids: Of queries, keys, values.
    """
    graph, (q, k, v) = model.graph, operands(node)
    mask = (*node.inputs, None)[3]
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes))  # type: ignore[arg-type]
        nodes[-1].outputs[0].dtype = ir.DataType.FLOAT
        return nodes[-1].outputs[0]

    def on_grid(value: ir.Value, grid: Grid, name: str, perm: list[int] | None = None) -> ir.Value:
        made = pair(model, value, grid, name)
        if perm is not None:
            codes, shape = made[0].outputs[0], value.shape
            turn = ir.node("Transpose", [codes], {"perm": perm})
            turn.outputs[0].type = codes.type
            made[1].replace_input_with(0, turn.outputs[0])
            made[1].outputs[0].shape = ir.Shape([shape[i] for i in perm]) if shape is not None else None
            made.insert(1, turn)
        nodes.extend(made)
        return made[-1].outputs[0]

    def number(name: str, value: float) -> ir.Value:
        return add_constant(graph, f"{node.outputs[0].name}.{name}", ir.tensor(np.array(value, np.float32)))

    width = q.shape[3] if q.shape is not None else 1
    given = node.attributes["scale"].as_float() if "scale" in node.attributes else 0.0
    scale = given or float(width) ** -0.5  # type: ignore[arg-type]
    queries = on_grid(q, grids[0], f"{node.outputs[0].name}.queries")
    nodes[-1].replace_input_with(1, number("scale", float(grids[0].scale) * scale))
    scores = add("MatMul", [queries, on_grid(k, grids[1], f"{node.outputs[0].name}.keys", [0, 1, 3, 2])])
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        mask = add("Where", [mask, number("nothing", 0.0), number("lowest", _LOWEST)])
        mask.shape = (*node.inputs, None)[3].shape
    if mask is not None:
        scores = add("Add", [scores, mask])
    shares = add("Softmax", [scores], axis=-1)
    unit = Grid.of(0.0, 1.0, grids[2].bits, symmetric=False)
    shares = on_grid(shares, unit, f"{node.outputs[0].name}.shares")
    add("MatMul", [shares, on_grid(v, grids[2], f"{node.outputs[0].name}.values")])
    replace(node.outputs[0], nodes, like=node)
