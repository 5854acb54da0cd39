"""Fits of values that are multiplied by a scale and store little else."""

from __future__ import annotations

import dataclasses

import numpy as np

from qc.ir.quant import Affine, Power, SearchedFloat, Select, Table
from qc.passes.quantize._fit_base import Fit, better, measured, range_search
from qc.passes.quantize._search import Search, search

__all__ = ["fit_affine", "fit_power", "fit_searched_float", "fit_select", "fit_table"]

_REFITS = 4
"""Steps of alternation between nearest codes and least squares; later ones change less than a thousandth."""

_EXPONENTS = np.arange(0.3, 1.25, 0.05)

_SAMPLE = 16
"""Rows that the exponent of a weight is searched on."""


def fit_affine(values: Affine, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    found = search(w, values, 1, importance, effort)
    assert found is not None, "callers check that weights are finite"
    if values.symmetric:
        return measured(values, w, importance, found.scale, {})
    zero = found.zero[:, 0]
    if not values.floating:
        return measured(values, w, importance, found.scale, {"zero_point": zero.astype(np.uint8)})
    best = measured(values, w, importance, found.scale, {"zero_point": zero.astype(np.float16)})
    for _ in range(_REFITS):
        best = better(best, _line(values, w, importance, best))
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
    return measured(values, w, importance, scale, {"zero_point": zero.astype(np.float16)})


def fit_table(values: Table, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    return range_search(values, w, importance, {}, effort)


def fit_select(values: Select, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """The best of the four tables, the first one of equals."""
    best = None
    for kind in range(len(values.values)):
        params = {"kind": np.full(len(w), kind, np.uint8)}
        found = range_search(values, w, importance, params, effort)
        best = found if best is None else better(best, found)
    assert best is not None
    return best


def fit_searched_float(values: SearchedFloat, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """The split of the bits with the least error of the whole weight."""
    kinds = [{"kind": np.array([kind], np.uint8)} for kind in range(len(values.values))]
    return min((range_search(values, w, importance, p, effort) for p in kinds), key=lambda f: float(f.error.sum()))


def fit_power(values: Power, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """The exponent with the least error of evenly spaced rows, by search over a grid (PowerQuant's objective)."""
    rows = np.unique(np.linspace(0, len(w) - 1, _SAMPLE).astype(int))
    weights = None if importance is None else importance[rows]

    quick = dataclasses.replace(effort, coarse=effort.coarse // 2, fine=(), polish=0)

    def error(exponent: float) -> float:
        params = {"exponent": np.array([exponent], np.float32)}
        return float(range_search(values, w[rows], weights, params, quick).error.sum())

    params = {"exponent": np.array([min(_EXPONENTS, key=error)], np.float32)}
    return range_search(values, w, importance, params, effort)
