"""Tracers of operators that compute: they end channels, start channels, or tie several."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.ir._channels_shapes import attribute, numbers
from qc.ir._channels_table import Rule
from qc.ir._channels_trace import Cells, Trace, operator_name, register
from qc.ir._channels_view import View, dims_of


@register("elementwise")
def _elementwise(trace: Trace, node: ir.Node, rule: Rule) -> None:
    _unary(trace, node, operator_name(node), rule.degree)


def _unary(trace: Trace, node: ir.Node, key: str, degree: float) -> None:
    view = trace.views[node.inputs[0]]
    trace.limit(view.ids, key, node)
    out = view
    if degree != 1.0:
        out = View(view.axes, trace.new(view.ids.shape))
        trace.tie(view.ids, out.ids, factor=False)
        trace.equate(node, (-1.0, out.ids), (degree, view.ids))
    trace.set(node.outputs[0], out)


@register("power")
def _power(trace: Trace, node: ir.Node, rule: Rule) -> None:
    held = numbers(node.inputs[1])
    if node.inputs[0] not in trace.views or held is None or held.size != 1 or held[0] == 0:
        trace.opaque(node)
        return
    _unary(trace, node, "Pow", float(held[0]))


class _Operands:
    """The operands of an elementwise operator, their channels aligned as broadcasting aligns them."""

    def __init__(self, trace: Trace, node: ir.Node, slots: list[int], role: str) -> None:
        out = dims_of(node.outputs[0])
        self.axes: tuple[int, ...] = ()
        self.ids: list[np.ndarray | None] = []
        """Channels of each operand over `axes`; None where it has one number for all channels."""
        self.constant: list[bool] = []
        self.zero: list[bool] = []
        self.aligned = out is not None
        if out is None:
            return
        added = {s: len(out) - len(dims_of(node.inputs[s]) or ()) for s in slots}
        tracked = {
            a + added[s] for s in slots if node.inputs[s] in trace.views for a in trace.views[node.inputs[s]].axes
        }
        self.axes = tuple(sorted(tracked))
        for slot in slots:
            self._take(trace, node, slot, added[slot], role)

    def _take(self, trace: Trace, node: ir.Node, slot: int, added: int, role: str) -> None:
        value = node.inputs[slot]
        dims = dims_of(value)
        constant = value not in trace.views and trace.is_constant(value)
        self.zero.append(role == "bias" and _is_zero(value))
        self.constant.append(constant)
        self.ids.append(None)
        if self.zero[-1]:
            return
        if dims is None:
            self.aligned = False
            return
        own = [a - added for a in self.axes]
        wide = [a for a in own if a >= 0 and dims[a] != 1]
        if not wide:
            if value in trace.views:
                self.aligned = False
            return
        ids = trace.parameter(node, slot, role, wide) if constant else trace.channels(value, wide, node)
        if ids is None:
            self.aligned = False
            return
        shape = [dims[a] if a in wide else 1 for a in own]
        self.ids[-1] = ids.reshape(shape)


def _is_zero(value: ir.Value | None) -> bool:
    """Whether all elements are known to be zero: a sum often starts so."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in ("Expand", "Cast", "Reshape"):
        return _is_zero(node.inputs[0])
    held = numbers(value)
    return held is not None and not held.any()


@register("add")
def _add(trace: Trace, node: ir.Node, rule: Rule) -> None:
    if not any(v in trace.views for v in node.inputs):
        return
    _sum_of(trace, node, list(range(len(node.inputs))), operator_name(node))


@register("extremum")
def _extremum(trace: Trace, node: ir.Node, rule: Rule) -> None:
    if not any(v in trace.views for v in node.inputs):
        return
    _sum_of(trace, node, list(range(len(node.inputs))), node.op_type, "Clip")


