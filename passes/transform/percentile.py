"""Brings the few largest activation channels down to the next ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.passes.base import BlockPass, Context, Contract, Exact, Result, check_patterns
from qc.passes.statistics import Request, Statistic
from qc.passes.transform._inputs import Columns, Inputs, requests, scale_inputs

__all__ = ["SmoothPercentile"]

_STATISTICS = (Statistic.ABS_MAX,)


@dataclasses.dataclass(frozen=True)
class SmoothPercentile(BlockPass):
    """Divides the channels that are larger than ``a*`` by ``s_j = max|x_j| / a*``, and multiplies the weights by it.

    ``a*`` is the k-th largest magnitude of a channel, ``k = floor(share C + 1.5)`` of C channels: all but the largest
    ones stay as they are, and so do their weights. The function stays the same.

    Left alone, with the reason: channels whose factors something on the way does not let through, and weights that are
    shared with other layers. A cache holds scaled values.

    Source: DGQ, arXiv 2310.04836, section 3.3 (percentile clipping smoothing), on every group that admits it.

    Attributes:
        share: The share of channels that may be divided.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    share: float = 0.005
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InputError(f"Expected a share from 0 to below 1 for smooth-percentile, found {self.share}.")
        check_patterns(self.exclude)

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, _STATISTICS)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        return scale_inputs(model, context, self.exclude, _STATISTICS, self._choose)

    def _choose(self, inputs: Inputs, columns: Columns) -> tuple[np.ndarray, dict[str, object]]:
        magnitude = inputs.largest(columns[Statistic.ABS_MAX])
        rank = min(int(self.share * len(magnitude) + 1.5), len(magnitude))
        bound = np.sort(magnitude)[-rank]
        factors = np.maximum(magnitude / bound, 1.0) if bound > 0 else np.ones(len(magnitude))
        return factors, {"bound": float(bound), "channels": int(np.count_nonzero(factors > 1))}
