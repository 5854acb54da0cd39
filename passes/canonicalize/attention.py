"""Attention, written out or behind repeated heads, becomes the standard Attention on the heads as they are stored."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    attribute,
    drop_unused,
    made_by,
    main_nodes,
    operands,
    replace,
    same_dim,
    scalar,
    stored,
    too_old,
)
from qc.passes.canonicalize._heads import unrepeated

__all__ = ["RecogniseAttention"]

_LOW = -1e38  # takes any score in as lower numbers do; those next to the lowest are as -inf to some runtimes
_BANNED = -1e4  # a score at most this stands for "masked": exp of the difference to any real score is zero


@dataclasses.dataclass(frozen=True)
class RecogniseAttention(Pass):
    """Rewrites ``softmax(scale Q K^T + mask) V`` to ``Attention(Q, K, V, mask)``, with K and V as few as are stored.

    * Q, K and V have 4 axes (batch, heads, sequence, channels); K may reach the product transposed in any spelling that
      the shapes prove; the scale is a product of scalars on Q, K or the scores.
    * ``c tanh(scores / c)`` before the mask becomes ``softcap``.
    * An added mask stays as it is, several (a position bias and a mask) are summed; ``Where(allowed, scores, -large)``
      becomes an added mask, of a number that runtimes do not take for -inf: where every key is masked by a finite one,
      all count alike. A mask with one row for all queries is expanded, which runtimes ask for.
    * A guard that turns NaN to 0 behind the softmax goes: the operator yields 0 where every key is masked by -inf.
    * Heads repeated by Unsqueeze, Expand, Reshape in front of Attention are not repeated: query head h reads key head
      ``h // (query heads / key heads)``, as the operator does.

    The cache stays the Concat in front of K and V. Exact up to the order of summation.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        if (note := too_old(model)) is not None:
            return Result(model, False, [], [note])
        sites: list[Site] = []
        fresh: set[ir.Node] = set()
        for node in main_nodes(model, "Softmax"):
            try:
                fresh.add(_fuse(node))
            except Decline as reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, str(reason)))
        for node in main_nodes(model, "Attention"):
            shared = _unrepeat(node)
            changed = node in fresh or shared
            outcome = Outcome.CHANGED if changed else Outcome.MATCHED
            sites.append(Site(site_name(node), outcome, details=_heads(node)))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _heads(node: ir.Node) -> dict[str, object]:
    """Numbers of heads, where known, for the report."""
    q, k = node.inputs[0].shape, node.inputs[1].shape
    named = (("query_heads", q), ("key_heads", k))
    return {n: s[1] for n, s in named if s is not None and len(s) == 4 and isinstance(s[1], int)}


def _fuse(softmax: ir.Node) -> ir.Node:
    """Replaces the product behind `softmax` by an Attention node, which it returns.

    Raises:
        Decline: If the softmax is not one of attention as the operator defines it.
    """
    product, v = _weighted_sum(softmax)
    scores, masks = _split_masks(softmax.inputs[0])
    scores, softcap, scale = _split_softcap(scores)
    matmul = made_by(scores, "MatMul")
    if matmul is None:
        raise Decline("the softmax is not of a product of queries and keys")
    q, q_scale = _split_scale(matmul.inputs[0])
    k, k_scale = _split_scale(matmul.inputs[1])
    _check_axes(q, "queries")
    _check_axes(v, "values")
    extra: list[ir.Node] = []
    k, inner_scale = _split_scale(_untransposed(k, extra))
    _check_axes(k, "keys")
    inputs = [q, k, v]
    if masks:
        added = [_added(mask, q, extra, softmax.graph) for mask in masks]
        total = _sum(added, extra)
        if total.shape is not None and (not total.shape or (total.shape[-1] == 1 and k.shape[2] != 1)):
            raise Decline("the mask has no number for each key")
        inputs.append(_one_row_per_query(total, q, extra, softmax.graph))
    attributes = {"scale": float(scale * q_scale * k_scale * inner_scale)}
    if softcap:
        attributes["softcap"] = float(softcap)
    node = ir.node("Attention", inputs, attributes, name=product.name)
    replace(product.outputs[0], [*extra, node], like=product)
    return node


def _check_axes(value: ir.Value, what: str) -> None:
    if value.shape is None or len(value.shape) != 4:
        raise Decline(f"the {what} do not have 4 axes (batch, heads, sequence, channels)")


