"""Every matrix product with a constant weight becomes ``qc::Linear``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    attribute,
    copy_props,
    drop_unused,
    lazily,
    made_by,
    main_nodes,
    replace,
    same_dim,
    sole_consumer,
    stored,
)

__all__ = ["RecogniseLinear"]


@dataclasses.dataclass(frozen=True)
class RecogniseLinear(Pass):
    """Rewrites every product with a constant two-dimensional weight to ``qc::Linear(x, weight[N, K][, bias[N]])``.

    * ``MatMul(x, Transpose(W))`` and ``MatMul(x, W)``, each ``+ b`` where b is a constant vector;
    * ``Gemm(x, W, b)`` with ``transA=0``, both ``transB``; ``alpha`` and ``beta`` are folded into weight and bias;
    * ``Reshape(Gemm(Reshape(X)))``, the Conv1D form, where the shapes prove that the Reshapes only merge and restore
      the leading axes, becomes one Linear on X.

    W may be an initializer or lie behind decode nodes (Cast, DequantizeLinear, any chain of constants when it is
    already ``[N, K]``). A weight stored ``[K, N]`` is transposed each time it is read, never kept in memory. Left
    alone, with the reason: products of two computed values, batched (3-D) weights, outer products (K = 1), a ``[K, N]``
    weight that another kind of node reads too.

    Exact up to the order of summation in the runtime's kernels.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        sites = [Site(site_name(node), Outcome.MATCHED) for node in _linears(model)]
        weights = _Weights(model.graph)
        sites += [_site(node, weights) for node in main_nodes(model, "MatMul", "Gemm")]
        merged = sum(_unflatten(node) for node in _linears(model))
        notes = [f"{merged} products merged with the Reshapes around them"] if merged else []
        result = Result.of(model, sites, notes)
        result.modified |= merged > 0
        weights.finish(model, modified=result.modified)
        return result


def _linears(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if dialect.is_op(node, "Linear")]


def _site(node: ir.Node, weights: _Weights) -> Site:
    name = site_name(node)
    try:
        (_rewrite_gemm if node.op_type == "Gemm" else _rewrite_matmul)(node, weights)
    except Decline as reason:
        return Site(name, Outcome.SKIPPED, str(reason))
    return Site(name, Outcome.CHANGED)


def _rewrite_matmul(node: ir.Node, weights: _Weights) -> None:
    x, w = node.inputs
    if not _is_constant(w):
        side = "a constant on its left side only" if _is_constant(x) else "no constant weight"
        raise Decline(f"MatMul has {side}")
    if _dims(w)[0] == 1:
        raise Decline("the weight has one input channel: an outer product, as of positions and frequencies")
    weight = weights.rows_first(w, transposed=True)
    out = node.outputs[0]
    add = sole_consumer(out)
    bias = _bias_of(add, out, weight) if add is not None and add.domain == "" and add.op_type == "Add" else None
    if bias is None:
        replace(out, [dialect.linear(x, weight, name=node.name)], like=node)
    else:
        replace(add.outputs[0], [dialect.linear(x, weight, bias, name=node.name)], like=node)


def _bias_of(add: ir.Node, product: ir.Value, weight: ir.Value) -> ir.Value | None:
    """The constant vector ``[N]`` that `add` adds to `product`, or None."""
    other = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
    if other is product or not _is_constant(other) or other.shape is None or len(other.shape) != 1:
        return None
    return other if isinstance(other.shape[0], int) and other.shape[0] == weight.shape[0] else None


def _rewrite_gemm(node: ir.Node, weights: _Weights) -> None:
    x, w, c = [*node.inputs, None][:3]
    if attribute(node, "transA", 0):
        raise Decline("Gemm transposes its left side")
    if not _is_constant(w):
        raise Decline("Gemm has no constant weight")
    alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
    weight = weights.rows_first(w, transposed=not attribute(node, "transB", 0), scale=alpha)
    bias = _gemm_bias(node, c, weight.shape[0], beta) if c is not None and beta != 0.0 else None
    replace(node.outputs[0], [dialect.linear(x, weight, bias, name=node.name)], like=node)


