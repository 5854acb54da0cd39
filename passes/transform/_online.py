"""Rotates activations at run time: a Kronecker product of small matrices, each a product along an axis of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.errors import UnsupportedError
from qc.ir.store import Store
from qc.passes.canonicalize._graph import add_constant

__all__ = ["Constants", "rotated"]


Constants = dict[tuple, ir.Value]
"""What was stored, by type and content: layers of equal width share their factors."""


def rotated(
    value: ir.Value,
    factors: Sequence[np.ndarray],
    store: Store,
    constants: Constants,
    dtype: type[np.floating] = np.float32,
) -> tuple[ir.Value, list[tuple[str, int]]]:
    """Inserts ``value @ (F_1 x F_2 x ...)`` over the last axis behind the producer of `value`. Nothing reads it yet.

    The axis is divided into one of the size of each factor, each factor is multiplied along its axis, and the axes are
    joined again. Factors that are the identity take no operator.

    Args:
        value: ``[..., width]`` of known rank.
        factors: Square matrices whose sizes multiply to the width.
        store: Where they are written.
        constants: What earlier calls on the same graph stored; added to.
        dtype: Element type of the stored factors.

    Returns:
        The product, and the operators with their multiplications per vector.

    Raises:
        UnsupportedError: If the shape of `value` is not known well enough. Nothing was changed.
    """
    width = math.prod(len(f) for f in factors)
    if value.shape is None or value.shape.rank() == 0 or value.shape[-1] != width:
        raise UnsupportedError(f"The shape of {value.name!r} is not known to end in {width}.")
    producer = value.producer()
    graph = producer.graph if producer is not None else value.graph
    assert graph is not None, "it is a value of a graph"
    work = _Chain(value, graph, store, constants, dtype)
    outer = list(value.shape.dims[:-1])
    rest, last = width, value
    for factor in factors:
        rest //= len(factor)
        if rest > 1:
            last = work.reshape(last, [*outer, len(factor), rest])
        last = work.product(last, factor, left=rest > 1)
        outer.append(len(factor))
    if len(factors) > 1:
        last = work.reshape(last, [*value.shape.dims[:-1], width])
    if producer is not None:
        graph.insert_after(producer, work.nodes)
    else:
        graph.insert_before(graph[0], work.nodes)
    return last, work.added


class _Chain:
    """Operators in a row."""

    def __init__(
        self, value: ir.Value, graph: ir.Graph, store: Store, constants: Constants, dtype: type[np.floating]
    ) -> None:
        self.nodes: list[ir.Node] = []
        self.added: list[tuple[str, int]] = []
        self._value, self._graph, self._store, self._constants, self._dtype = value, graph, store, constants, dtype

    def reshape(self, value: ir.Value, dims: list) -> ir.Value:
        """To `dims`, of which only the last are new: the leading ones are copied."""
        leading = self._value.shape.rank() - 1
        sizes = np.array([0] * leading + dims[leading:], np.int64)
        return self._append("Reshape", [value, self._constant(f"rotation.shape.{dims[-1]}", sizes)], dims, 0)

    def product(self, value: ir.Value, factor: np.ndarray, *, left: bool) -> ir.Value:
        """Along the last axis, or from the left along the one before it."""
        if np.array_equal(factor, np.eye(len(factor))):
            return value
        matrix = self._constant(f"rotation.{len(factor)}", (factor.T if left else factor).astype(self._dtype))
        cost = math.prod(d for d in value.shape.dims[self._value.shape.rank() - 1 :]) * len(factor)
        return self._append("MatMul", [matrix, value] if left else [value, matrix], list(value.shape.dims), cost)

    def _append(self, operator: str, inputs: list[ir.Value], dims: list, cost: int) -> ir.Value:
        node = ir.node(operator, inputs)
        node.outputs[0].dtype, node.outputs[0].shape = self._value.dtype, ir.Shape(dims)
        self.nodes.append(node)
        self.added.append((operator, cost))
        return node.outputs[0]

    def _constant(self, stem: str, array: np.ndarray) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = self._store.put(stem, np.ascontiguousarray(array))
            self._constants[key] = add_constant(self._graph, stem, tensor)
        return self._constants[key]
