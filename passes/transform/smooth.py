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
from qc.passes.transform._inputs import Columns, Inputs, centred, requests, scale_inputs

__all__ = ["Smooth"]

_STATISTICS = (Statistic.ABS_MAX,)

_FLOOR = 1e-5
"""Weights of a channel count as at least this share of the largest: a column of zeros says nothing about factors."""

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

    Source: SmoothQuant, arXiv 2211.10438, equation 4, on every group that admits it instead of the outputs of norms
    alone.

    Attributes:
        alpha: How much of the difficulty moves into the weights, from 0 to 1.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    alpha: float = 0.5
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"Expected an alpha from 0 to 1 for smooth, found {self.alpha}.")
        check_patterns(self.exclude)

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, _STATISTICS)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        return scale_inputs(model, context, self.exclude, _STATISTICS, self._choose)

    def _choose(self, inputs: Inputs, columns: Columns) -> tuple[np.ndarray, dict[str, object]]:
        activation = inputs.largest(columns[Statistic.ABS_MAX])
        weight = inputs.largest([_column_maxima(use.value) for use in inputs.products])
        return _factors(activation, weight, self.alpha), {"alpha": self.alpha}


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
