"""A constant slice of a stack of weights, such as one expert's, becomes a weight of its own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    add_constant,
    attribute,
    drop_unused,
    integers,
    lazily,
    made_by,
    main_nodes,
    stored,
)

__all__ = ["UnstackWeights"]


@dataclasses.dataclass(frozen=True)
class UnstackWeights(Pass):
    """Rewrites ``Gather(stack[E, N, K], e)`` on the first axis, with a constant scalar ``e``, to a weight ``[N, K]``.

    So does it each part of ``Split(stack)`` on the first axis, where nothing else reads the stack: weights of queries,
    keys and values that lie in one, and their biases.

    Where a ``Cast`` decodes the stack, each slice gets its own. Every reader of a stack must be such a slice, or it
    stays: it would be stored twice. Nothing is read or copied: a slice is read from the stack each time it is used.
    Exact.
    """

    contract: ClassVar[Contract] = Exact(0.0)

    def call(self, model: ir.Model, context: object = None) -> Result:
        slices: dict[tuple[ir.Value, int], ir.Value] = {}
        sites = []
        for node in main_nodes(model, "Gather"):
            stack = _stack(node)
            if stack is None:
                continue
            readers = {use.node for value in (stack, node.inputs[0]) for use in value.uses()}
            readers.discard(made_by(node.inputs[0], "Cast"))
            reason = next((r for r in map(_obstacle, sorted(readers, key=site_name)) if r), "")
            if reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, reason))
                continue
            _cut(node, stack, slices)
            sites.append(Site(site_name(node), Outcome.CHANGED))
        for node in main_nodes(model, "Split"):
            if _splits_alone(node):
                _part(node)
                sites.append(Site(site_name(node), Outcome.CHANGED))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _stack(node: ir.Node) -> ir.Value | None:
    """The stored stack of matrices that the node looks up, itself or decoded; None if it looks up anything else."""
    value = _source(node)
    tensor = stored(value)
    return value if tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) == 3 else None


def _source(node: ir.Node) -> ir.Value | None:
    """What a node reads, or what that is decoded from."""
    cast = made_by(node.inputs[0], "Cast")
    return cast.inputs[0] if cast is not None else node.inputs[0]


def _splits_alone(node: ir.Node) -> bool:
    """Whether a node splits a stored weight along its first axis, into parts of known sizes, and alone reads it."""
    stack = _source(node)
    tensor = stored(stack)
    return (
        stack is not None
        and tensor is not None
        and tensor.dtype.is_floating_point()
        and int(attribute(node, "axis", 0)) == 0
        and all(len(v.uses()) == 1 and not v.is_graph_output() for v in {stack, node.inputs[0]} if v is not None)
        and all(v.shape is not None and isinstance(v.shape[0], int) and not v.is_graph_output() for v in node.outputs)
    )


def _obstacle(node: ir.Node) -> str:
    """Why a reader of a stack does not read one slice of it; empty if it does."""
    if node.op_type != "Gather" or int(attribute(node, "axis", 0)) != 0:
        return f"{node.op_type} reads the stack too"
    index = stored(node.inputs[1])
    if index is None or len(index.shape) != 0:
        return "which slice is read is computed"
    return "it is an output of the graph" if node.outputs[0].is_graph_output() else ""


def _cut(node: ir.Node, stack: ir.Value, slices: dict[tuple[ir.Value, int], ir.Value]) -> None:
    tensor = stored(stack)
    count, *shape = tensor.shape.numpy()
    chosen = integers(node.inputs[1])[0] % count

    def read(array: np.ndarray) -> np.ndarray:
        return array[chosen]

    if (stack, chosen) not in slices:
        slices[stack, chosen] = add_constant(node.graph, f"{stack.name}.{chosen}", lazily(tensor, read, shape))
    _put(node, node.outputs[0], slices[stack, chosen])
    node.graph.remove(node, safe=True)


def _part(node: ir.Node) -> None:
    stack, start = _source(node), 0
    tensor = stored(stack)
    for number, out in enumerate(node.outputs):
        end = start + out.shape[0]

        def read(array: np.ndarray, start: int = start, end: int = end) -> np.ndarray:
            return array[start:end]

        shape = (end - start, *tensor.shape.numpy()[1:])
        _put(node, out, add_constant(node.graph, f"{stack.name}.{number}", lazily(tensor, read, shape)))
        start = end
    node.graph.remove(node, safe=True)


def _put(node: ir.Node, out: ir.Value, weight: ir.Value) -> None:
    """Puts a weight in the place of an output of a node that read it from a stack, perhaps decoded."""
    cast = made_by(node.inputs[0], "Cast")
    if cast is not None:
        decoded = ir.node("Cast", [weight], {"to": int(attribute(cast, "to"))})
        decoded.outputs[0].type, decoded.outputs[0].shape = out.type, weight.shape
        node.graph.insert_before(node, decoded)
        weight = decoded.outputs[0]
    out.replace_all_uses_with(weight)
