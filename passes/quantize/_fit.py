"""Finds the scale and the other parameters of groups in any format: the default of each value map.

A fit works on a matrix of groups ``[G, M]``. It makes ``sum(importance * (w - decoded)^2)`` of each group small with
codes that are the nearest to ``w / scale``; another assignment may choose other codes for the parameters found.
"""

from __future__ import annotations

import dataclasses
import functools
from statistics import NormalDist

import numpy as np

from qc.ir.quant import Affine, Format, MicroScale, Select, Table
from qc.passes.quantize._search import Search, search

__all__ = ["Fit", "fit", "fit_scales"]

_REFITS = 4
"""Steps of alternation between nearest codes and least squares; later ones change less than a thousandth."""


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


def fit_scales(
    format: Format, w: np.ndarray, importance: np.ndarray | None, effort: Search
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Fits a format to rows of a weight.

    Args:
        format: Its groups lie along the rows of `w`.
        w: ``[N, K]``, float32 and finite.
        importance: ``[K]``: weight of the squared error of each column, or None for one.
        effort: How hard to search.

    Returns:
        Scales ``[N, groups]``, float32, powers of two if the format stores such; and the other parameters
        ``[N, groups, ...]``.
    """
    rows, columns = w.shape
    groups, width = format.groups(columns), format.width(columns)
    missing = groups * width - columns
    grouped = np.pad(w, ((0, 0), (0, missing))).reshape(rows * groups, width)
    if importance is not None:
        spread = np.pad(importance, (0, missing)).reshape(groups, width)
        spread = np.where(spread.any(axis=1, keepdims=True), spread, np.float32(1))
        spread /= spread.max(axis=1, keepdims=True)
        importance = np.tile(spread, (rows, 1))
    found = fit(format.values, grouped, importance, effort)
    if isinstance(format.scale, MicroScale):
        lower = np.exp2(np.floor(np.log2(np.abs(found.scale)))).astype(np.float32)
        options = [_measured(format.values, grouped, importance, s, found.params) for s in (lower, 2 * lower)]
        found = _better(*options)
    params = {key: array.reshape(rows, groups, *array.shape[1:]) for key, array in found.params.items()}
    return found.scale.reshape(rows, groups), params


@functools.singledispatch
def fit(values: object, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """Fits the parameters of a value map to groups.

    Args:
        values: The value map.
        w: Groups ``[G, M]``, float32 and finite; padding is zero.
        importance: Weight of each element's squared error, or None for one.
        effort: How hard to search.
    """
    raise NotImplementedError(f"{values} has no default assignment")


@fit.register
def _(values: Affine, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    found = search(w, values, 1, importance, effort)
    assert found is not None, "callers check that weights are finite"
    if values.symmetric:
        return _measured(values, w, importance, found.scale, {})
    zero = found.zero[:, 0]
    if not values.floating:
        return _measured(values, w, importance, found.scale, {"zero_point": zero.astype(np.uint8)})
    best = _measured(values, w, importance, found.scale, {"zero_point": zero.astype(np.float16)})
    for _ in range(_REFITS):
        best = _better(best, _line(values, w, importance, best))
    return best


def _line(values: Affine, w: np.ndarray, importance: np.ndarray | None, start: Fit) -> Fit:
    """Scale and float zero point by linear regression on the codes of `start`."""
    codes = values.nearest(w / start.scale, start.params).astype(np.float32)
    f = np.ones_like(w) if importance is None else importance
    total = f.sum(axis=1, keepdims=True)
    mean_q, mean_w = ((f * a).sum(axis=1, keepdims=True) / total for a in (codes, w))
    q = codes - mean_q
    spread = (f * q * q).sum(axis=1, keepdims=True)
    slope = (f * q * (w - mean_w)).sum(axis=1, keepdims=True) / np.where(spread > 0, spread, 1)
    scale = np.where(slope > 0, slope, start.scale)
    zero = np.clip((mean_q - mean_w / scale)[:, 0], -60000, 60000)
    return _measured(values, w, importance, scale, {"zero_point": zero.astype(np.float16)})


@fit.register
def _(values: Table, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    return _range_search(values, w, importance, {}, effort)


@fit.register
def _(values: Select, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """The best of the four tables, the first one of equals."""
    best = None
    for kind in range(len(values.values)):
        params = {"kind": np.full(len(w), kind, np.uint8)}
        found = _range_search(values, w, importance, params, effort)
        best = found if best is None else _better(best, found)
    assert best is not None
    return best


def _range_search(
    values: Table | Select, w: np.ndarray, importance: np.ndarray | None, params: dict[str, np.ndarray], effort: Search
) -> Fit:
    """Tries scales from slightly more than the range down to what is best for a normal variable, then least squares.

    The scale that just reaches the largest element is among them, so that rule is never better.
    """
    low, high = values.reach(params)
    reach = np.maximum(np.divide(w.max(axis=1, keepdims=True), high), np.divide(w.min(axis=1, keepdims=True), low))
    absmax = np.where(reach > 0, reach, np.float32(1)).astype(np.float32)
    best = _measured(values, w, importance, absmax, params)
    power = np.sqrt(np.einsum("gm,gm->g", w, w)[:, None] / w.shape[1])
    end = np.minimum(0.7 * absmax, _normal_scale(values) * power)
    steps = np.log(np.maximum(end, 0.01 * absmax) / (1.1 * absmax)) / max(effort.coarse - 1, 1)
    for i in range(effort.coarse):
        scale = (1.1 * absmax * np.exp(steps * i)).astype(np.float32)
        best = _better(best, _measured(values, w, importance, scale, params))
    for step in effort.fine:
        best = _better(best, _measured(values, w, importance, best.scale * np.float32(1 + step), params))
    for _ in range(effort.polish + 1):
        units = values.decode(values.nearest(w / best.scale, params), params)
        weighted = units if importance is None else units * importance
        energy = np.einsum("gm,gm->g", weighted, units)[:, None]
        product = np.einsum("gm,gm->g", weighted, w)[:, None]
        scale = np.where((energy > 0) & (product > 0), product / np.where(energy > 0, energy, 1), best.scale)
        best = _better(best, _measured(values, w, importance, scale.astype(np.float32), params))
    return best


@functools.cache
def _normal_scale(values: Table | Select) -> float:
    """The best scale of a table for a normal variable of unit variance, from its quantiles."""
    count = 1024
    sample = np.array([[NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]], np.float32)
    params = {} if isinstance(values, Table) else {"kind": np.zeros(1, np.uint8)}
    scales = np.geomspace(8, 0.125, 49).astype(np.float32) / np.abs(values.reach(params)[1]).max()
    errors = [_measured(values, sample, None, np.full((1, 1), s), params).error.item() for s in scales]
    return float(scales[int(np.argmin(errors))])


def _measured(
    values: Affine | Table | Select,
    w: np.ndarray,
    importance: np.ndarray | None,
    scale: np.ndarray,
    params: dict[str, np.ndarray],
) -> Fit:
    noise = w - values.decode(values.nearest(w / scale, params), params) * scale
    weighted = noise if importance is None else noise * importance
    return Fit(scale, params, np.einsum("gm,gm->g", weighted, noise)[:, None])


def _better(first: Fit, second: Fit) -> Fit:
    """The better of two fits of each group, the first of equals."""
    wins = second.error < first.error

    def chosen(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(wins.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    params = {name: chosen(array, second.params[name]) for name, array in first.params.items()}
    return Fit(chosen(first.scale, second.scale), params, chosen(first.error, second.error))
