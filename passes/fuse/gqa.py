"""Attention with rotary embedding and a growing cache as one operator, for which runtimes have one kernel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.passes.base import Contract, Exact, Pass, Result
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    attribute,
    copy_props,
    drop_unused,
    made_by,
    main_nodes,
    rewritten,
)
from qc.passes.canonicalize.masks import Mask, describe_mask
from qc.passes.fuse.attention import merged_heads, split_again, turned_back
from qc.passes.fuse.positions import are_running

__all__ = ["FuseGroupQueryAttention"]

_MICROSOFT = "com.microsoft"
_UNIT = 8
"""The kernel takes tables whose rows are a multiple of so many angles."""


@dataclasses.dataclass(frozen=True)
class FuseGroupQueryAttention(Pass):
    """Fuses RotaryEmbedding of queries and keys, the cache's Concat and a causal Attention to ``GroupQueryAttention``.

    ``Attention(rot(q), K = Concat(past_k, rot(k)), V = Concat(past_v, v), mask)`` where

    * the mask, *evaluated*, is causal, or causal within a window (``local_window_size``), perhaps with padding;
    * past and present are inputs and outputs of the model, and nothing else reads the present;
    * both rotations, if there are any, use one table and running positions; else they stay in front of the kernel.

    The kernel writes new keys and values behind the old ones, also in place when past and present are one buffer; the
    length of the text comes from the model's attention mask: ``seqlens_k = sum(mask) - 1``, ``total = len(mask)``. The
    projections go in as one tensor. Mask arithmetic, and the input of
    positions, that nothing reads any more are removed.

    Exact where the mask of each row is ones, followed by zeros if at all, and positions run from the number of cached
    tokens on: what every generator feeds. Padding on the left, which the source may know, is not in the domain: the
    kernel reads a row's length from its mask, not its place. With a cache and several new tokens the kernel takes one
    row only.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: object = None) -> Result:
        lengths = _Lengths(model.graph)
        masks: dict[ir.Value | None, Mask] = {}
        nodes = main_nodes(model, "Attention")
        result = Result.of(model, rewritten(nodes, lambda node: _fuse(model, node, lengths, masks)))
        if result.modified:
            model.opset_imports.setdefault(_MICROSOFT, 1)
            drop_unused(model)
            _drop_positions(model.graph)
            result.notes += lengths.replace_past_lengths()
        return result


@dataclasses.dataclass(frozen=True)
class _Cache:
    """``present = Concat(past, new)`` along the sequence."""

    past: ir.Value
    new: ir.Value
    present: ir.Value


def _fuse(model: ir.Model, node: ir.Node, lengths: _Lengths, masks: dict[ir.Value | None, Mask]) -> dict[str, object]:
    """Replaces one Attention.

    Raises:
        Decline: If it is not what the kernel computes; the graph is unchanged then.
    """
    q = node.inputs[0]
    assert q is not None
    if q.dtype != ir.DataType.FLOAT:
        raise Decline("it does not compute in float32")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Decline("its cache or scores are read")
    if any(v is not None for v in node.inputs[4:]):
        raise Decline("it keeps the cache itself; only one that is a Concat in front of it is fused")
    if attribute(node, "is_causal", 0):
        raise Decline(
            "it is causal by attribute, which counts queries from the first key, not from the end of the cache"
        )
    keys, values = (_cache(node, slot) for slot in (1, 2))
    q_heads, channels = _heads(q)
    kv_heads, kv_channels = _heads(keys.new)
    if _heads(values.new) != (kv_heads, channels) or kv_channels != channels or q_heads % kv_heads:
        raise Decline("keys, values and queries differ in their channels")
    back = turned_back(node)
    window = _window(model, node.inputs[3] if len(node.inputs) > 3 else None, masks)
    lengths.require()
    rotation = _rotation(model, q, keys.new)
    sources = (q, keys.new) if rotation is None else (rotation.q, rotation.k)
    extra: list[ir.Node] = []
    inputs = _projections([*sources, values.new], node.graph, extra)
    inputs += [keys.past, values.past, *lengths.values(node)]
    if rotation is not None:
        inputs += [rotation.cos, rotation.sin]
    attributes = [
        ir.AttrInt64("num_heads", q_heads),
        ir.AttrInt64("kv_num_heads", kv_heads),
        ir.AttrInt64("do_rotary", int(rotation is not None)),
        ir.AttrInt64("rotary_interleaved", rotation.interleaved if rotation is not None else 0),
        ir.AttrInt64("local_window_size", window),
        *(node.attributes[name] for name in ("scale", "softcap") if name in node.attributes),
    ]
    fused = ir.Node(_MICROSOFT, "GroupQueryAttention", inputs, attributes, num_outputs=3, name=node.name)
    fused.outputs[0].dtype = q.dtype
    copy_props(node, [*extra, fused])
    assert node.graph is not None
    node.graph.insert_before(node, [*extra, fused])
    for cache, new in ((keys, fused.outputs[1]), (values, fused.outputs[2])):
        _take_over(new, cache.present)
    split_again(fused, back, q_heads, channels)
    copied = any(n.op_type == "Concat" for n in extra)
    return {"kernel": "GroupQueryAttention", "rotary": rotation is not None, "window": window, "copied": copied}


