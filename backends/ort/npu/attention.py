"""Attention as two products, an added mask, which is computed outside, and a softmax."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer, finished
from qc.backends.ort.npu.outside import may_stay_outside, put_outside
from qc.passes.base import Contract, Exact, Pass, Result
from qc.passes.canonicalize._graph import Decline, attribute, main_nodes, replace, rewritten, same_dim

__all__ = ["LOWEST", "MASKED", "WriteOutAttention"]

MASKED = "qc.masked"
"""Metadata property of the addition of a mask to scores."""

LOWEST = -1e4
"""What hides a position until the range of the scores is known."""


@dataclasses.dataclass(frozen=True)
class WriteOutAttention(Pass):
    """Replaces ``Attention(q, k, v, mask)`` by ``MatMul(Softmax(MatMul(q * scale, kᵀ) + mask), v)``.

    Heads that share keys are stacked along the sequence: ``q [B, G H, S, D]`` is read as ``[B, H, G S, D]``, so keys
    and values are not repeated. A mask of booleans becomes one of ``0`` and `LOWEST`, one of floats is cut there; where
    there is none but the model reads texts of any length, one that hides nothing is made, so that padding can be
    hidden. Exact but for scores that a mask puts below ``LOWEST``. Left alone: operands of other ranks, outputs of
    scores, unknown numbers of heads.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: object = None) -> Result:
        masks: dict[tuple[object, ...], ir.Value | None] = {}
        nodes = main_nodes(model, "Attention")
        return finished(model, rewritten(nodes, lambda node: _write_out(model.graph, node, masks)))


