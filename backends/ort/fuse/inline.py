"""What is left of our own operators becomes standard ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.backends.ort.coverage import SLOW
from qc.ir import dialect
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name

__all__ = ["InlineDialect"]

_SLOW = {
    "DynamicQuantize": "rounds activations on a grid that no integer kernel reads; up to 8 bits per tensor, or "
    "symmetric per token, with int8 weights per channel, have one"
}
"""Operators whose body is slower than the kernel that one may expect, and why."""


@dataclasses.dataclass(frozen=True)
class InlineDialect(Pass):
    """Replaces the remaining ``qc`` nodes, in subgraphs and local functions too, by the bodies of their functions.

    Exact. Local functions of the source stay: the runtime inlines them itself.
    """

    contract: ClassVar[Contract] = Exact(1e-6)

    def call(self, model: ir.Model, context: object = None) -> Result:
        from onnx_ir.passes import common

        dialect.sync_functions(model)
        if not any(key[0] == dialect.DOMAIN for key in model.functions):
            return Result.of(model, [])
        scopes = [model.graph, *(f for key, f in model.functions.items() if key[0] != dialect.DOMAIN)]
        found = [n for scope in scopes for n in scope.all_nodes() if n.domain == dialect.DOMAIN]
        for node in found:
            if node.op_type in _SLOW:
                node.metadata_props[SLOW] = _SLOW[node.op_type]  # which the nodes of the body inherit
        sites = [Site(site_name(n), Outcome.CHANGED, details={"op": n.op_type}) for n in found]
        common.InlinePass(lambda function: function.domain == dialect.DOMAIN)(model)
        dialect.sync_functions(model)
        return Result.of(model, sites)
