"""Operators that no NPU has, in terms of those that all have.

| canonical | becomes |
|---|---|
| ``Attention`` | two products, an added mask and a softmax; the mask is computed outside |
| ``RotaryEmbedding`` | ``x * cos + turned(x) * sin``; both tables are looked up outside |
| ``qc.Swish`` | ``x * sigmoid(alpha * x)`` |
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu.outside import may_stay_outside, put_outside
from qc.ir import dialect
from qc.ir.simplify import infer_shapes
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    attribute,
    drop_unused,
    main_nodes,
    replace,
    same_dim,
)

__all__ = ["LOWEST", "MASKED", "WriteOutActivations", "WriteOutAttention", "WriteOutRotary"]

MASKED = "qc.masked"
"""Metadata property of the addition of a mask to scores."""

LOWEST = -1e4
"""What hides a position until the range of the scores is known."""


class _Writer:
    """Nodes that replace one node, in order."""

    def __init__(self, graph: ir.Graph, like: ir.Node) -> None:
        self.graph, self.like = graph, like
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: object) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)  # type: ignore[arg-type]
        self.nodes.append(node)
        out = node.outputs[0]
        out.name = f"{self.like.outputs[0].name}.{op_type.lower()}_{len(self.nodes)}"
        out.dtype = dtype or inputs[0].dtype
        return out

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_constant(self.graph, f"{self.like.outputs[0].name}.{name}", ir.tensor(array))

    def integers(self, name: str, *numbers: int) -> ir.Value:
        return self.constant(name, np.array(numbers, np.int64))

    def before(self, node: ir.Node) -> None:
        """Puts what was written so far in front of `node`, not in place of it."""
        for new in self.nodes:
            new.metadata_props.update(self.like.metadata_props)
        self.graph.insert_before(node, self.nodes)
        self.nodes = []


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
        sites = []
        masks: dict[tuple[object, ...], ir.Value | None] = {}
        for node in main_nodes(model, "Attention"):
            try:
                _write_out(model.graph, node, masks)
            except Decline as reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, str(reason)))
            else:
                sites.append(Site(site_name(node), Outcome.CHANGED))
        return _finish(model, sites)


def _write_out(graph: ir.Graph, node: ir.Node, masks: dict[tuple[object, ...], ir.Value | None]) -> None:
    q, k, v, mask, past_key, past_value = (*node.inputs, None, None, None)[:6]
    if attribute(node, "qk_matmul_output_mode", 0) or any(o.uses() or o.is_graph_output() for o in node.outputs[3:]):
        raise Decline("its scores are read")
    if any(x.dtype != ir.DataType.FLOAT for x in (q, k, v)):
        raise Decline("its operands are not FLOAT")
    write = _Writer(graph, node)
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


def _split(write: _Writer, x: ir.Value, heads: object) -> ir.Value:
    """``[B, S, H D]`` as ``[B, H, S, D]``."""
    if x.shape is None or not isinstance(x.shape[-1], int) or not isinstance(heads, int):
        raise Decline("the number of its heads is not known")
    width = x.shape[2] // heads
    apart = write.add("Reshape", x, write.integers("apart", 0, 0, heads, width))
    out = write.add("Transpose", apart, perm=[0, 2, 1, 3])
    out.shape = ir.Shape([x.shape[0], heads, x.shape[1], width])
    return out


def _mask(
    write: _Writer, q: ir.Value, keys: ir.Value, mask: ir.Value | None, *, causal: bool, fixed: bool, group: int
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
        put_outside(added)
    if group == 1 or (shape[1] == 1 and shape[2] == 1):
        return added
    if shape[1] != 1:
        return write.add("Reshape", added, write.integers("stacked_mask", 0, q.shape[1] // group, -1, 0))
    return write.add("Concat", *[added] * group, axis=2)


def _everything(write: _Writer, q: ir.Value, keys: ir.Value) -> ir.Value:
    sizes = write.add("Concat", write.integers("ones", 1, 1), *_lengths(write, q, keys), axis=0)
    return write.add("ConstantOfShape", sizes, dtype=ir.DataType.BOOL, value=ir.tensor(np.array([True])))


def _causal(write: _Writer, q: ir.Value, keys: ir.Value) -> ir.Value:
    """Whether key ``t`` stands at or before query ``s``, which is aligned to the end: ``t <= s + T - S``."""
    zero, one = write.constant("first", np.array(0, np.int64)), write.constant("step", np.array(1, np.int64))
    none = write.integers("axis_0", 0)
    new, all_ = (write.add("Squeeze", n, none) for n in _lengths(write, q, keys))
    places = [write.add("Range", zero, n, one) for n in (new, all_)]
    last = write.add("Add", places[0], write.add("Sub", all_, new))
    column = write.add("Unsqueeze", last, write.integers("axis_1", 1))
    return write.add("LessOrEqual", places[1], column, dtype=ir.DataType.BOOL)


def _lengths(write: _Writer, q: ir.Value, keys: ir.Value) -> tuple[ir.Value, ir.Value]:
    new, all_ = (write.add("Shape", x, dtype=ir.DataType.INT64, start=2, end=3) for x in (q, keys))
    return new, all_


@dataclasses.dataclass(frozen=True)
class WriteOutRotary(Pass):
    """Replaces ``RotaryEmbedding(x, cos, sin, positions)`` by ``cos' * x + sin' * turned(x)``.

    With the halves ``x = [a, b, rest]`` of the channels that rotate: ``turned(x) = [b, a, rest]``,
    ``cos' = [cos, cos, 1]``, ``sin' = [-sin, sin, 0]``; interleaved channels are turned pair by pair. Exact. Left
    alone: heads that are not separate, and widths that are not known.
    """

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        tables: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
        for node in main_nodes(model, "RotaryEmbedding"):
            try:
                _turn(model.graph, node, tables)
            except Decline as reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, str(reason)))
            else:
                sites.append(Site(site_name(node), Outcome.CHANGED))
        return _finish(model, sites)


def _turn(graph: ir.Graph, node: ir.Node, tables: dict[tuple[object, ...], tuple[ir.Value, ir.Value]]) -> None:
    x, cos, sin, positions = (*node.inputs, None)[:4]
    if x.shape is None or x.shape.rank() != 4 or not isinstance(x.shape[3], int):
        raise Decline("its heads are not separate, or their width is not known")
    half = cos.shape[-1] if cos.shape is not None else None
    if not isinstance(half, int):
        raise Decline("the number of channels that rotate is not known")
    width, interleaved = x.shape[3], bool(attribute(node, "interleaved", 0))
    write = _Writer(graph, node)
    key = (cos, sin, positions, width, interleaved)
    if key not in tables:
        tables[key] = _tables(write, cos, sin, positions, width, interleaved=interleaved)
    wide_cos, wide_sin = tables[key]
    turned = _turned(write, x, half, interleaved=interleaved)
    # Tables first: the simulator of QNN 2.7 multiplies a normalized value wrongly with one that is an input behind it.
    write.add("Add", write.add("Mul", wide_cos, x), write.add("Mul", wide_sin, turned))
    replace(node.outputs[0], write.nodes, like=node)


def _tables(
    write: _Writer, cos: ir.Value, sin: ir.Value, positions: ir.Value | None, width: int, *, interleaved: bool
) -> tuple[ir.Value, ir.Value]:
    """``cos'`` and ``sin'`` ``[B, 1, S, D]`` of the positions at hand."""
    half, found = cos.shape[-1], []
    for table, sign, rest in ((cos, 1.0, 1.0), (sin, -1.0, 0.0)):
        looked_up = table if positions is None else write.add("Gather", table, positions, axis=0)
        shape = positions.shape if positions is not None else table.shape[:-1]
        other = looked_up if sign > 0 else write.add("Neg", looked_up)
        if interleaved:
            axis = write.integers("last", -1)
            pairs = write.add("Concat", *(write.add("Unsqueeze", v, axis) for v in (other, looked_up)), axis=-1)
            wide = write.add("Reshape", pairs, write.integers("pairs", 0, 0, 2 * half))
        else:
            wide = write.add("Concat", other, looked_up, axis=-1)
        if width > 2 * half:
            fill = write.constant("rest", np.array([0, 0, 0, 0, 0, width - 2 * half], np.int64))
            wide = write.add("Pad", wide, fill, write.constant("fill", np.array(rest, np.float32)))
        wide = write.add("Unsqueeze", wide, write.integers("heads_axis", 1))
        wide.shape = ir.Shape([shape[0], 1, shape[1], width])
        if may_stay_outside(wide):
            put_outside(wide)
        found.append(wide)
    return found[0], found[1]


def _turned(write: _Writer, x: ir.Value, half: int, *, interleaved: bool) -> ir.Value:
    width = x.shape[3]
    if interleaved:
        order = np.arange(width)
        order[: 2 * half] = order[: 2 * half].reshape(-1, 2)[:, ::-1].reshape(-1)
        return write.add("Gather", x, write.constant("pairs_turned", order.astype(np.int64)), axis=3)
    axis = write.integers("channels", 3)
    ends = [(half, 2 * half), (0, half), (2 * half, width)]
    parts = [
        write.add("Slice", x, write.integers("start", a), write.integers("end", b), axis) for a, b in ends if a < b
    ]
    return write.add("Concat", *parts, axis=3)


@dataclasses.dataclass(frozen=True)
class WriteOutActivations(Pass):
    """Replaces ``qc.Swish(x)`` by ``x * sigmoid(alpha * x)``, which every NPU has. Exact."""

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in [n for n in model.graph if dialect.is_op(n, "Swish")]:
            write, (x,) = _Writer(model.graph, node), node.inputs
            alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
            scaled = x if alpha == 1 else write.add("Mul", x, write.constant("alpha", np.array(alpha, np.float32)))
            write.add("Mul", x, write.add("Sigmoid", scaled))
            replace(node.outputs[0], write.nodes, like=node)
            sites.append(Site(site_name(node), Outcome.CHANGED))
        return _finish(model, sites)


def _finish(model: ir.Model, sites: list[Site]) -> Result:
    result = Result.of(model, sites)
    if result.modified:
        drop_unused(model)
        dialect.sync_functions(model)
        infer_shapes(model)
    return result