def _weighted_sum(softmax: ir.Node) -> tuple[ir.Node, ir.Value]:
    """The product of the attention weights with the values, and the values."""
    out = softmax.outputs[0]
    rank = len(out.shape) if out.shape is not None else None
    if attribute(softmax, "axis", -1) not in (-1, None if rank is None else rank - 1):
        raise Decline("the softmax is not over the last axis")
    products, frontier = [], [out]
    for weights in frontier:
        for use in weights.uses():
            node = use.node
            if node.domain == "" and node.op_type == "MatMul" and use.idx == 0:
                products.append(node)
            elif _is_nan_guard(node, weights):
                frontier.append(node.outputs[0])
            elif node.op_type == "Slice":
                raise Decline("the softmax runs over more than the keys (an attention sink)")
            elif node.op_type != "IsNaN":
                raise Decline(f"{node.op_type} reads the softmax")
        if weights.is_graph_output():
            raise Decline("the attention weights are an output of the model")
    if len(products) != 1:
        raise Decline("the softmax weighs no values")
    return products[0], products[0].inputs[1]


def _is_nan_guard(node: ir.Node, weights: ir.Value) -> bool:
    """Whether `node` is ``Where(IsNaN(w), 0, w)``."""
    if node.domain != "" or node.op_type != "Where" or node.inputs[2] is not weights:
        return False
    test = made_by(node.inputs[0], "IsNaN")
    return test is not None and test.inputs[0] is weights and scalar(node.inputs[1]) == 0.0


@dataclasses.dataclass(frozen=True)
class _Mask:
    """A mask that is added, or one that says which scores stay while the others become `banned`."""

    value: ir.Value
    banned: ir.Value | None = None
    inverted: bool = False


def _split_masks(scores: ir.Value) -> tuple[ir.Value, list[_Mask]]:
    """The scores before masking and the masks, the one applied last first."""
    masks: list[_Mask] = []
    while (step := _masked(scores)) is not None:
        scores, mask = step
        masks.append(mask)
    return scores, masks


def _masked(scores: ir.Value) -> tuple[ir.Value, _Mask] | None:
    where, add = made_by(scores, "Where"), made_by(scores, "Add")
    if where is not None:
        for kept, banned, inverted in ((where.inputs[1], where.inputs[2], False), (*where.inputs[:0:-1], True)):
            number = scalar(banned)
            if number is not None and number <= _BANNED:
                return kept, _Mask(where.inputs[0], banned, inverted)
        raise Decline("the scores are selected between, but not masked by a large negative number")
    for kept, mask in operands(add) if add is not None else ():
        if _is_scores(kept):
            return kept, _Mask(mask)
    return None


def _is_scores(value: ir.Value | None) -> bool:
    """Whether `value` is a product of two computed values, perhaps scaled, capped or masked."""
    for _ in range(6):
        node = made_by(value, "MatMul", "Mul", "Div", "Tanh", "Add", "Where")
        if node is None:
            return False
        if node.op_type == "MatMul":
            return stored(node.inputs[1]) is None
        if node.op_type in ("Add", "Where"):
            return any(_is_scores(v) for v in node.inputs)
        if node.op_type == "Tanh" or scalar(node.inputs[1]) is not None:
            value = node.inputs[0]
        elif node.op_type == "Mul" and scalar(node.inputs[0]) is not None:
            value = node.inputs[1]
        else:
            return False
    return False


def _split_softcap(scores: ir.Value) -> tuple[ir.Value, float, float]:
    """``c tanh(a s / c) -> s, c, a``; uncapped scores ``a s -> s, 0, a``."""
    outer = made_by(scores, "Mul")
    for capped, factor in operands(outer) if outer is not None else ():
        tanh, cap = made_by(capped, "Tanh"), scalar(factor)
        if tanh is None or cap is None:
            continue
        inner, ratio = _split_scale(tanh.inputs[0])
        return inner, cap, ratio * cap
    scores, scale = _split_scale(scores)
    return scores, 0.0, scale


def _split_scale(value: ir.Value) -> tuple[ir.Value, float]:
    """``a x -> x, a`` for nested products and quotients with scalars."""
    scale = 1.0
    while (step := _scaled(value)) is not None:
        value, factor = step
        scale *= factor
    return value, scale


def _scaled(value: ir.Value) -> tuple[ir.Value, float] | None:
    multiply, divide = made_by(value, "Mul"), made_by(value, "Div")
    if divide is not None and (number := scalar(divide.inputs[1])) is not None and number != 0:
        return divide.inputs[0], 1 / number
    for x, factor in operands(multiply) if multiply is not None else ():
        if (number := scalar(factor)) is not None and scalar(x) is None:
            return x, number
    return None