def _cache(node: ir.Node, slot: int) -> _Cache:
    present = node.inputs[slot]
    concat = made_by(present, "Concat")
    if concat is None or present is None or len(concat.inputs) != 2 or attribute(concat, "axis") not in (2, -2):
        raise Decline("its keys and values are not a cache followed by new ones")
    past, new = concat.inputs
    assert past is not None
    assert new is not None
    if not past.is_graph_input() or not present.is_graph_output():
        raise Decline("its cache is not an input and output of the model")
    if any(use.node is not node for use in present.uses()) or len(past.uses()) > 1 + _shape_uses(past):
        raise Decline("something else reads its cache")
    return _Cache(past, new, present)


def _shape_uses(value: ir.Value) -> int:
    """How many nodes read only the shape of a past; with one buffer for past and present it would mislead them."""
    return sum(use.node.op_type == "Shape" for use in value.uses())


def _heads(value: ir.Value) -> tuple[int, int]:
    shape = value.shape
    heads, channels = (shape[1], shape[3]) if shape is not None and len(shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(channels, int):
        raise Decline("the number of heads or channels is unknown")
    return heads, channels


def _window(model: ir.Model, value: ir.Value | None, masks: dict[ir.Value | None, Mask]) -> int:
    """The number of keys that a query sees, or -1 for all before it."""
    if value not in masks:
        masks[value] = describe_mask(model, value)
    mask = masks[value]
    if mask.kind == "causal":
        return -1
    if mask.kind == "causal_window" and mask.window is not None:
        return mask.window
    raise Decline(f"its mask is {mask.kind}, not causal" + (f": {mask.reason}" if mask.reason else ""))


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """Queries and keys in front of their common rotation."""

    q: ir.Value
    k: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: int


def _rotation(model: ir.Model, q: ir.Value, k: ir.Value) -> _Rotation | None:
    """The rotation of queries and keys that the kernel can do itself, or None."""
    nodes = [made_by(v, "RotaryEmbedding") for v in (q, k)]
    a, b = nodes
    if a is None or b is None or tuple(a.inputs[1:]) != tuple(b.inputs[1:]) or len(a.inputs) < 4:
        return None
    same = all(attribute(a, name, 0) == attribute(b, name, 0) for name in ("interleaved", "rotary_embedding_dim"))
    before_q, cos, sin, positions = a.inputs[:4]
    before_k = b.inputs[0]
    if not same or None in (before_q, before_k, cos, sin, positions):
        return None
    width = (cos.shape or (None,))[-1]  # type: ignore[union-attr]
    if not isinstance(width, int) or width % _UNIT or not are_running(model, positions):
        return None
    return _Rotation(before_q, before_k, cos, sin, int(attribute(a, "interleaved", 0)))  # type: ignore[arg-type]


def _projections(heads: list[ir.Value], graph: ir.Graph | None, extra: list[ir.Node]) -> list[ir.Value | None]:
    """Queries, keys and values ``[batch, sequence, heads * channels]``, one behind the other in the first input.

    That costs a copy where no single product made them, and is the faster for it all the same: the kernel turns and
    rotates one tensor instead of three.
    """
    merged = [_merged(value, graph, extra) for value in heads]
    parts = list(merged)
    for end in (3, 2):
        split = made_by(merged[0], "Split")
        if split is not None and tuple(split.outputs) == tuple(merged[:end]) and attribute(split, "axis", 0) in (-1, 2):
            parts = [split.inputs[0], *merged[end:]]
            break
    if len(parts) > 1:
        concat = ir.node("Concat", parts, {"axis": -1})
        out = concat.outputs[0]
        out.dtype = heads[0].dtype
        if all(v.shape is not None and isinstance(v.shape[-1], int) for v in parts):
            out.shape = ir.Shape([*parts[0].shape.dims[:-1], sum(v.shape[-1] for v in parts)])
        extra.append(concat)
        parts = [out]
    return [parts[0], None, None]


def _merged(value: ir.Value, graph: ir.Graph | None, extra: list[ir.Node]) -> ir.Value:
    """``[batch, heads, sequence, channels]`` as ``[batch, sequence, heads * channels]``, without a copy if possible."""
    try:
        return merged_heads(value)[0]
    except Decline:
        pass
    heads, channels = _heads(value)
    turned = made_by(value, "Transpose")
    if turned is not None and list(attribute(turned, "perm", [])) == [0, 2, 1, 3]:  # type: ignore[call-overload]
        apart = turned.inputs[0]
    else:
        extra.append(ir.node("Transpose", [value], {"perm": [0, 2, 1, 3]}))
        apart = extra[-1].outputs[0]
    assert graph is not None
    sizes = add_constant(graph, f"{value.name}_sizes", ir.tensor(np.array([0, 0, heads * channels], np.int64)))
    extra.append(ir.node("Reshape", [apart, sizes]))
    extra[-1].outputs[0].dtype = value.dtype
    return extra[-1].outputs[0]


def _take_over(new: ir.Value, old: ir.Value) -> None:
    """Makes `new` the model's output that `old` was."""
    new.type, new.shape = old.type, old.shape
    new.metadata_props.update(old.metadata_props)
    name, old.name = old.name, f"{old.name}.old"
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


class _Lengths:
    """``seqlens_k`` and ``total_sequence_length``, made once from the model's attention mask."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._mask = next((v for v in graph.inputs if v.metadata_props.get("qc.role") == "mask"), None)
        self._values: list[ir.Value] | None = None

    def require(self) -> None:
        if self._mask is None or self._mask.shape is None or len(self._mask.shape) != 2:
            raise Decline("the model has no attention mask [batch, length] as an input, which tells the kernel lengths")

    def values(self, before: ir.Node) -> list[ir.Value]:
        """Both values, computed in front of `before`, the first Attention of the graph."""
        if self._values is None:
            self._values = self._make(before)
        return self._values

    def replace_past_lengths(self) -> list[str]:
        """Computes what the graph still asks the past for, its length, from the mask: one buffer is longer than it.

        Returns:
            A note if something cannot be replaced.
        """
        tokens = next((v for v in self._graph.inputs if v.metadata_props.get("qc.role") == "tokens"), None)
        shapes = [
            use.node
            for value in self._graph.inputs
            if value.metadata_props.get("qc.role", "").startswith("past_")
            for use in value.uses()
            if use.node.op_type == "Shape" and attribute(use.node, "start", 0) != 0
        ]
        if not shapes:
            return []
        if tokens is None or any(
            (attribute(n, "start"), attribute(n, "end")) not in ((2, 3), (-2, -1)) for n in shapes
        ):
            return ["The graph reads the length of the cache where the kernel may be given a longer buffer."]
        assert self._mask is not None
        whole, new = (ir.node("Shape", [v], {"start": 1, "end": 2}) for v in (self._mask, tokens))
        past = ir.node("Sub", [whole.outputs[0], new.outputs[0]])
        first = next(n for n in self._graph if n in shapes)
        self._graph.insert_before(first, [whole, new, past])
        for node in shapes:
            node.outputs[0].replace_all_uses_with(past.outputs[0])
            self._graph.remove(node, safe=True)
        return []

    def _make(self, before: ir.Node) -> list[ir.Value]:
        mask, graph = self._mask, self._graph
        assert mask is not None

        def number(name: str, held: list[int] | int) -> ir.Value:
            return add_constant(graph, name, ir.tensor(np.array(held, np.int64)))

        nodes, whole = [], mask
        if mask.dtype != ir.DataType.INT64:
            nodes.append(ir.node("Cast", [mask], {"to": int(ir.DataType.INT64)}))
            whole = nodes[-1].outputs[0]
        axis, one, second = number("lengths_axis", [1]), number("lengths_one", [1]), number("lengths_second", 1)
        count = ir.node("ReduceSum", [whole, axis], {"keepdims": 0})
        last = ir.node("Sub", [count.outputs[0], one])
        lengths = ir.node("Cast", [last.outputs[0]], {"to": int(ir.DataType.INT32)})
        shape = ir.node("Shape", [mask])
        longest = ir.node("Gather", [shape.outputs[0], second], {"axis": 0})
        total = ir.node("Cast", [longest.outputs[0]], {"to": int(ir.DataType.INT32)})
        for node, short in (
            (count, False),
            (last, False),
            (lengths, True),
            (shape, False),
            (longest, False),
            (total, True),
        ):
            node.outputs[0].dtype = ir.DataType.INT32 if short else ir.DataType.INT64
        graph.insert_before(before, [*nodes, count, last, lengths, shape, longest, total])
        return [lengths.outputs[0], total.outputs[0]]


def _drop_positions(graph: ir.Graph) -> None:
    for value in tuple(graph.inputs):
        if value.metadata_props.get("qc.role") == "positions" and not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
