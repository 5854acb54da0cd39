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

_STATISTICS = (Statistic.SAMPLES, Statistic.MIN, Statistic.MAX)


@dataclasses.dataclass(frozen=True)
class SmoothPowers(BlockPass):
    """Divides activation channels by the powers of two that rounding asks for, and multiplies the weights by them.

    With a step ``d = (max - min) / (2^bits - 1) / 2^largest`` for the whole tensor, channel c is divided by ``2^k``
    with the k of 0, ..., `largest` for which the step ``2^k d`` rounds it with the least squared error on samples. The
    large channels get the largest factor, and keep their step; the small ones get a finer one. Powers of two only
    change exponents, so the outputs stay the same bit for bit, unless a number leaves the range of float32.

    Left alone, with the reason: channels whose factors something on the way does not let through, and weights that are
    shared with other layers. A cache holds scaled values.

    Source: Agile-Quant, arXiv 2312.05693, the power-of-two factors of its activations, on every group that admits them.

    Attributes:
        bits: Bits that activations will have.
        largest: The largest exponent.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    bits: int = 8
    largest: int = 3
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InputError(f"Expected 2 to 16 bits of activations for smooth-powers, found {self.bits}.")
        if not 1 <= self.largest <= 16:
            raise InputError(f"Expected a largest exponent from 1 to 16 for smooth-powers, found {self.largest}.")
        check_patterns(self.exclude)

    @property
    def sequential(self) -> bool:
        return True  # samples of the inputs of all layers at once would take much memory

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, _STATISTICS)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        return scale_inputs(model, context, self.exclude, _STATISTICS, self._choose)

    def _choose(self, inputs: Inputs, columns: Columns) -> tuple[np.ndarray, dict[str, object]]:
        inputs_of = zip(*(columns[s] for s in _STATISTICS), strict=True)
        exponents = [self._exponents(x, low, high) for x, low, high in inputs_of]
        # What shares a factor gets the largest: none of its channels may be clipped.
        shared = inputs.largest(exponents)
        return 2.0**shared, {"exponents": np.bincount(shared.astype(int), minlength=self.largest + 1).tolist()}

    def _exponents(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The best exponent of each channel of an input, ``[K]``."""
        smallest, largest = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
        levels = (1 << self.bits) - 1
        step = (largest - smallest) / levels
        if step == 0:
            return np.zeros(x.shape[1])
        zero = np.rint(-smallest / step)
        errors = []
        for exponent in range(self.largest + 1):
            own = step / 2.0 ** (self.largest - exponent)
            rounded = (np.clip(np.rint(x / own) + zero, 0, levels) - zero) * own
            errors.append(np.square(rounded - x).sum(axis=0, dtype=np.float64))
        return np.argmin(errors, axis=0).astype(np.float64)
