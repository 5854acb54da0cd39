"""What a legal model is at each stage, and how far two models' outputs are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import ContractError
from qc.ir.proto import without_weights

__all__ = ["STAGES", "Difference", "Stage", "check_structure", "compare", "sqnr", "tolerance"]

_ROUNDING = frozenset({"DynamicQuantizeLinear", "DynamicQuantize", "QuantizeLinear"})
_ROUNDED = 5e-2
_STEPS = 3
"""On a coarse grid outputs may differ by so many of its steps."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What may stand in a graph at one stage of a compile.

    Attributes:
        name: ``float``, ``quantized``, ``lowering`` (on the way to the next), ``lowered`` for a runtime, or
            ``compiled`` where a compiler of ours takes over.
        domains: Operator domains whose nodes are legal, beside domains that the source itself brought (foreign nodes).
        decode_nodes: Whether affine decode nodes of weights are legal.
    """

    name: str
    domains: frozenset[str]
    decode_nodes: bool


STAGES = {
    "float": Stage("float", frozenset({"", dialect.DOMAIN}), decode_nodes=False),
    "quantized": Stage("quantized", frozenset({"", dialect.DOMAIN}), decode_nodes=True),
    "lowering": Stage("lowering", frozenset({"", dialect.DOMAIN, "com.microsoft"}), decode_nodes=True),
    "lowered": Stage("lowered", frozenset({"", "com.microsoft"}), decode_nodes=True),
    "compiled": Stage("compiled", frozenset({"", dialect.DOMAIN, "com.microsoft"}), decode_nodes=True),
}


def check_structure(model: ir.Model, stage: Stage, foreign: frozenset[str] = frozenset()) -> None:
    """Checks names, links, operator schemas and the stage's table of legal nodes.

    Args:
        model: The model; weights are not read.
        stage: The stage it claims to be at.
        foreign: Domains that the source model brought along and that stay legal.

    Raises:
        ContractError: With the first node or value that is wrong.
    """
    legal = stage.domains | foreign
    for node in model.graph.all_nodes():
        if node.domain not in legal:
            raise ContractError(
                f"Expected only operators of {sorted(legal)} in a {stage.name} model, found "
                f"{node.domain}::{node.op_type} at {node.name!r}. "
                "The pass that just ran must not produce it at this stage."
            )
        for value in node.inputs:
            if (
                value is not None
                and not value.is_graph_input()
                and value.producer() is None
                and value.const_value is None
            ):
                raise ContractError(
                    f"Value {value.name!r}, read by {node.name!r}, has no producer. The last pass lost it."
                )
    try:
        onnx.checker.check_model(without_weights(model))
    except onnx.checker.ValidationError as error:
        raise ContractError(f"The model is not valid ONNX at stage {stage.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one output is from its reference.

    Attributes:
        output: Name of the output.
        max_abs: Largest absolute difference; infinite if shapes differ or one side is not finite where the other is.
        scale: ``max(1, max|reference|)``.
        sqnr: Signal to quantization noise ratio in decibels; infinite if equal.
    """

    output: str
    max_abs: float
    scale: float
    sqnr: float


def compare(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> list[Difference]:
    """Compares the outputs that both sides have, in the order of `reference`."""
    return [_difference(name, value, found[name]) for name, value in reference.items() if name in found]


def tolerance(model: ir.Model, tol: float) -> float:
    """The tolerance of a pass that promises `tol`: at least 5e-2 on a model that rounds activations.

    Another order of summation changes the last bit of a float, which the rounding may turn into one step of its grid,
    1/255 of the range or, with fewer bits, more; later layers spread it.
    """
    bits = [_grid_bits(n) for n in model.graph.all_nodes() if n.op_type in _ROUNDING]
    return max([tol, *(max(_ROUNDED, _STEPS / ((1 << b) - 1)) for b in bits)])


def _grid_bits(node: ir.Node) -> int:
    """Bits of the codes that an operator rounds to; 8 if it does not say."""
    if "bits" in node.attributes:
        return node.attributes["bits"].as_int()
    dtype = node.outputs[0].dtype if node.op_type == "QuantizeLinear" else None
    return dtype.bitwidth if dtype is not None else 8


def sqnr(reference: np.ndarray, found: np.ndarray) -> float:
    """``10 log10(sum ref^2 / sum (ref - found)^2)`` in decibels; infinite if equal."""
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    noise = float(np.sum((reference - found) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")


def _difference(name: str, reference: np.ndarray, found: np.ndarray) -> Difference:
    if reference.shape != found.shape:
        return Difference(name, float("inf"), 1.0, float("-inf"))
    if reference.dtype.kind not in "fiub" or reference.size == 0:
        equal = np.array_equal(reference, found)
        return Difference(name, 0.0 if equal else float("inf"), 1.0, float("inf") if equal else float("-inf"))
    a, b = reference.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # infinities and NaN count as equal where both have them
    if not np.all(same | (np.isfinite(a) & np.isfinite(b))):
        return Difference(name, float("inf"), 1.0, float("-inf"))
    scale = max(1.0, float(np.max(np.abs(a), where=np.isfinite(a), initial=0.0)))
    a, b = (np.where(np.isfinite(side), side, 0.0) for side in (a, b))
    return Difference(name, float(np.max(np.abs(a - b))), scale, sqnr(a, b))
