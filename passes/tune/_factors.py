"""Positive factors of channel groups as differentiable functions, and what they do to the weights of the groups."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from qc.ir.quant import read_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from qc.ir.channels import ChannelGroup, Use

__all__ = ["LearnedFactors", "LearnedVector", "Scaling", "scalings"]

_FARTHEST = math.log(100)
"""OmniQuant bounds factors by 1/100 likewise."""


class LearnedFactors:
    """``exp(l)`` for each channel of a group: positive, equal within the cells of the group, 1 at the start.

    Attributes:
        parameters: What is learned, by name.
    """

    def __init__(self, group: ChannelGroup, device: str) -> None:
        """Starts with factors of 1."""
        cells, cell = np.unique(group.cells, return_inverse=True)
        self._cell = torch.from_numpy(cell.reshape(-1)).to(device)
        self.parameters = {"logarithm": torch.zeros(len(cells), device=device).requires_grad_()}

    def __call__(self, power: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A power of the factors, ``[width of the group]``."""
        return (power * self.parameters["logarithm"].to(dtype)).exp()[self._cell]

    def facts(self) -> dict[str, float]:
        """How far they reach, for the report."""
        found = self().detach()
        return {"smallest": float(found.min()), "largest": float(found.max())}

    @torch.no_grad()
    def bound(self) -> None:
        """Brings what is learned back into its bounds."""
        self.parameters["logarithm"].clamp_(-_FARTHEST, _FARTHEST)


class Scaling:
    """What one weight is multiplied with: at each place the power that belongs there of the factor of its channel."""

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        """Starts without factors, for a weight of this shape."""
        self._shape, self._device = shape, device
        self._parts: dict[tuple[object, ...], tuple[LearnedFactors, Use]] = {}

    def add(self, factors: LearnedFactors, use: Use) -> None:
        """Adds the factors of a group that the weight is in; of two readers with the same channels one counts."""
        self._parts[factors, use.power, use.axes, use.index.tobytes()] = factors, use

    def __call__(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The factors, in the shape of the weight."""
        result = torch.ones(self._shape, dtype=dtype, device=self._device)
        for factors, use in self._parts.values():
            index = torch.from_numpy(use.index).to(self._device)
            inside = torch.where(index >= 0, factors(use.power, dtype)[index.clamp(min=0)], 1.0)
            along = inside.reshape([n if axis in use.axes else 1 for axis, n in enumerate(use.shape)])
            result = result * along.expand(use.shape).reshape(self._shape)
        return result

    @torch.no_grad()
    def folded(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weight with the factors in it: multiplied in double precision, and cast once."""
        return (numbers.double() * self(torch.float64)).float()


def scalings(groups: Sequence[ChannelGroup], device: str) -> tuple[list[LearnedFactors], dict[ir.Value, Scaling]]:
    """Factors of some groups, and what they do to each weight in them, by the value that is read."""
    learned, found = [], {}
    for group in groups:
        learned.append(LearnedFactors(group, device))
        for use in group.uses:
            weight = read_weight(use.value)
            if weight is not None and use.power != 0:
                found.setdefault(weight.value, Scaling(weight.shape, device)).add(learned[-1], use)
    return learned, found


class LearnedVector:
    """Gains or biases, times factors of channel groups if there are any.

    Attributes:
        parameters: What is learned, by name.
    """

    def __init__(self, numbers: np.ndarray, learned: bool, scaling: Scaling | None, device: str) -> None:
        """Starts at `numbers`; `learned`: whether they change by themselves too, and not by factors alone."""
        self._numbers = torch.from_numpy(np.array(numbers, np.float32)).to(device)
        self._scaling = scaling
        self.parameters = {"vector": self._numbers.requires_grad_()} if learned else {}

    def __call__(self) -> torch.Tensor:
        """The numbers."""
        return self._numbers if self._scaling is None else self._numbers * self._scaling()

    def stored(self) -> torch.Tensor:
        """The numbers as they would be stored."""
        return self._numbers.detach() if self._scaling is None else self._scaling.folded(self._numbers)

    def bound(self) -> None:
        """Does nothing: numbers have no bounds."""
