"""Gated activations on one kernel each."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.ir import dialect
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import replace

__all__ = ["FuseSwish"]

_FLOAT = (None, ir.DataType.FLOAT)


@dataclasses.dataclass(frozen=True)
class FuseSwish(Pass):
    """Rewrites ``qc::Swish(x, alpha)`` to ``QuickGelu``: ``x * sigmoid(alpha * x)`` in one pass over x.

    Exact. The kernel is for float32; other types are left to `InlineDialect`. Gelu needs nothing: the standard operator
    is as fast as ``FastGelu``, and a bias is already an input of the product in front.
    """

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in [n for n in model.graph if dialect.is_op(n, "Swish")]:
            x = node.inputs[0]
            assert x is not None
            if x.dtype not in _FLOAT:
                sites.append(Site(site_name(node), Outcome.SKIPPED, "the kernel is for float32 only"))
                continue
            alpha = node.attributes["alpha"].as_float()
            fused = ir.node("QuickGelu", [x], {"alpha": alpha}, domain="com.microsoft")
            replace(node.outputs[0], [fused], like=node)
            sites.append(Site(site_name(fused), Outcome.CHANGED, details={"kernel": "QuickGelu"}))
        result = Result.of(model, sites)
        if result.modified:
            model.opset_imports.setdefault("com.microsoft", 1)
            dialect.sync_functions(model)
        return result
