"""Weights that are stored as a stack and read one by one, as those of experts, become weights of their own."""

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
    constant,
    drop_unused,
    lazily,
    made_by,
    main_nodes,
    replace,
    stored,
)

__all__ = ["SplitStacks"]


@dataclasses.dataclass(frozen=True)
class SplitStacks(Pass):
    """Replaces ``Gather(W, e)`` on the first axis of a float parameter by the initializer ``W[e]``, for constant e.

    Also where a ``Cast`` decodes W: each part gets its own. A part is cut out of the stack each time it is read, never
    kept in memory. Left alone, with the reason: a stack that something else reads too, since it would be stored twice.
    """

    contract: ClassVar[Contract] = Exact(0.0)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        parts: dict[tuple[ir.Value, int], ir.Value] = {}
        sites = []
        for node in main_nodes(model, "Gather"):
            if _index(node) is None:
                continue
            try:
                _cut(node, parts)
            except Decline as reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, str(reason)))
            else:
                sites.append(Site(site_name(node), Outcome.CHANGED))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _index(node: ir.Node) -> int | None:
    """Which entry of a stack of parameters the node takes; None if it does anything else."""
    index, tensor = constant(node.inputs[1]), stored(_source(node))
    if index is None or index.ndim or attribute(node, "axis", 0) != 0 or tensor is None:
        return None
    if len(tensor.shape) < 2 or not tensor.dtype.is_floating_point():
        return None
    return int(index) % int(tensor.shape.numpy()[0])


def _source(node: ir.Node) -> ir.Value | None:
    cast = made_by(node.inputs[0], "Cast")
    return cast.inputs[0] if cast is not None else node.inputs[0]


def _cut(node: ir.Node, parts: dict[tuple[ir.Value, int], ir.Value]) -> None:
    cast, source, out, index = made_by(node.inputs[0], "Cast"), _source(node), node.outputs[0], _index(node)
    if out.is_graph_output() or source.is_graph_output() or node.inputs[0].is_graph_output():
        raise Decline("the stack, or the part, is a result of the model")
    readers = [u.node for v in {source, node.inputs[0]} for u in v.uses() if u.node is not cast]
    other = next((r for r in readers if r.op_type != "Gather" or r.graph is not node.graph or _index(r) is None), None)
    if other is not None:
        raise Decline(f"{other.op_type} reads the whole stack too; its parts would be stored twice")
    if (source, index) not in parts:
        tensor = stored(source)

        def read(array: np.ndarray) -> np.ndarray:
            return array[index]

        cut = lazily(tensor, read, tensor.shape.numpy()[1:])
        parts[source, index] = add_constant(node.graph, f"{source.name}.{index}", cut)
    part = parts[source, index]
    if cast is not None:
        replace(out, [ir.node("Cast", [part], {"to": int(attribute(cast, "to"))})], like=node)
        return
    out.replace_all_uses_with(part)
    node.graph.remove(node, safe=True)
