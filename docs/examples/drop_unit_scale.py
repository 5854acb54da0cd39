"""A complete pass, as `docs/writing-a-pass.md` shows it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name


@dataclasses.dataclass(frozen=True)
class DropUnitScale(Pass):
    """Removes multiplication by a constant one: ``Mul(x, 1) -> x``.

    Exact for a scalar one. Left alone: a one with more axes, which may broadcast x to another shape, and a product that
    is an output of the graph.

    Attributes:
        tolerance: Largest distance from one that counts as one.
    """

    contract: ClassVar[Contract] = Exact(0.0)
    tolerance: float = 0.0

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        products = [node for node in model.graph if node.domain == "" and node.op_type == "Mul"]
        return Result.of(model, [self._site(node) for node in products])

    def _site(self, node: ir.Node) -> Site:
        x, scale = node.inputs
        reason = self._reason_to_decline(node, scale)
        if reason:
            return Site(site_name(node), Outcome.SKIPPED, reason)
        node.outputs[0].replace_all_uses_with(x)
        node.graph.remove(node, safe=True)
        return Site(site_name(node), Outcome.CHANGED)

    def _reason_to_decline(self, node: ir.Node, scale: ir.Value) -> str:
        if scale.const_value is None:
            return "the factor is computed, not constant"
        if len(scale.const_value.shape) > 0:
            return "the factor has axes and may broadcast the other side"
        if not np.abs(scale.const_value.numpy() - 1.0) <= self.tolerance:
            return "the factor is not one"
        if node.outputs[0].is_graph_output():
            return "the product is an output of the graph"
        return ""
