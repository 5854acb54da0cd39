"""Range search for affine codes: which scale and zero point make a group's error least.

Everything here works on a matrix of groups that fits in a core's cache, `axis` being the one along which the elements
of a group lie. Weights are first divided by the group's range, so a candidate is a number c of code units per range,
the same for weights of any magnitude.

For a candidate with codes u (zero point taken off) and residual ``r = c x - u``, the least-squares scale
``c' = c / (1 + sum(r u) / sum(u^2))`` leaves ``(sum(r^2) - sum(r u)^2 / sum(u^2)) / c^2``: scale and error follow from
three sums, without a second pass over the weights and without cancellation at 8 bits. So every candidate of the search
is a step of the alternation between nearest codes and least-squares scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from qc.ir.quant import Affine

__all__ = ["Range", "Search", "search"]

_STEP = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.0569, 8: 0.0308}
"""Step of the uniform quantizer of least mean square error for a normal variable of unit variance (Max 1960)."""

_DEAD = 1e-35
"""A group whose range is smaller decodes to zero: the reciprocal of its range could overflow in float32."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How hard to look; the defaults were chosen with benchmarks/range_search.py.

    Attributes:
        coarse: Number of candidates per group, geometrically from slightly wider than its range to the range that would
            be best were it normally distributed.
        fine: Relative steps tried around the best coarse candidate.
        polish: Steps of alternation between least-squares scale and nearest codes at the end.
    """

    coarse: int = 8
    fine: tuple[float, ...] = (-0.015, 0.015)
    polish: int = 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The parameters that a search found, one per group, float32.

    Attributes:
        scale: Not yet rounded to its storage type.
        zero: Added to ``round(w / scale)``: to reach codes if asymmetric, to count from the lowest code if symmetric.
    """

    scale: np.ndarray
    zero: np.ndarray


def search(w: np.ndarray, values: Affine, axis: int, importance: np.ndarray | None, effort: Search) -> Range | None:
    """Finds the range of each group that minimizes ``sum(importance * (w - decoded)^2)``.

    Symmetric codes of 2 and 4 bits carry a signed scale: the entry of largest magnitude lies on the side with one more
    code. Candidates reach from the narrow rule, which maps it to ``-(2^(b-1) - 1)``, over the full rule, ``-2^(b-1)``,
    to ranges in which the largest entries are clipped. 8-bit scales are positive: the extra code gains nothing there.
    Asymmetric zero points are codes: the one that centres the clipped range is tried, then the neighbours of the best.
    Half-offset codes have a positive scale and no zero.

    The absmax (min-max) range is among the candidates, so the result is never worse than that up to the rounding of the
    scale to its storage type.

    Args:
        w: Groups, float32; padding is zero, which is exact in every format and so changes no choice.
        values: Bits and symmetry.
        axis: The axis of `w` along which a group lies.
        importance: Weight of each element's squared error, shaped as `w`, or None for one.
        effort: How hard to look.

    Returns:
        Scale and zero point per group (kept dimensions), or None if a weight is not finite.
    """
    low, high = w.min(axis, keepdims=True), w.max(axis, keepdims=True)
    if values.symmetric:
        span = np.maximum(-low, high)
        unit = np.where((high >= -low) & (values.bits < 8) & (not values.half), -span, span)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        with np.errstate(over="ignore"):
            unit = span = high - low
    if not np.all(np.isfinite(span)):
        return None
    dead = span < _DEAD
    unit = np.where(dead, np.float32(1), unit)
    x = w * (1 / unit)
    trial = _Trial(x, importance, axis, values)
    for units in _candidates(x, values, axis, effort.coarse):
        for zero in _zeros(values, (low + high) / unit * units):
            trial.attempt(units, zero)
    best = trial.units.copy()
    for step in effort.fine:
        trial.attempt(best * np.float32(1 + step), trial.zero)
    if not values.symmetric:
        units, zero = trial.refit(), trial.zero.copy()
        trial.attempt(units, zero - 1)
        trial.attempt(units, zero + 1)
    for _ in range(effort.polish):
        trial.attempt(trial.refit(), trial.zero)
    scale = np.where(dead, np.float32(1), unit / trial.refit())
    return Range(scale, trial.zero)


