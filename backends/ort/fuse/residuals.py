"""Residual sums in front of layer norms, kept from a slow kernel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import made_by, main_nodes, replace

__all__ = ["KeepResiduals"]


@dataclasses.dataclass(frozen=True)
class KeepResiduals(Pass):
    """Spells the ``Add`` in front of a LayerNormalization as ``Sum``: the same number, bit for bit.

    The runtime's optimizer fuses ``Add`` + ``LayerNormalization`` to ``SkipLayerNormalization`` at load, whose CPU
    kernel takes four to ten times as long as the two nodes together; it does not look for ``Sum``. For the same reason
    nothing here fuses them, nor ``Add`` + ``RMSNormalization`` (``SkipSimplifiedLayerNormalization`` is 1.1 to 1.5
    times slower than the two). benchmarks/ort_kernels.py has the times.

    Exact. Left alone: the Add of a constant, such as a bias.
    """

    contract: ClassVar[Contract] = Exact(0.0)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for norm in main_nodes(model, "LayerNormalization"):
            add = made_by(norm.inputs[0], "Add")
            if add is None:
                continue
            if any(v is None or (v.producer() is None and v.const_value is not None) for v in add.inputs):
                sites.append(Site(site_name(norm), Outcome.SKIPPED, "it normalises a sum with a constant"))
                continue
            replace(add.outputs[0], [ir.node("Sum", list(add.inputs))], like=add)
            sites.append(Site(site_name(norm), Outcome.CHANGED))
        return Result.of(model, sites)
