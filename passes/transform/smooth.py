"""Moves outliers from activations into weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.quant import read_weight
from qc.passes.base import BlockPass, Context, Contract, Exact, Result, check_patterns
from qc.passes.statistics import Request, Statistic
from qc.passes.transform._inputs import (
    Columns,
    Inputs,
    centred,
    requests,
    scale_inputs,
    unscalable,
    unscalable_at_run_time,
)
from qc.passes.transform._trial import STATISTICS, Quantizers, Trial

__all__ = ["Smooth"]

_STATISTICS = (Statistic.ABS_MAX,)

_TOKENS = 8192
"""The largest magnitude of a channel shows late: static 8 bits of the built-in decoder are 0.0065 nats from float if
factors and ranges come from 1024 tokens, 0.0040 from 4096, 0.0034 from 8192."""

_FLOOR = 1e-5
"""Weights of a channel count as at least this share of the largest: a column of zeros says nothing about factors."""

_STEPS = 20
"""Steps from 0 to 1 of the search."""

_ROWS = 1 << 22
"""Elements of a weight that are read at a time."""


@dataclasses.dataclass(frozen=True)
class Smooth(BlockPass):
    """Divides activation channels by ``s_j = max|x_j|^alpha / max|W_j|^(1-alpha)``, and multiplies the weights by it.

    One ``s`` for each channel group that linear layers read: ``W_j`` are the columns of all of them. The factors go
    into what makes the channels (the gain of a norm, the rows of a projection) and into the weights that read them, so
    nothing runs additionally and the function stays the same. At ``alpha = 0.5`` each channel is as large in the
    activation as in the weights; at 1 all channels of the activation are equally large, at 0 all columns.

    ``s`` is scaled such that its largest entry is the inverse of its smallest, which changes no code of a quantizer.
    Channels that are always zero keep their scale. Left alone, with the reason: channels whose factors something on the
    way does not let through, and weights that are shared with other layers. A cache holds scaled values.

    ``alpha`` may be searched for each group, among 0, 0.05, ..., 1 and leaving it as it is: the one of the least error
    of the outputs of its layers on samples of their input, with weights and activations rounded as the passes behind
    this one will do it. Factors come from one half of the samples, errors from the other.

    Where no weight can take up the factors, such as behind an activation function that is not homogeneous, or a norm
    whose output is also added to something, they can be multiplied with at run time (`runtime`). A static quantizer
    per tensor behind the multiplication is one per channel of what is in front of it.

    Source: SmoothQuant, arXiv 2211.10438, equation 4, on every group that admits it instead of the outputs of norms
    alone; the search is ours.

    Attributes:
        alpha: How much of the difficulty moves into the weights, from 0 to 1, or ``search``.
        runtime: Whether to multiply at run time where weights cannot take up factors.
        bits: Bits that activations will have, for the search.
        granularity: What will share a range of them, for the search: ``tensor`` or ``token``.
        weights: Format that weights will have, for the search.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    alpha: float | str = 0.5
    runtime: bool = False
    bits: int = 8
    granularity: str = "tensor"
    weights: str = "int8"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, float) and 0 <= self.alpha <= 1
        if not number and self.alpha != "search":
            raise InputError(f"Expected an alpha from 0 to 1 for smooth, or 'search'; found {self.alpha!r}.")
        Quantizers.parse(self.spec_name(), self.weights, self.bits, self.granularity)
        check_patterns(self.exclude)

    @property
    def calibration_tokens(self) -> int:
        return _TOKENS

    @property
    def sequential(self) -> bool:
        return self.alpha == "search"  # samples of the inputs of all layers at once would take much memory

    @property
    def _statistics(self) -> tuple[Statistic, ...]:
        return (Statistic.ABS_MAX, *(STATISTICS if self.alpha == "search" else ()))

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, self._statistics, self._obstacle)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        quantizers = Quantizers.parse(self.spec_name(), self.weights, self.bits, self.granularity, context.threads)

        def choose(inputs: Inputs, columns: Columns) -> tuple[np.ndarray, dict[str, object]]:
            activation = inputs.largest(columns[Statistic.ABS_MAX])
            weight = inputs.largest([_column_maxima(use.value) for use in inputs.products])
            if self.alpha != "search":
                return _factors(activation, weight, float(self.alpha)), {"alpha": self.alpha}
            trial = Trial(inputs.products, columns[Statistic.SAMPLES], quantizers, beyond=True)
            return _search(inputs, trial, activation, weight)

        return scale_inputs(model, context, self.exclude, self._statistics, choose, obstacle=self._obstacle)

    def _obstacle(self, inputs: Inputs) -> str:
        return (unscalable_at_run_time if self.runtime else unscalable)(inputs)


def _search(
    inputs: Inputs, trial: Trial, activation: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, dict[str, object]]:
    alpha, seen, before = None, inputs.magnitude(trial.columns), trial.scaled(inputs, np.ones(len(weight)))
    lowest = before
    for candidate in np.linspace(0, 1, _STEPS + 1):
        error = trial.scaled(inputs, _factors(seen, weight, candidate))
        if error < lowest:
            alpha, lowest = round(float(candidate), 4), error
    facts: dict[str, object] = {"alpha": alpha}
    if before > 0:
        facts["error"] = round(lowest / before, 4)
    return np.ones(len(weight)) if alpha is None else _factors(activation, weight, alpha), facts


def _factors(activation: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    used = activation > 0
    if not weight.any():
        return np.ones(len(weight))
    weight = np.maximum(weight, _FLOOR * weight.max())
    return centred(np.where(used, activation, 1.0) ** alpha / weight ** (1 - alpha), used)


def _column_maxima(value: ir.Value | None) -> np.ndarray:
    """The largest magnitude in each column of a weight, ``[K]``."""
    weight = read_weight(value)
    assert weight is not None
    numbers, maxima = weight.raw(), np.zeros(weight.shape[1], np.float32)
    step = max(1, _ROWS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = np.asarray(numbers[start : start + step], np.float32)
        maxima = np.maximum(maxima, np.maximum(rows.max(axis=0), -rows.min(axis=0)))
    del numbers  # a view of the file
    weight.release()
    return maxima