def _candidates(x: np.ndarray, values: Affine, axis: int, count: int) -> Iterator[np.ndarray]:
    """Code units per range: absmax, then from a little below it to the normal optimum.

    At 8 bits clipping never pays far, so the candidates stay close to absmax.
    """
    end = 1 << (values.bits - 1) if values.symmetric else values.high
    absmax = values.high + (0.5 if values.half else 0)
    power = _sum(x, x, axis) / x.shape[axis]
    widest = 1.1 / (_STEP[values.bits] * np.sqrt(np.maximum(power, 1e-12)))
    first, last = 0.93 * absmax, np.maximum(end + 0.4, widest)
    if values.bits == 8:
        first, last = absmax, np.minimum(last, 1.3 * end)
    steps = np.log(last / first) / max(count - 1, 1)
    yield np.full_like(power, absmax)
    for i in range(count):
        yield (first * np.exp(steps * i)).astype(np.float32)


def _zeros(values: Affine, shift: np.ndarray) -> list[np.ndarray]:
    """Zero points that centre a range whose ends add up to `shift` code units; that of symmetric codes is fixed."""
    if values.symmetric:
        return [np.full_like(shift, -values.low)]
    centred = (values.high - shift) / 2
    if values.bits > 2:
        return [np.rint(centred)]
    # A step of the zero point is a third of the range here, so both roundings are worth their time.
    return [np.floor(centred), np.floor(centred) + 1]


class _Trial:
    """The best candidate of each group so far."""

    def __init__(self, x: np.ndarray, importance: np.ndarray | None, axis: int, values: Affine) -> None:
        self._x, self._importance, self._axis, self._top = x, importance, axis, values.high - values.low
        self._offset = np.float32(0.5 if values.half else 0)
        self._u, self._r = np.empty_like(x), np.empty_like(x)
        groups = _sum(x, x, axis)
        self.units = np.ones_like(groups)
        self.zero = np.zeros_like(groups)
        self._error = np.full_like(groups, np.inf)
        self._slope = np.zeros_like(groups)

    def attempt(self, units: np.ndarray, zero: np.ndarray) -> None:
        """Measures a candidate in all groups and keeps it where it is better."""
        u, r = self._u, self._r
        zero = np.clip(zero, 0, self._top)
        np.multiply(self._x, units, out=r)
        np.rint(r - self._offset if self._offset else r, out=u)
        np.maximum(u, -zero, out=u)
        np.minimum(u, self._top - zero, out=u)
        if self._offset:
            u += self._offset
        np.subtract(r, u, out=r)
        if self._importance is None:
            rr, ru, uu = _sum(r, r, self._axis), _sum(r, u, self._axis), _sum(u, u, self._axis)
        else:
            weighted = r * self._importance
            rr, ru = _sum(weighted, r, self._axis), _sum(weighted, u, self._axis)
            uu = _sum(np.multiply(u, self._importance, out=weighted), u, self._axis)
        slope = ru / np.maximum(uu, 1e-30)
        error = (rr - slope * ru) / (units * units)
        better = error < self._error
        kept = (self._error, self._slope, self.units, self.zero)
        for held, found in zip(kept, (error, slope, units, zero), strict=True):
            np.copyto(held, found, where=better)

    def refit(self) -> np.ndarray:
        """Units of the least-squares scale for the codes of the best candidate."""
        return self.units / np.maximum(1 + self._slope, 1e-3)


def _sum(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    total = np.einsum("gm,gm->m", a, b) if axis == 0 else np.einsum("mg,mg->m", a, b)
    return np.expand_dims(total, axis)
