"""What the fits of all value maps share: measuring, comparing, and a search over scales."""

from __future__ import annotations

import dataclasses
import functools
from statistics import NormalDist

import numpy as np

from qc.ir.quant import ValueMap
from qc.passes.quantize._search import Search

__all__ = ["Fit", "better", "measured", "range_search", "refitted"]


@dataclasses.dataclass(frozen=True)
class Fit:
    """The parameters of groups.

    Attributes:
        scale: ``[G, 1]``, float32, not yet rounded to its storage; ones where values are absolute.
        params: Parameters of the value map, ``[G, *shape]``.
        error: Weighted squared error of each group, ``[G, 1]``, with the scale as it is.
    """

    scale: np.ndarray
    params: dict[str, np.ndarray]
    error: np.ndarray


def range_search(
    values: ValueMap, w: np.ndarray, importance: np.ndarray | None, params: dict[str, np.ndarray], effort: Search
) -> Fit:
    """Tries scales from slightly more than the range down to what is best for a normal variable, then least squares.

    The scale that just reaches the largest element is among them, so that rule is never better.
    """
    low, high = values.reach(params)
    reach = np.maximum(np.divide(w.max(axis=1, keepdims=True), high), np.divide(w.min(axis=1, keepdims=True), low))
    absmax = np.where(reach > 0, reach, np.float32(1)).astype(np.float32)
    best = measured(values, w, importance, absmax, params)
    power = np.sqrt(np.einsum("gm,gm->g", w, w)[:, None] / w.shape[1])
    end = np.minimum(0.7 * absmax, normal_scale(values, params) * power)
    steps = np.log(np.maximum(end, 0.01 * absmax) / (1.1 * absmax)) / max(effort.coarse - 1, 1)
    for i in range(effort.coarse):
        scale = (1.1 * absmax * np.exp(steps * i)).astype(np.float32)
        best = better(best, measured(values, w, importance, scale, params))
    for step in effort.fine:
        best = better(best, measured(values, w, importance, best.scale * np.float32(1 + step), params))
    for _ in range(effort.polish + 1):
        best = refitted(values, w, importance, best)
    return best


def refitted(values: ValueMap, w: np.ndarray, importance: np.ndarray | None, fit: Fit) -> Fit:
    """With the least-squares scale of each group for its nearest codes, where that is better."""
    units = values.decode(values.nearest(w / fit.scale, fit.params), fit.params)
    weighted = units if importance is None else units * importance
    energy = np.einsum("gm,gm->g", weighted, units)[:, None]
    product = np.einsum("gm,gm->g", weighted, w)[:, None]
    scale = np.where((energy > 0) & (product > 0), product / np.where(energy > 0, energy, 1), fit.scale)
    return better(fit, measured(values, w, importance, scale.astype(np.float32), fit.params))


def normal_scale(values: ValueMap, params: dict[str, np.ndarray]) -> float:
    """The best scale of values for a normal variable of unit variance, with the parameters of the first group."""
    first = {name: array[:1] for name, array in params.items()}
    scales = np.geomspace(8, 0.125, 49).astype(np.float32) / np.abs(values.reach(first)[1]).max()
    errors = [measured(values, _normal_sample(), None, np.full((1, 1), s), first).error.item() for s in scales]
    return float(scales[int(np.argmin(errors))])


@functools.cache
def _normal_sample() -> np.ndarray:
    count = 1024
    return np.array([[NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]], np.float32)


def measured(
    values: ValueMap, w: np.ndarray, importance: np.ndarray | None, scale: np.ndarray, params: dict[str, np.ndarray]
) -> Fit:
    """The error of a scale and parameters, with the nearest codes."""
    noise = w - values.decode(values.nearest(w / scale, params), params) * scale
    weighted = noise if importance is None else noise * importance
    return Fit(scale, params, np.einsum("gm,gm->g", weighted, noise)[:, None])


def better(first: Fit, second: Fit) -> Fit:
    """The better of two fits of each group, the first of equals."""
    wins = second.error < first.error

    def chosen(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(wins.reshape(-1, *[1] * (a.ndim - 1)), b, a) if len(a) == len(wins) else a

    params = {name: chosen(array, second.params[name]) for name, array in first.params.items()}
    return Fit(chosen(first.scale, second.scale), params, chosen(first.error, second.error))
