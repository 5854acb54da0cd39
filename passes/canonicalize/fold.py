"""Constant folding and the removal of operators that change nothing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.ir.simplify import drop_identities, infer_shapes, merge_equal
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site
from qc.passes.canonicalize._graph import (
    attribute,
    constant,
    drop_unused,
    integers,
    made_by,
    main_nodes,
    same_dim,
    scalar,
    stored,
)

__all__ = ["FoldConstants"]

_ROUNDS = 4  # a fold exposes at most a handful of further folds; exporters' graphs settle in two rounds
_DECODERS = frozenset({"Transpose", "Cast", "DequantizeLinear", "QuantizeLinear"})
_FAR = 2**31 - 1  # exporters spell "to the end" as any of 2**31-1 .. 2**63-1


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Folds small constant expressions, and drops no-ops, common subexpressions and what nothing reads.

    Weights stay as they are: no parameter (a float initializer of more than one element) is read or folded, no decode
    node (Cast, Transpose, DequantizeLinear) is folded into one, and equal parameters are never merged. Those that
    ``Constant`` nodes hold become initializers. What goes:

    * ``f(constants)`` of small results, shapes included where they are known;
    * ``Cast`` to the same type, ``Expand``, ``Reshape`` and ``Resize`` to the same shape, ``Slice`` of everything,
      ``Transpose`` in order or of its inverse, ``Concat`` of one, ``x * 1``, ``x / 1``, ``x + 0``, ``x - 0``,
      ``x and true``.

    Types and shapes are inferred first where some are missing, because the later recognisers read them.

    Scope: the main graph; functions and subgraphs are left to the runtime.
    """

    contract: ClassVar[Contract] = Exact(1e-6)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        from onnx_ir.passes import common

        before = sum(1 for _ in model.graph)
        if any(v.type is None or v.shape is None for n in model.graph for v in n.outputs):
            infer_shapes(model)
        modified = common.LiftConstantsToInitializersPass(size_limit=2)(model).modified
        for _ in range(_ROUNDS):
            changed = _drop_no_ops(model)
            changed |= drop_identities(model)
            changed |= _share_integers(model)
            changed |= merge_equal(model)
            changed |= _fold(model)
            changed |= drop_unused(model)
            modified |= changed
            if not changed:
                break
        if not modified:
            return Result(model, False, [], ["nothing to fold"])
        after = sum(1 for _ in model.graph)
        site = Site("graph", Outcome.CHANGED, details={"nodes_before": before, "nodes_after": after})
        return Result(model, True, [site])


def _fold(model: ir.Model) -> bool:
    import logging

    from onnxscript.optimizer import fold_constants_ir

    logging.getLogger("onnxscript.optimizer._constant_folding").setLevel(logging.ERROR)
    parameters = {id(v) for v in model.graph.initializers.values() if _is_parameter(v)}

    def should_fold(node: ir.Node) -> bool | None:
        if any(id(v) in parameters for v in node.inputs):
            return False
        large = any(v is not None and v.const_value is not None and v.const_value.size > 64 for v in node.inputs)
        return False if large and node.op_type in _DECODERS else None

    result = fold_constants_ir(model, onnx_shape_inference=False, output_size_limit=8192, should_fold=should_fold)
    return bool(result.modified)


def _is_parameter(value: ir.Value) -> bool:
    tensor = stored(value)
    return tensor is not None and tensor.size > 1 and (tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8)


def _share_integers(model: ir.Model) -> bool:
    """Merges equal small integer initializers (axes, shapes, bounds), which folding makes in great number.

    Only 32- and 64-bit integers: floats may be parameters of different layers that happen to be equal, and 8-bit
    integers may be zero points.
    """
    first: dict[tuple[object, ...], ir.Value] = {}
    changed = False
    for value in tuple(model.graph.initializers.values()):
        tensor = stored(value)
        if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > 16:
            continue
        array = tensor.numpy()
        kept = first.setdefault((array.dtype.str, array.shape, array.tobytes()), value)
        if kept is value or value.is_graph_output():
            continue
        value.replace_all_uses_with(kept)
        del model.graph.initializers[value.name]
        changed = True
    return changed


def _drop_no_ops(model: ir.Model) -> bool:
    changed = False
    for node in main_nodes(model, *_NO_OPS):
        kept = _NO_OPS[node.op_type](node)
        out = node.outputs[0]
        if kept is None or (out.is_graph_output() and (kept.is_graph_input() or kept.is_graph_output())):
            continue
        if out.is_graph_output() and stored(kept) is not None:
            continue
        _forward(out, kept)
        node.graph.remove(node, safe=True)
        changed = True
    return changed


def _forward(old: ir.Value, kept: ir.Value) -> None:
    """Moves the uses of `old` to `kept`, which takes over its name and role if it was a graph output."""
    if old.is_graph_output():
        kept.name = old.name
        kept.metadata_props.update(old.metadata_props)
    if kept.shape is None:
        kept.shape = old.shape
    kept.type = kept.type or old.type
    old.replace_all_uses_with(kept, replace_graph_outputs=True)


def _same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether both have one proven shape: equal numbers or the same symbol on every axis."""
    if a is None or b is None or a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(same_dim(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _cast(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    return x if x.dtype is not None and x.dtype == attribute(node, "to") else None


def _unchanged_shape(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if _same_shape(node.inputs[0], node.outputs[0]) else None


def _resize(node: ir.Node) -> ir.Value | None:
    """To the sizes that it has; a scale near 1, or a part that is enlarged, may yield as many elements and others."""
    cropped = attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    sized = len(node.inputs) > 3 and node.inputs[3] is not None and not cropped
    return _unchanged_shape(node) if sized else None


def _slice(node: ir.Node) -> ir.Value | None:
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if starts is None or ends is None or steps is None:
        return None
    whole = all(s == 0 for s in starts) and all(e >= _FAR for e in ends) and all(s == 1 for s in steps)
    return node.inputs[0] if whole else None


def _transpose(node: ir.Node) -> ir.Value | None:
    perm, inner = attribute(node, "perm"), made_by(node.inputs[0], "Transpose")
    if perm is None:
        return None
    if list(perm) == list(range(len(perm))):
        return node.inputs[0]
    first = attribute(inner, "perm") if inner is not None else None
    undone = first is not None and [first[i] for i in perm] == list(range(len(perm)))
    return inner.inputs[0] if undone else None


def _concat(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _neutral(node: ir.Node) -> ir.Value | None:
    """``x op e -> x`` for the neutral element e, where e does not broadcast x to a higher rank."""
    number = 1.0 if node.op_type in ("Mul", "Div") else 0.0
    for i in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
        e, x = constant(node.inputs[i]), node.inputs[1 - i]
        if e is None or e.size != 1 or scalar(node.inputs[i]) != number or x.dtype is None:
            continue
        if e.ndim == 0 or (x.shape is not None and e.ndim <= len(x.shape)):
            return x
    return None


def _and(node: ir.Node) -> ir.Value | None:
    """``x and true -> x``."""
    for i in (0, 1):
        e, x = constant(node.inputs[i]), node.inputs[1 - i]
        if e is not None and e.ndim == 0 and bool(e):
            return x
    return None


_NO_OPS = {
    "Cast": _cast,
    "Expand": _unchanged_shape,
    "Reshape": _unchanged_shape,
    "Resize": _resize,
    "Slice": _slice,
    "Transpose": _transpose,
    "Concat": _concat,
    "Mul": _neutral,
    "Div": _neutral,
    "Add": _neutral,
    "Sub": _neutral,
    "And": _and,
}
"""One function per operator: the value that the node merely copies, or None."""
