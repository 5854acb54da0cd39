"""Scales up the weights of important channels before they are rounded."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.channels import Use
from qc.ir.errors import InputError
from qc.ir.quant import Format, named_formats, read_weight
from qc.passes.base import BlockPass, Context, Contract, Exact, Result, check_patterns
from qc.passes.quantize.assign import assign
from qc.passes.quantize.weights import fitted
from qc.passes.statistics import Request, Statistic
from qc.passes.transform._inputs import Columns, Inputs, centred, requests, scale_inputs

__all__ = ["Awq"]

_STATISTICS = (Statistic.MEAN_ABS, Statistic.SECOND_MOMENT)

_STEPS = 20
"""Exponents tried: 0, 1/20, ..., 19/20."""

_ROWS = 128
"""Rows of each weight that are tried, evenly spaced: all rows share the factors, and more rows choose no others."""


@dataclasses.dataclass(frozen=True)
class Awq(BlockPass):
    """Multiplies weights by ``s_k = E|x_k|^r`` and divides the input by it; ``r`` is what makes rounding cost least.

    For each channel group that linear layers read, ``r`` of 0, 0.05, ..., 0.95 minimizes the error of their outputs

        ``sum over layers and rows of sum_k E[x_k^2] (w_k - Q(w_k s_k) / s_k)^2``

    where Q is the quantizer that the `quantize-weights` after this pass will use, with the metric that it will use. The
    error counts the rounding errors of different channels as uncorrelated. ``r = 0`` changes nothing, so by this
    measure the result is never worse than without the pass. The function of the model stays the same; rounding is the
    work of the next pass.

    Left alone, with the reason: channels whose factors something on the way does not let through, and weights that are
    shared with other layers. A cache holds scaled values.

    All rows of a weight share the factors, so the search looks at a sample of evenly spaced ones.

    Source: AWQ, arXiv 2306.00978, section 3.2. There the error is that of whole attention and MLP layers; its search of
    clipping ranges is part of our quantizer.

    Attributes:
        format: Values of the codes that the weights will be stored in.
        group: Elements along K that will share a scale; 0 for one scale per output channel.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    format: str = "uint4"
    group: int = 32
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in named_formats():
            raise InputError(f"Expected a format among {', '.join(named_formats())} for awq; found {self.format!r}.")
        if self.group < 0:
            raise InputError(f"Expected a group of at least 1, or 0 for per channel; found {self.group}.")
        check_patterns(self.exclude)

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, _STATISTICS)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        format = Format.parse(self.format + (f":g{self.group}" if self.group else ""))

        def choose(inputs: Inputs, columns: Columns) -> tuple[np.ndarray, dict[str, object]]:
            return _search(inputs, columns, format, context.threads)

        return scale_inputs(model, context, self.exclude, _STATISTICS, choose)


def _search(inputs: Inputs, columns: Columns, format: Format, threads: int) -> tuple[np.ndarray, dict[str, object]]:
    magnitude = inputs.largest(columns[Statistic.MEAN_ABS])
    used = magnitude > 0
    candidates = [centred(np.where(used, magnitude, 1.0) ** (i / _STEPS), used) for i in range(_STEPS)]
    errors = np.zeros(_STEPS)
    for use, moment in zip(inputs.products, columns[Statistic.SECOND_MOMENT], strict=True):
        errors += _errors(use, moment, [inputs.spread(c, use) for c in candidates], format, threads)
    best = int(np.argmin(errors))  # the first of equals: the one that changes least
    facts: dict[str, object] = {"exponent": best / _STEPS}
    if errors[0] > 0:
        facts["error"] = round(float(errors[best] / errors[0]), 4)
    return candidates[best], facts


def _errors(use: Use, moment: np.ndarray, factors: list[np.ndarray], format: Format, threads: int) -> np.ndarray:
    """The output error of one layer for each vector of factors ``[K]``."""
    weight = read_weight(use.value)
    assert weight is not None
    numbers = weight.raw()
    rows = np.asarray(numbers[:: -(-len(numbers) // _ROWS)], np.float32)
    del numbers  # a view of the file
    weight.release()
    errors, format = [], fitted(format, rows.shape[1])
    for s in factors:
        scaled, metric = rows * s.astype(np.float32), moment / s**2
        codes = assign(scaled, format, metric, name=weight.name, threads=threads)
        noise = np.square(codes.decode() - scaled).sum(axis=0, dtype=np.float64)
        errors.append(float(noise @ metric))
    return np.array(errors) * (weight.shape[0] / len(rows))
