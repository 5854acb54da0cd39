"""Activations in terms of operators that every NPU has."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer, finished
from qc.ir import dialect
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import attribute, replace

__all__ = ["WriteOutActivations"]


@dataclasses.dataclass(frozen=True)
class WriteOutActivations(Pass):
    """Replaces ``qc.Swish(x)`` by ``x * sigmoid(alpha * x)``, which every NPU has. Exact."""

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in [n for n in model.graph if dialect.is_op(n, "Swish")]:
            write, (x,) = Writer(model.graph, node), node.inputs
            alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
            scaled = x if alpha == 1 else write.add("Mul", x, write.constant("alpha", np.array(alpha, np.float32)))
            write.add("Mul", x, write.add("Sigmoid", scaled))
            replace(node.outputs[0], write.nodes, like=node)
            sites.append(Site(site_name(node), Outcome.CHANGED))
        return finished(model, sites)
