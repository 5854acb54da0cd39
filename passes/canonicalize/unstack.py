"""A constant slice of a stack of weights, such as one expert's, becomes a weight of its own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    add_constant,
    attribute,
    drop_unused,
    integers,
    lazily,
    main_nodes,
    stored,
)

__all__ = ["UnstackWeights"]


@dataclasses.dataclass(frozen=True)
class UnstackWeights(Pass):
    """Rewrites ``Gather(stack[E, N, K], e)`` along the first axis, with a constant scalar ``e``, to a weight ``[N, K]``.

    Every reader of a stack must be such a slice, or it stays: it would be stored twice. Nothing is read or copied: a
    slice is read from the stack each time it is used. Exact.
    """

    contract: ClassVar[Contract] = Exact(0.0)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in main_nodes(model, "Gather"):
            stack, index = node.inputs
            if not _is_stack(stack):
                continue
            reason = next((r for r in (_obstacle(use.node) for use in stack.uses()) if r), "")
            if reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, reason))
                continue
            tensor, chosen = stored(stack), integers(index)[0]
            slab = lazily(tensor, lambda array, e=chosen: array[e], tuple(tensor.shape.numpy())[1:])
            value = add_constant(model.graph, f"{stack.name}.{chosen}", slab)
            node.outputs[0].replace_all_uses_with(value)
            sites.append(Site(site_name(node), Outcome.CHANGED))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _is_stack(value: ir.Value | None) -> bool:
    tensor = stored(value)
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) == 3


def _obstacle(node: ir.Node) -> str:
    """Why a reader of a stack does not read one slice of it; empty if it does."""
    if node.op_type != "Gather" or int(attribute(node, "axis", 0)) != 0:
        return f"{node.op_type} reads the stack too"
    index = stored(node.inputs[1])
    if index is None or len(index.shape) != 0:
        return "which slice is read is computed"
    return "it is an output of the graph" if node.outputs[0].is_graph_output() else ""
