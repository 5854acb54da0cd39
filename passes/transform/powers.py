"""Gives activation channels factors that are powers of two, which change no bit of a mantissa."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.passes.base import BlockPass, Context, Contract, Exact, Result, check_patterns
from qc.passes.statistics import Request, Statistic
from qc.passes.transform._inputs import Columns, Inputs, requests, scale_inputs

__all__ = ["SmoothPowers"]

_STATISTICS = (Statistic.MIN, Statistic.MAX)


@dataclasses.dataclass(frozen=True)
class SmoothPowers(BlockPass):
    """Divides activation channels by the powers of two that rounding asks for, and multiplies the weights by them.

    A channel is divided by ``2^k``, with the smallest k of 0, ..., `largest` for which its values fit into the range of
    the whole tensor divided by ``2^largest``. The large channels get the largest factor, and keep their step; the small
    ones get one that is up to ``2^largest`` times finer. Powers of two only change exponents, so the outputs stay the
    same bit for bit, unless a number leaves the range of float32.

    The original takes the k of least squared error, which may clip rare values: ours does not, because the quantizer
    behind would widen the range of all channels for them.

    Left alone, with the reason: channels whose factors something on the way does not let through, and weights that are
    shared with other layers. A cache holds scaled values.

    Source: Agile-Quant, arXiv 2312.05693, the power-of-two factors of its activations, on every group that admits them.

    Attributes:
        largest: The largest exponent.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    largest: int = 3
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.largest <= 16:
            raise InputError(f"Expected a largest exponent from 1 to 16 for smooth-powers, found {self.largest}.")
        check_patterns(self.exclude)

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, _STATISTICS)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        return scale_inputs(model, context, self.exclude, _STATISTICS, self._choose)

    def _choose(self, inputs: Inputs, columns: Columns) -> tuple[np.ndarray, dict[str, object]]:
        bounds = zip(columns[Statistic.MIN], columns[Statistic.MAX], strict=True)
        shared = inputs.largest([self._exponents(low, high) for low, high in bounds])
        return 2.0**shared, {"exponents": np.bincount(shared.astype(int), minlength=self.largest + 1).tolist()}

    def _exponents(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The exponent of each channel of an input, ``[K]``."""
        ranges = [(-low, max(-float(low.min()), 0.0)), (high, max(float(high.max()), 0.0))]
        exponents = np.zeros(len(low))
        for values, bound in ranges:
            for exponent in range(self.largest):
                exponents[values > bound * 2.0 ** (exponent - self.largest)] = exponent + 1
        return np.zeros(len(low)) if exponents.min() == self.largest else exponents