def _sum_of(trace: Trace, node: ir.Node, slots: list[int], key: str, scalar: str = "Add:scalar") -> None:
    operands = _Operands(trace, node, slots, "bias")
    if not operands.aligned:
        trace.opaque(node, "mixed axes")
        return
    present = [ids for ids in operands.ids if ids is not None]
    full = np.broadcast_shapes(*(ids.shape for ids in present))
    ids = next((p for p in present if p.shape == full), None)
    if ids is None:
        trace.opaque(node, "mixed axes")
        return
    for other in present:
        trace.tie(ids, other)
    trace.limit(ids, key, node)
    if any(p is None and not zero for p, zero in zip(operands.ids, operands.zero, strict=True)):
        trace.limit(ids, scalar, node)
    trace.set(node.outputs[0], View.of(operands.axes, ids))


@register("where")
def _where(trace: Trace, node: ir.Node, rule: Rule) -> None:
    condition, *branches = node.inputs
    if condition in trace.views:
        trace.opaque(node)
        return
    held = [numbers(v) for v in branches]
    zero = [array is not None and array.size == 1 and not array.any() for array in held]
    slots = [s for s, z in zip((1, 2), zero, strict=True) if not z]
    view = next(trace.views[v] for v in branches if v in trace.views)
    dims, out = dims_of(condition), dims_of(node.outputs[0])
    if dims is None or out is None or any(a >= len(out) - len(dims) and dims[a - len(out)] != 1 for a in view.axes):
        trace.opaque(node)  # the condition tells channels apart
        return
    _sum_of(trace, node, slots, "Where")


@register("multiply")
def _multiply(trace: Trace, node: ir.Node, rule: Rule) -> None:
    operands = _Operands(trace, node, [0, 1], "gain")
    if not operands.aligned:
        trace.opaque(node, "mixed axes")
        return
    left, right = operands.ids
    second = 1.0 if node.op_type == "Mul" else -1.0
    if left is None or right is None:
        ids = left if left is not None else right
        if left is None and second < 0:
            trace.opaque(node)  # one number over the channels
            return
        trace.limit(ids, "Mul:scalar", node)
        trace.set(node.outputs[0], View.of(operands.axes, ids))
        return
    out = trace.new(np.broadcast_shapes(left.shape, right.shape))
    for ids, constant in zip((left, right), operands.constant, strict=True):
        trace.tie(out, ids, factor=False)
        if not constant:
            other_constant = any(operands.constant)
            trace.limit(ids, "Mul:vector" if other_constant else node.op_type, node)
    trace.equate(node, (-1.0, out), (1.0, left), (second, right))
    trace.set(node.outputs[0], View.of(operands.axes, out))


@register("linear")
def _linear(trace: Trace, node: ir.Node, rule: Rule) -> None:
    x, weight = node.inputs[:2]
    rank, dims = len(dims_of(x) or ()), dims_of(weight)
    if rank == 0 or not trace.is_constant(weight) or dims is None:
        trace.opaque(node)
        return
    ids = trace.channels(x, (rank - 1,), node)
    if ids is None:
        trace.opaque(node, "mixed axes")
        return
    trace.member(node, 1, "consumer", (1,), ids)
    out = trace.new((dims[0],))
    trace.member(node, 1, "producer", (0,), out)
    trace.member(node, 2, "bias", (0,), out)
    trace.set(node.outputs[0], View.of((rank - 1,), out))


@register("matmul")
def _matmul(trace: Trace, node: ir.Node, rule: Rule) -> None:
    """A product with a stack of constant weights ``[E, K, N]``: one per expert."""
    x, weight = node.inputs
    dims, before = dims_of(weight), dims_of(x)
    if not trace.is_constant(weight) or dims is None or before is None or len(dims) not in (2, 3):
        trace.opaque(node)
        return
    rank = max(len(before), len(dims))
    if len(dims) == 2 or dims[0] == 1:
        ids = trace.channels(x, (len(before) - 1,), node)
        if ids is None:
            trace.opaque(node, "mixed axes")
            return
        trace.member(node, 1, "consumer", (len(dims) - 2,), ids)
        out = trace.new((dims[-1],))
        trace.member(node, 1, "producer", (len(dims) - 1,), out)
        trace.set(node.outputs[0], View.of((rank - 1,), out))
        return
    stacked = len(before) >= 3 and before[-3] == dims[0]
    axes = (len(before) - 3, len(before) - 1) if stacked else (len(before) - 1,)
    ids = trace.channels(x, axes, node)
    if ids is None and stacked:
        ids = trace.channels(x, (len(before) - 1,), node)  # every expert reads the same channels
        stacked = ids is None
    if ids is None:
        trace.opaque(node, "mixed axes")
        return
    read = ids if stacked else np.broadcast_to(ids, (dims[0], dims[1]))
    trace.member(node, 1, "consumer", (0, 1), read)
    out = trace.new((dims[0], dims[2]))
    for part in (read, out):
        trace.limit(part, "MatMul:stacked", node)
    trace.member(node, 1, "producer", (0, 2), out)
    _within(trace, node, out)
    trace.set(node.outputs[0], View.of((rank - 3, rank - 1), out))