def _gemm_bias(node: ir.Node, c: ir.Value, width: int, beta: float) -> ir.Value:
    """Gemm's ``beta * C`` as a vector ``[N]``."""
    if not _is_constant(c):
        raise Decline("Gemm adds a value that is not constant")
    if beta == 1.0 and c.shape is not None and c.shape.dims == (width,):
        return c
    tensor = stored(c)
    if tensor is None or any(d != 1 for d in tensor.shape.numpy()[:-1]):
        raise Decline("Gemm adds a constant that is not a vector")

    def read(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to((array * beta).astype(array.dtype).reshape(-1), (width,))

    return add_constant(node.graph, f"{c.name}_vector", lazily(tensor, read, (width,)))


def _unflatten(node: ir.Node) -> bool:
    """``Reshape(Linear(Reshape(X, [-1, K])), [..., N]) -> Linear(X)`` where shapes prove it."""
    before = made_by(node.inputs[0], "Reshape")
    after = sole_consumer(node.outputs[0])
    if before is None or after is None or after.domain != "" or after.op_type != "Reshape":
        return False
    if after.inputs[0] is not node.outputs[0]:
        return False
    x, y, weight = before.inputs[0], after.outputs[0], node.inputs[1]
    if x.shape is None or y.shape is None or len(x.shape) != len(y.shape):
        return False
    rows, columns = weight.shape
    if x.shape[-1] != columns or y.shape[-1] != rows:
        return False
    if not all(same_dim(a, b) for a, b in zip(x.shape[:-1], y.shape[:-1], strict=True)):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    replace(y, [dialect.linear(x, weight, bias, name=node.name)], like=node)
    return True


def _is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is a constant tensor or computed from constant tensors only (a decode expression)."""
    if value is None or value.is_graph_input():
        return False
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return all(v is None or _is_constant(v) for v in node.inputs)


class _Weights:
    """Turns weights to ``[N, K]``; each stored tensor is turned at most once, whatever the number of its uses."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._turned: dict[tuple[int, bool, float], ir.Value] = {}
        self._parameters: list[tuple[str, ir.Value]] = []

    def rows_first(self, value: ir.Value, *, transposed: bool, scale: float = 1.0) -> ir.Value:
        """The value of ``scale * value`` (``.T`` if `transposed`), as an initializer or behind decode nodes.

        Raises:
            Decline: If it is not two-dimensional, or turning it would store it twice.
        """
        if len(_dims(value)) != 2:
            raise Decline(f"the weight has {len(_dims(value))} axes, expected 2")
        if not transposed and scale == 1.0:
            node = made_by(value, "Transpose")
            untouched = node is None or not _is_swap(node)
            return value if untouched else self.rows_first(node.inputs[0], transposed=True)
        key = (id(value), transposed, scale)
        if key not in self._turned:
            self._turned[key] = self._turn(value, transposed, scale)
        return self._turned[key]

    def finish(self, model: ir.Model, *, modified: bool) -> None:
        """Drops what is no longer read, and what was prepared for a site that then declined.

        A turned parameter takes over the name of the one it replaces: reports and recipes refer to it.
        """
        if modified:
            drop_unused(model)
            dialect.sync_functions(model)
        for value in reversed(tuple(self._turned.values())):
            node = value.producer()
            if value.uses() or value.is_graph_output():
                continue
            if node is not None and node.graph is self._graph:
                self._graph.remove(node, safe=True)
            elif node is None and self._graph.initializers.get(value.name) is value:
                del self._graph.initializers[value.name]
        for name, value in self._parameters:
            if value.uses() and name not in self._graph.initializers:
                value.name = name

    def _turn(self, value: ir.Value, transposed: bool, scale: float) -> ir.Value:
        node = value.producer()
        if node is None:
            return self._turn_stored(value, transposed, scale)
        if node.domain == "" and node.op_type == "Transpose" and _is_swap(node):
            return self.rows_first(node.inputs[0], transposed=not transposed, scale=scale)
        if node.domain == "" and node.op_type == "Cast" and scale == 1.0:
            return self._again(node, [self.rows_first(node.inputs[0], transposed=transposed)], value)
        if node.domain == "" and node.op_type == "DequantizeLinear" and scale == 1.0:
            inputs = [self._turn_parameter(v) for v in node.inputs]
            return self._again(node, inputs, value, axis=1 - int(attribute(node, "axis", 1)) % 2)
        raise Decline(f"the weight is stored [K, N] behind {node.op_type}, which cannot be transposed in place")

    def _turn_parameter(self, value: ir.Value | None) -> ir.Value | None:
        return value if value is None or len(_dims(value)) != 2 else self.rows_first(value, transposed=True)

    def _again(self, node: ir.Node, inputs: list[ir.Value | None], old: ir.Value, **changed: int) -> ir.Value:
        """A copy of decode node `node` on the turned inputs."""
        attributes = [a for name, a in node.attributes.items() if name not in changed]
        attributes += [ir.AttrInt64(name, number) for name, number in changed.items()]
        new = ir.Node(node.domain, node.op_type, inputs, attributes, overload=node.overload)
        copy_props(node, [new])
        new.outputs[0].type = old.type
        new.outputs[0].shape = ir.Shape(_dims(old)[::-1])
        self._graph.insert_before(node, new)
        return new.outputs[0]

    def _turn_stored(self, value: ir.Value, transposed: bool, scale: float) -> ir.Value:
        tensor = stored(value)
        for use in value.uses():
            if use.node.op_type not in ("MatMul", "Gemm", "Transpose", "Cast", "DequantizeLinear"):
                raise Decline(f"{use.node.op_type} reads the [K, N] weight too; turning it would store it twice")
        rows, columns = _dims(value)

        def change(array: np.ndarray) -> np.ndarray:
            scaled = array if scale == 1.0 else (array * array.dtype.type(scale))
            return scaled.T if transposed else scaled

        shape = (columns, rows) if transposed else (rows, columns)
        turned = add_constant(self._graph, value.name, lazily(tensor, change, shape))
        self._parameters.append((value.name, turned))
        return turned


def _dims(value: ir.Value) -> tuple[int, ...]:
    """The static shape of a constant value.

    Raises:
        Decline: If it is unknown.
    """
    if value.producer() is None and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if value.shape is None or not value.shape.is_static():
        node = value.producer()
        if node is not None and node.domain == "" and node.op_type in ("Cast", "DequantizeLinear"):
            return _dims(node.inputs[0])
        if node is not None and node.domain == "" and node.op_type == "Transpose" and _is_swap(node):
            return _dims(node.inputs[0])[::-1]
        raise Decline("the shape of the weight is unknown")
    return tuple(value.shape.numpy())


def _is_swap(node: ir.Node) -> bool:
    perm = attribute(node, "perm")
    return perm is None or list(perm) == [1, 0]