def _untransposed(value: ir.Value, extra: list[ir.Node]) -> ir.Value:
    """The keys ``[batch, heads, sequence, channels]`` of which `value` is the transpose of the last two axes."""
    transpose = made_by(value, "Transpose")
    perm = attribute(transpose, "perm") if transpose is not None else None
    if perm is not None and len(perm) == 4:
        source = transpose.inputs[0]
        if tuple(perm) == (0, 1, 3, 2):
            return source
        order = (perm[0], perm[1], perm[3], perm[2])
        extra.append(ir.node("Transpose", [source], {"perm": order}))
        made = extra[-1].outputs[0]
        made.type = source.type
        made.shape = ir.Shape([source.shape[i] for i in order]) if source.shape is not None else None
        return made
    # Reshape to [-1, S, D], Transpose, Reshape back: how the exporter transposes for opsets below 23.
    back = made_by(value, "Reshape")
    flat = made_by(back.inputs[0], "Transpose") if back is not None else None
    merge = made_by(flat.inputs[0], "Reshape") if flat is not None else None
    if merge is None or list(attribute(flat, "perm")) != [0, 2, 1]:
        raise Decline("the keys are not transposed in a known way")
    source = merge.inputs[0]
    if not _swapped(source, value, merge.outputs[0]):
        raise Decline("the shapes do not prove that the keys are transposed")
    return source


def _swapped(source: ir.Value, value: ir.Value, merged: ir.Value) -> bool:
    """Whether the shapes show that `value` is `source` with its last two axes swapped, by way of 3-axis `merged`."""
    if source.shape is None or len(source.shape) != 4:
        return False
    channels = source.shape[-1]
    if value.shape is not None and len(value.shape) == 4:
        order = [source.shape[i] for i in (0, 1, 3, 2)]
        return all(same_dim(a, b) for a, b in zip(order, value.shape, strict=True))
    # Without shapes: the inner Reshape takes its last two sizes from the source itself.
    sizes = made_by(made_by(merged, "Reshape").inputs[1], "Concat")
    if sizes is None or len(sizes.inputs) != 3 or not isinstance(channels, int):
        return False
    origin = [_dim_of(v, source) for v in sizes.inputs[1:]]
    return origin == [-2, -1]


def _dim_of(value: ir.Value | None, source: ir.Value) -> int | None:
    """The (negative) axis of `source` whose size `value` is, if it is cut from ``Shape(source)``."""
    piece = made_by(value, "Slice")
    shape = made_by(piece.inputs[0], "Shape") if piece is not None else None
    if shape is None or shape.inputs[0] is not source:
        return None
    start = scalar(piece.inputs[1])
    return int(start) if start is not None else None


def _added(mask: _Mask, q: ir.Value, extra: list[ir.Node], graph: ir.Graph) -> ir.Value:
    """The mask as a value that is added to the scores."""
    if mask.banned is None:
        return mask.value
    zero = add_constant(graph, f"{mask.value.name}_zero", ir.tensor(np.zeros((), q.dtype.numpy())))
    banned, number = mask.banned, scalar(mask.banned)
    if number is not None and -np.inf < number < _LOW:
        banned = add_constant(graph, f"{mask.value.name}_low", ir.tensor(np.array(_LOW, q.dtype.numpy())))
    chosen = [mask.value, banned, zero] if mask.inverted else [mask.value, zero, banned]
    extra.append(ir.node("Where", chosen))
    made = extra[-1].outputs[0]
    made.type, made.shape = q.type, mask.value.shape
    return made


def _sum(values: list[ir.Value], extra: list[ir.Node]) -> ir.Value:
    total = values[0]
    for value in values[1:]:
        extra.append(ir.node("Add", [value, total]))
        made = extra[-1].outputs[0]
        made.type = value.type
        if value.shape is not None and total.shape is not None and len(value.shape) == len(total.shape):
            pairs = zip(value.shape, total.shape, strict=True)
            made.shape = ir.Shape([b if a == 1 else a for a, b in pairs])
        total = made
    return total


def _one_row_per_query(value: ir.Value, q: ir.Value, extra: list[ir.Node], graph: ir.Graph) -> ir.Value:
    rows = value.shape[-2] if value.shape is not None and len(value.shape) > 1 else None
    if rows is not None and same_dim(rows, q.shape[2]):
        return value
    one = add_constant(graph, f"{q.name}_one", ir.tensor(np.array([1], np.int64)))
    extra.append(ir.node("Shape", [q], {"start": 2, "end": 3}))
    extra.append(ir.node("Concat", [extra[-1].outputs[0], one], {"axis": 0}))
    extra.append(ir.node("Expand", [value, extra[-1].outputs[0]]))
    made = extra[-1].outputs[0]
    made.type = value.type
    if value.shape is not None and len(value.shape) > 1:
        made.shape = ir.Shape([*value.shape[:-2], q.shape[2], value.shape[-1]])
    return made


def _unrepeat(node: ir.Node) -> bool:
    """Feeds Attention with the heads in front of their repetition; returns whether there was one."""
    q, k, v = node.inputs[:3]
    if q.shape is None or len(q.shape) != 4 or not isinstance(q.shape[1], int):
        return False
    few = [unrepeated(value, q.shape[1]) for value in (k, v)]
    if any(f is None for f in few) or few[0].shape[1] != few[1].shape[1]:
        return False
    node.replace_input_with(1, few[0])
    node.replace_input_with(2, few[1])
    return True
