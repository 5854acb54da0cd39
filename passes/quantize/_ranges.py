"""Which range a static quantizer of an activation covers, from what was observed on calibration data.

A range that holds everything has no clipping error and coarse steps; a narrower one clips the tails and rounds the bulk
finer. Four rules choose between them:

| rule | range |
|---|---|
| ``minmax`` | from the smallest to the largest value |
| ``percentile`` | without a share of the values at either end |
| ``mse`` | least ``sum (x - x')^2`` over all observed values |
| ``output`` | least ``sum_k c_k (x_k - x'_k)^2`` with ``c_k = sum_n W_nk^2`` over all weights that read channel k |

The last one is the expected squared error of the products that read the value, as far as the errors of two channels
are independent, which those of rounding are.
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["RULES", "Grid", "Observed", "choose"]

RULES = ("minmax", "percentile", "mse", "output")

_SHRUNK = np.geomspace(1.0, 0.02, 60)
"""Ranges that are tried first, relative to that which holds everything."""

_AROUND = np.geomspace(0.75, 1.33, 23)
"""Positions that are tried for each end afterwards, relative to the best so far."""

_ROUNDS = 2

_SEARCHED_BITS = 8
"""Width up to which clipping can pay: finer steps are far below everything else."""

_SMALLEST_SCALE = 1e-30


@dataclasses.dataclass(frozen=True)
class Grid:
    """A uniform grid: ``x' = (clamp(round(x / scale) + zero, low, high) - zero) * scale``; arrays for one per channel.

    Attributes:
        bits: Width of a code.
        symmetric: Whether codes are signed with zero point 0; else they are unsigned.
        scale: Step.
        zero: Code of zero.
    """

    bits: int
    symmetric: bool
    scale: np.ndarray
    zero: np.ndarray

    @classmethod
    def of(cls, low: np.ndarray | float, high: np.ndarray | float, bits: int, symmetric: bool) -> Grid:
        """The grid of a range, which is widened to hold zero."""
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        if symmetric:
            scale = np.maximum(np.maximum(-low, high) / (2 ** (bits - 1) - 1), _SMALLEST_SCALE).astype(np.float32)
            return cls(bits, True, scale, np.zeros_like(scale, np.int64))
        scale = np.maximum((high - low) / (2**bits - 1), _SMALLEST_SCALE).astype(np.float32)
        return cls(bits, False, scale, np.rint(-low / scale).astype(np.int64))

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """The points of the grid that stand for x."""
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        codes = np.clip(np.rint(x / self.scale) + self.zero, low, low + 2**self.bits - 1)
        return (codes - self.zero) * self.scale


@dataclasses.dataclass(frozen=True)
class Observed:
    """What was seen of a value.

    Attributes:
        low: Smallest entry of each channel.
        high: Largest entry of each channel.
        points: Values in ascending order that stand for all entries; None if only the ends are known.
        counts: How much each of them counts.
    """

    low: np.ndarray
    high: np.ndarray
    points: np.ndarray | None = None
    counts: np.ndarray | None = None

    def noise(self, grid: Grid) -> float:
        """What rounding to a grid costs, in squares."""
        assert self.points is not None
        return float(np.dot((self.points - grid.rounded(self.points)) ** 2, self.counts))

    def sqnr(self, grid: Grid) -> float:
        """Signal to noise ratio of a grid in decibels."""
        assert self.points is not None
        noise = self.noise(grid)
        signal = float(np.dot(self.points**2, self.counts))
        return 10 * np.log10(signal / noise) if noise > 0 and signal > 0 else np.inf


def choose(seen: Observed, rule: str, bits: int, symmetric: bool, percentile: float) -> Grid:
    """The grid for a whole value by one of `RULES`; beyond 8 bits it always holds everything.

    Args:
        seen: With points, except for minmax.
        rule: How to choose.
        bits: Width of a code.
        symmetric: Whether the range is symmetric around zero.
        percentile: The share of values that the rule of that name covers on either side, in percent.
    """
    low, high = min(float(seen.low.min()), 0.0), max(float(seen.high.max()), 0.0)
    if rule == "minmax" or bits > _SEARCHED_BITS or low == high:
        return Grid.of(low, high, bits, symmetric)
    if rule == "percentile":
        return Grid.of(*_percentiles(seen, percentile, low, high), bits, symmetric)
    return _search(seen, low, high, bits, symmetric)


def _percentiles(seen: Observed, percentile: float, low: float, high: float) -> tuple[float, float]:
    assert seen.points is not None
    assert seen.counts is not None
    share = np.cumsum(seen.counts) / seen.counts.sum()
    last = len(share) - 1
    first, end = (min(int(np.searchsorted(share, q)), last) for q in (1 - percentile / 100, percentile / 100))
    return max(low, float(seen.points[first])), min(high, float(seen.points[end]))


def _search(seen: Observed, low: float, high: float, bits: int, symmetric: bool) -> Grid:
    """The range of least noise: both ends drawn in alike, then each end by itself."""
    best, ends = np.inf, (low, high)

    def attempt(bottom: float, top: float) -> None:
        nonlocal best, ends
        found = seen.noise(Grid.of(bottom, top, bits, symmetric))
        if found < best:
            best, ends = found, (bottom, top)

    for factor in _SHRUNK:
        attempt(low * factor, high * factor)
    for _ in range(_ROUNDS if not symmetric else 1):
        bottom, top = ends
        for factor in _AROUND:
            attempt(max(low, bottom * factor), ends[1])
        for factor in _AROUND:
            attempt(ends[0], min(high, top * factor))
    return Grid.of(*ends, bits, symmetric)