def _within(trace: Trace, node: ir.Node, ids: np.ndarray) -> None:
    """Permutations and rotations stay within a row of `ids` [blocks, channels]."""
    labels = np.broadcast_to(np.arange(ids.shape[0])[:, None], ids.shape)
    trace.cells.append(Cells(ids, labels, False, node))


@register("conv")
def _conv(trace: Trace, node: ir.Node, rule: Rule) -> None:
    x, weight = node.inputs[:2]
    dims = dims_of(weight)
    groups = int(attribute(node, "group", 1))
    if not trace.is_constant(weight) or dims is None:
        trace.opaque(node)
        return
    ids = trace.channels(x, (1,), node)
    if ids is None:
        trace.opaque(node, "mixed axes")
        return
    padded = any(attribute(node, "pads", ())) or str(attribute(node, "auto_pad", "NOTSET")) not in ("NOTSET", "VALID")
    if padded:
        trace.limit(ids, "Conv:padded", node)
    out = trace.new((dims[0],))
    if dims[1] == 1 and groups == len(ids):
        spread = np.repeat(ids, dims[0] // groups)
        gain = trace.new((dims[0],))
        trace.member(node, 1, "gain", (0,), gain)
        trace.tie(spread, out, factor=False)
        trace.tie(out, gain, factor=False)
        trace.equate(node, (-1.0, out), (1.0, spread), (1.0, gain))
        trace.limit(ids, "Conv:depthwise", node)
        trace.limit(out, "Conv:depthwise", node)
    elif groups == 1:
        trace.member(node, 1, "consumer", (1,), ids)
        trace.member(node, 1, "producer", (0,), out)
    else:
        shape = (groups, dims[0] // groups, *dims[1:])
        blocks = ids.reshape(groups, dims[1])
        trace.member(node, 1, "consumer", (0, 2), blocks, shape)
        trace.member(node, 1, "producer", (0, 1), out.reshape(groups, -1), shape)
        for part in (blocks, out.reshape(groups, -1)):
            _within(trace, node, part)
            trace.limit(part, "Conv:grouped", node)
    trace.member(node, 2, "bias", (0,), out)
    trace.set(node.outputs[0], View.of((1,), out))


@register("norm")
def _norm(trace: Trace, node: ir.Node, rule: Rule) -> None:
    x, gain = node.inputs[:2]
    dims = dims_of(x)
    rms = node.op_type == "RMSNormalization"
    rank = len(dims or ())
    if rank == 0 or not trace.is_constant(gain) or int(attribute(node, "axis", -1)) % rank != rank - 1:
        trace.opaque(node)
        return
    view = trace.views.get(x)
    axes = view.axes if view is not None and rank - 1 in view.axes else (rank - 1,)
    ids = trace.channels(x, axes, node)
    if ids is None:
        trace.opaque(node, "mixed axes")
        return
    out = trace.new(ids.shape)
    gains = trace.parameter(node, 1, "gain", (0,))
    trace.tie(ids, out, factor=False)
    trace.tie(out, gains, factor=False)
    trace.equate(node, (1.0, gains), (-1.0, out), kinds={"scale"})
    signs = [(1.0, ids)] if rms else []
    trace.equate(node, (1.0, gains), (-1.0, out), *signs, kinds={"sign"})
    trace.limit(ids, f"{node.op_type}:input", node)
    trace.limit(out, f"{node.op_type}:output", node)
    if not rms:
        trace.tie(out, _bias(trace, node, 2))
    if ids.ndim > 1:
        for part in (ids, out):
            rows = part.reshape(-1, part.shape[-1])
            _within(trace, node, rows)
    trace.set(node.outputs[0], View.of(axes, out))


def _bias(trace: Trace, node: ir.Node, slot: int) -> np.ndarray:
    """Channels of a bias vector that may be absent."""
    if slot < len(node.inputs) and node.inputs[slot] is not None:
        return trace.parameter(node, slot, "bias", (0,))
    ids = trace.new(dims_of(node.inputs[1]))
    trace.member(node, slot, "bias", (0,), ids)
    return ids


@register("batchnorm")
def _batchnorm(trace: Trace, node: ir.Node, rule: Rule) -> None:
    ids = trace.channels(node.inputs[0], (1,), node)
    if ids is None or any(not trace.is_constant(v) for v in node.inputs[1:5]):
        trace.opaque(node)
        return
    # gain (x - mean) / deviation + bias: the mean follows the input, the gain takes up both sides.
    out = trace.new(ids.shape)
    gain = trace.parameter(node, 1, "gain", (0,))
    trace.tie(ids, out, factor=False)
    trace.tie(out, gain, factor=False)
    trace.tie(out, trace.parameter(node, 2, "bias", (0,)))
    trace.tie(ids, trace.parameter(node, 3, "mean", (0,)))
    deviation = trace.parameter(node, 4, "deviation", (0,))
    trace.tie(out, deviation, factor=False)
    trace.equate(node, (1.0, deviation))
    trace.equate(node, (-1.0, out), (1.0, ids), (1.0, gain))
    trace.limit(ids, "BatchNormalization", node)
    trace.limit(out, "BatchNormalization", node)
    trace.set(node.outputs[0], View.of((1,), out))


@register("rotary")
def _rotary(trace: Trace, node: ir.Node, rule: Rule) -> None:
    x = node.inputs[0]
    dims = dims_of(x)
    view = trace.views.get(x)
    if dims is None or view is None:
        return
    if len(dims) != 4:
        trace.opaque(node)
        return
    ids = trace.channels(x, (1, 3), node)
    if ids is None:
        trace.opaque(node, "mixed axes")
        return
    rotated = int(attribute(node, "rotary_embedding_dim", 0)) or ids.shape[-1]
    turned = ids[:, :rotated]
    trace.limit(turned, "RotaryEmbedding:rotated", node)
    half = rotated // 2
    pair = np.arange(rotated) // 2 if attribute(node, "interleaved", 0) else np.arange(rotated) % half
    labels = np.arange(len(ids))[:, None] * half + pair
    trace.cells += [Cells(turned, labels, uniform, node) for uniform in (True, False)]
    trace.set(node.outputs[0], view)


@register("attention")
def _attention(trace: Trace, node: ir.Node, rule: Rule) -> None:
    q, k, v = node.inputs[:3]
    dims = [dims_of(x) for x in (q, k, v)]
    extra = [x for x in (*node.inputs[3:], *node.outputs[1:]) if x is not None]
    if any(d is None or len(d) != 4 for d in dims) or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        trace.opaque(node)
        return
    for value in extra:
        if value in trace.views:
            trace.limit(trace.views[value].ids, "opaque", node)
    queries, keys, values = (trace.channels(x, (1, 3), node) for x in (q, k, v))
    if queries is None or keys is None or values is None:
        trace.opaque(node, "mixed axes")
        return
    repeat = queries.shape[0] // keys.shape[0]
    repeated = np.repeat(keys, repeat, axis=0)
    trace.tie(queries, repeated, factor=False)
    trace.equate(node, (1.0, queries), (1.0, repeated))
    trace.limit(queries, "Attention:query", node)
    trace.limit(keys, "Attention:key", node)
    trace.limit(values, "Attention:value", node)
    if attribute(node, "softcap", 0.0):
        trace.limit(keys, "Attention:softcap", node)
    for ids in (keys, values):
        _within(trace, node, ids)
    trace.attentions.append((node, queries, keys, values))
    trace.set(node.outputs[0], View.of((1, 3), np.repeat(values, repeat, axis=0)))
