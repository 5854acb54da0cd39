"""Makes activation channels symmetric and equally large, so that one step of 1 rounds them all."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.passes.base import BlockPass, Context, Contract, Exact, Result, check_patterns
from qc.passes.statistics import Request, Statistic
from qc.passes.transform._inputs import Columns, Inputs, operators, requests, scale_inputs, unseparable
from qc.passes.transform.actions import Shift
from qc.passes.transform.fold import fold

__all__ = ["OutlierTune"]

_STATISTICS = (Statistic.MIN, Statistic.MAX)


@dataclasses.dataclass(frozen=True)
class OutlierTune(BlockPass):
    """Subtracts the middle ``c`` of each channel, and divides it by the step ``s = max|x - c| / (2^(bits-1) - 1)``.

    Afterwards the integers nearest to the activation are its codes, of step 1, with a scale for each channel of what it
    was: the weights carry the scales already (``W' = W s``), and the layers behind get the bias ``c W^T``.

    ``c`` is the middle of the smallest and largest value on calibration data, so none of it is clipped; the original
    takes the mean of the middles of single samples. A bias takes the shift up where there is one or can be one, in a
    LayerNormalization or a linear layer; elsewhere channels are scaled alone, or shifted at run time if asked for.

    Left alone, with the reason: channels whose factors something on the way does not let through, and weights that are
    shared with other layers. A cache holds scaled and shifted values.

    Source: OutlierTune, arXiv 2406.18832, sections 4.1 (pre-executed dequantization) and 4.2 (symmetrization), on every
    group that admits them instead of the outputs of norms alone.

    Attributes:
        bits: Bits that activations will have.
        symmetrize: Whether to shift channels.
        runtime: Whether to shift at run time where no bias can take the shift up.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    bits: int = 8
    symmetrize: bool = True
    runtime: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InputError(f"Expected 2 to 16 bits of activations for outlier-tune, found {self.bits}.")
        check_patterns(self.exclude)

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, _STATISTICS)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context

        def choose(inputs: Inputs, columns: Columns) -> tuple[np.ndarray, dict[str, object]]:
            low, high = _bounds(inputs, columns)
            middle = (low + high) / 2 if self._shifts(inputs) else np.zeros(len(low))
            reach = inputs.tied(np.maximum(high - middle, middle - low))
            return np.where(reach > 0, reach, 1.0) / ((1 << (self.bits - 1)) - 1), {}

        def shift(inputs: Inputs, columns: Columns, factors: np.ndarray) -> dict[str, object]:
            if not self._shifts(inputs):
                return {}
            low, high = _bounds(inputs, columns)
            offsets = -(low + high) / 2 / factors
            folded = fold(model, inputs.group, Shift(offsets), context.store, runtime=self.runtime)
            facts: dict[str, object] = {"shifted": True} if folded.modified else {}
            return facts | ({"added": operators(folded)} if folded.added else {})

        return scale_inputs(model, context, self.exclude, _STATISTICS, choose, after=shift)

    def _shifts(self, inputs: Inputs) -> bool:
        admits = "shift" in inputs.group.admits or (self.runtime and not unseparable(inputs))
        return self.symmetrize and inputs.products[0].power == -1.0 and admits


def _bounds(inputs: Inputs, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of each channel."""
    low = -inputs.greatest([-c for c in columns[Statistic.MIN]])
    return low, inputs.greatest(columns[Statistic.MAX])
