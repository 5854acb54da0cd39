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
    replace,
    stored,
)

__all__ = ["UnstackWeights"]


@dataclasses.dataclass(frozen=True)
class UnstackWeights(Pass):
    """Rewrites ``Gather(stack[E, N, K], e)`` on the first axis, with a constant scalar ``e``, to a weight ``[N, K]``.

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
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _stack(node: ir.Node) -> ir.Value | None:
    """The stored stack of matrices that the node looks up, itself or decoded; None if it looks up anything else."""
    cast = made_by(node.inputs[0], "Cast")
    value = cast.inputs[0] if cast is not None else node.inputs[0]
    tensor = stored(value)
    return value if tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) == 3 else None


def _obstacle(node: ir.Node) -> str:
    """Why a reader of a stack does not read one slice of it; empty if it does."""
    if node.op_type != "Gather" or int(attribute(node, "axis", 0)) != 0:
        return f"{node.op_type} reads the stack too"
    index = stored(node.inputs[1])
    if index is None or len(index.shape) != 0:
        return "which slice is read is computed"
    return "it is an output of the graph" if node.outputs[0].is_graph_output() else ""


def _cut(node: ir.Node, stack: ir.Value, slices: dict[tuple[ir.Value, int], ir.Value]) -> None:
    tensor, out, cast = stored(stack), node.outputs[0], made_by(node.inputs[0], "Cast")
    count, *shape = tensor.shape.numpy()
    chosen = integers(node.inputs[1])[0] % count

    def read(array: np.ndarray) -> np.ndarray:
        return array[chosen]

    if (stack, chosen) not in slices:
        slices[stack, chosen] = add_constant(node.graph, f"{stack.name}.{chosen}", lazily(tensor, read, shape))
    weight = slices[stack, chosen]
    if cast is not None:
        replace(out, [ir.node("Cast", [weight], {"to": int(attribute(cast, "to"))})], like=node)
        return
    out.replace_all_uses_with(weight)
    node.graph.remove(node, safe=True)