def _write_out(graph: ir.Graph, node: ir.Node, masks: dict[tuple[object, ...], ir.Value | None]) -> None:
    q, k, v, mask, past_key, past_value = (*node.inputs, None, None, None)[:6]
    if attribute(node, "qk_matmul_output_mode", 0) or any(o.uses() or o.is_graph_output() for o in node.outputs[3:]):
        raise Decline("its scores are read")
    if any(x.dtype != ir.DataType.FLOAT for x in (q, k, v)):
        raise Decline("its operands are not FLOAT")
    write = Writer(graph, node)
    merged = q.shape is not None and q.shape.rank() == 3
    if merged:
        counts = [attribute(node, n) for n in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
        q, k, v = (_split(write, x, n) for x, n in zip((q, k, v), counts, strict=True))
    shapes = [x.shape for x in (q, k, v)]
    if any(s is None or s.rank() != 4 for s in shapes):
        raise Decline("its operands are not separate heads")
    heads, shared, width = shapes[0][1], shapes[1][1], shapes[0][3]
    if not all(isinstance(n, int) for n in (heads, shared, width)) or shapes[2][1] != shared or heads % shared:
        raise Decline("the number of its heads is not known")
    presents = []
    for new, past in ((k, past_key), (v, past_value)):
        presents.append(new if past is None else write.add("Concat", past, new, axis=-2))
    for held, old in zip(presents, node.outputs[1:3], strict=False):
        if old.uses() or old.is_graph_output():
            held.name, held.shape = old.name, old.shape
            held.metadata_props.update(old.metadata_props)
            old.replace_all_uses_with(held, replace_graph_outputs=True)
    length = node.outputs[1].shape[2] if past_key is not None and len(node.outputs) > 1 else shapes[1][2]
    group = heads // shared
    causal = bool(attribute(node, "is_causal", 0))
    if causal and past_key is None and not same_dim(shapes[0][2], shapes[1][2]):
        raise Decline("it is causal over keys of another length, which runtimes align in two ways")
    key = (mask, causal, shapes[0][2], length, group)
    if key not in masks:
        fixed = isinstance(length, int) or not any(v.metadata_props.get("qc.role") == "tokens" for v in graph.inputs)
        masks[key] = _mask(write, q, presents[0], mask, causal=causal, fixed=fixed, group=group)
    keys, values, hidden = presents[0], presents[1], masks[key]
    given = float(attribute(node, "scale", 0.0))  # type: ignore[arg-type]
    scale = write.constant("scale", np.array(given or float(width) ** -0.5, np.float32))
    x = write.add("Mul", q, scale)
    if group > 1:
        x = write.add("Reshape", x, write.integers("stacked", 0, shared, -1, width))
    scores = write.add("MatMul", x, write.add("Transpose", keys, perm=[0, 1, 3, 2]))
    cap = float(attribute(node, "softcap", 0.0))  # type: ignore[arg-type]
    if cap:
        scores = write.add("Div", scores, write.constant("cap", np.array(cap, np.float32)))
        scores = write.add("Mul", write.add("Tanh", scores), write.constant("cap", np.array(cap, np.float32)))
    if hidden is not None:
        scores = write.add("Add", scores, hidden)
        write.nodes[-1].metadata_props[MASKED] = "true"
    out = write.add("MatMul", write.add("Softmax", scores, axis=-1), values)
    if group > 1:
        out = write.add("Reshape", out, write.integers("heads", 0, heads, -1, shapes[2][3]))
    if merged:
        out = write.add("Transpose", out, perm=[0, 2, 1, 3])
        write.add("Reshape", out, write.integers("merged", 0, 0, heads * shapes[2][3]))
    replace(node.outputs[0], write.nodes, like=node)


def _split(write: Writer, x: ir.Value, heads: object) -> ir.Value:
    """``[B, S, H D]`` as ``[B, H, S, D]``."""
    if x.shape is None or not isinstance(x.shape[-1], int) or not isinstance(heads, int):
        raise Decline("the number of its heads is not known")
    width = x.shape[2] // heads
    apart = write.add("Reshape", x, write.integers("apart", 0, 0, heads, width))
    out = write.add("Transpose", apart, perm=[0, 2, 1, 3])
    out.shape = ir.Shape([x.shape[0], heads, x.shape[1], width])
    return out


def _mask(
    write: Writer, q: ir.Value, keys: ir.Value, mask: ir.Value | None, *, causal: bool, fixed: bool, group: int
) -> ir.Value | None:
    """The mask to be added, ``[B or 1, H or 1, G S, T]``; None if nothing can be hidden."""
    if mask is None and not causal and fixed:
        return None
    lowest = write.constant("lowest", np.array(LOWEST, np.float32))
    if mask is not None and mask.dtype != ir.DataType.BOOL:
        added = write.add("Max", mask, lowest)
    else:
        shown = mask if mask is not None else _everything(write, q, keys)
        if causal:
            shown = write.add("And", shown, _causal(write, q, keys), dtype=ir.DataType.BOOL)
        zero = write.constant("shown", np.array(0, np.float32))
        added = write.add("Where", shown, zero, lowest, dtype=ir.DataType.FLOAT)
    shape = mask.shape if mask is not None else ir.Shape([1, 1, q.shape[2], keys.shape[2]])
    if shape is None:
        raise Decline("the rank of its mask is not known")
    if shape.rank() < 4:
        added = write.add("Unsqueeze", added, write.integers("axes", *range(4 - shape.rank())))
        shape = ir.Shape([1] * (4 - shape.rank()) + list(shape))
    if causal and mask is not None:
        shape = ir.Shape([shape[0], shape[1], q.shape[2], keys.shape[2]])
    if shape[1] not in (1, q.shape[1]):
        raise Decline("its mask has another number of heads")
    added.shape = shape
    if may_stay_outside(added):
        put_outside(added, LOWEST)
    if group == 1 or (shape[1] == 1 and shape[2] == 1):
        return added
    if shape[1] != 1:
        return write.add("Reshape", added, write.integers("stacked_mask", 0, q.shape[1] // group, -1, 0))
    return write.add("Concat", *[added] * group, axis=2)


def _everything(write: Writer, q: ir.Value, keys: ir.Value) -> ir.Value:
    sizes = write.add("Concat", write.integers("ones", 1, 1), *_lengths(write, q, keys), axis=0)
    return write.add("ConstantOfShape", sizes, dtype=ir.DataType.BOOL, value=ir.tensor(np.array([True])))


def _causal(write: Writer, q: ir.Value, keys: ir.Value) -> ir.Value:
    """Whether key ``t`` stands at or before query ``s``, which is aligned to the end: ``t <= s + T - S``."""
    zero, one = write.constant("first", np.array(0, np.int64)), write.constant("step", np.array(1, np.int64))
    none = write.integers("axis_0", 0)
    new, all_ = (write.add("Squeeze", n, none) for n in _lengths(write, q, keys))
    places = [write.add("Range", zero, n, one) for n in (new, all_)]
    last = write.add("Add", places[0], write.add("Sub", all_, new))
    column = write.add("Unsqueeze", last, write.integers("axis_1", 1))
    return write.add("LessOrEqual", places[1], column, dtype=ir.DataType.BOOL)


def _lengths(write: Writer, q: ir.Value, keys: ir.Value) -> tuple[ir.Value, ir.Value]:
    new, all_ = (write.add("Shape", x, dtype=ir.DataType.INT64, start=2, end=3) for x in (q, keys))
    return new, all_
