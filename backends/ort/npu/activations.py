"""Activations in terms of operators that every NPU has."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer, finished
from qc.ir import dialect
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import attribute, main_nodes, replace

__all__ = ["WriteOutActivations"]


@dataclasses.dataclass(frozen=True)
class WriteOutActivations(Pass):
    """Replaces ``qc.Swish(x)`` by ``x * sigmoid(alpha * x)``, which every NPU has, and perhaps ``Gelu``.

    ``Gelu(x) = max(x, 0) - |x| E(|x|) / 2`` with ``E(|x|) = erfc(|x| / sqrt(2))``, for which there is a polynomial in
    ``t = 1 / (1 + p |x| / sqrt(2))`` times ``exp(-x^2 / 2)`` with an error below 1.5e-7 (Abramowitz and Stegun,
    7.1.26). Its approximation by a hyperbolic tangent is written out as it is. Exact.

    Attributes:
        gelu: Whether to write out ``Gelu``, where a unit has neither it nor ``Erf``.
    """

    contract: ClassVar[Contract] = Exact(1e-5)

    gelu: bool = False

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in [n for n in model.graph if dialect.is_op(n, "Swish")]:
            write, (x,) = Writer(model.graph, node), node.inputs
            alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
            scaled = x if alpha == 1 else write.add("Mul", x, write.constant("alpha", np.array(alpha, np.float32)))
            write.add("Mul", x, write.add("Sigmoid", scaled))
            replace(node.outputs[0], write.nodes, like=node)
            sites.append(Site(site_name(node), Outcome.CHANGED))
        for node in main_nodes(model, "Gelu") if self.gelu else ():
            write = Writer(model.graph, node)
            (_by_tanh if attribute(node, "approximate", "none") == "tanh" else _by_polynomial)(write, node.inputs[0])
            replace(node.outputs[0], write.nodes, like=node)
            sites.append(Site(site_name(node), Outcome.CHANGED))
        return finished(model, sites)


_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERFC_P = 0.3275911


def _number(write: Writer, number: float) -> ir.Value:
    return write.constant("number", np.array(number, np.float32))


def _by_polynomial(write: Writer, x: ir.Value) -> None:
    size = write.add("Abs", x)
    below = write.add("Add", write.add("Mul", size, _number(write, _ERFC_P / math.sqrt(2))), _number(write, 1))
    t = write.add("Div", _number(write, 1), below, dtype=x.dtype)
    rest = write.add("Mul", t, _number(write, _ERFC[0]))
    for factor in _ERFC[1:]:
        rest = write.add("Mul", write.add("Add", rest, _number(write, factor)), t)
    bell = write.add("Exp", write.add("Mul", write.add("Mul", x, x), _number(write, -0.5)))
    half = write.add("Mul", write.add("Mul", size, _number(write, 0.5)), write.add("Mul", rest, bell))
    write.add("Sub", write.add("Relu", x), half)


def _by_tanh(write: Writer, x: ir.Value) -> None:
    cube = write.add("Mul", write.add("Mul", write.add("Mul", x, x), x), _number(write, 0.044715))
    inner = write.add("Mul", write.add("Add", x, cube), _number(write, math.sqrt(2 / math.pi)))
    outer = write.add("Add", write.add("Tanh", inner), _number(write, 1))
    write.add("Mul", write.add("Mul", x, _number(write, 0.5)), outer)
