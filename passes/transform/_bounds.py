"""Clipped activations, with one range for all channels or with one for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qc.ir.channels import find_groups
from qc.ir.store import Store
from qc.passes.canonicalize._graph import add_constant, copy_props, made_by, replace, scalar

__all__ = ["Bounds"]


@dataclasses.dataclass(frozen=True)
class _Widened:
    """A Clip, and what took its place."""

    clip: ir.Node
    nodes: list[ir.Node]
    constants: list[ir.Value]


class Bounds:
    """Gives clipped activations a range for each channel, and takes it back where nothing came of it."""

    def __init__(self, model: ir.Model, store: Store) -> None:
        """Changes nothing yet."""
        self._model, self._store = model, store
        self._widened: list[_Widened] = []

    def widen(self) -> None:
        """Rewrites ``Clip(x, low, high)`` to ``Min(Max(x, [low, ...]), [high, ...])``, or ``Relu`` where low is zero.

        Wherever a Clip is what keeps factors from the channels of a weight, which lie along one axis.
        """
        kept = [(g.family, g.forbids.get("scale")) for g in find_groups(self._model)]
        for family in dict.fromkeys(f for f, why in kept if why is not None and why.operator == "Clip"):
            for value, axes in family.carriers.items():
                node = made_by(value, "Clip")
                if node is not None and len(axes) == 1 and node.inputs[0] in family.carriers:
                    self._widen(node, axes[0])

    def settle(self, changed: Collection[ir.Value]) -> int:
        """Restores the Clips whose output is not among the changed values; returns how many ranges stay."""
        for held in self._widened:
            out = held.nodes[-1].outputs[0]
            if out in changed:
                continue
            copy_props(held.nodes[-1], [held.clip])
            replace(out, [held.clip], like=held.nodes[-1])
            for node in reversed(held.nodes[:-1]):
                node.graph.remove(node, safe=True)
            for value in held.constants:
                del self._model.graph.initializers[str(value.name)]
        return sum(w.nodes[-1].outputs[0] in changed for w in self._widened)

    def _widen(self, node: ir.Node, axis: int) -> None:
        x, out = node.inputs[0], node.outputs[0]
        ends = [node.inputs[i] if i < len(node.inputs) else None for i in (1, 2)]
        bounds = [None if v is None else scalar(v) for v in ends]
        wanted = out.shape is not None and isinstance(out.shape[axis], int) and x.dtype == ir.DataType.FLOAT
        if not wanted or any(v is not None and b is None for v, b in zip(ends, bounds, strict=True)):
            return
        nodes: list[ir.Node] = []
        constants: list[ir.Value] = []
        for operator, bound in zip(("Max", "Min"), bounds, strict=True):
            if bound is None:
                continue
            inputs = [nodes[-1].outputs[0] if nodes else x]
            rectifies = bound == 0 and operator == "Max"
            if not rectifies:
                shape = (int(out.shape[axis]), *[1] * (out.shape.rank() - axis - 1))
                tensor = self._store.put(f"{out.name}.bound", np.full(shape, bound, np.float32))
                constants.append(add_constant(node.graph, f"{out.name}.bound", tensor))
                inputs.append(constants[-1])
            nodes.append(ir.node("Relu" if rectifies else operator, inputs))
            nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = out.type, out.shape
        if nodes:
            original = ir.node("Clip", list(node.inputs), name=node.name)
            self._widened.append(_Widened(original, nodes, constants))
            replace(out, nodes, like=node)
