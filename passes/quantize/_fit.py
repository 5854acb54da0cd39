"""Finds the scale and the other parameters of groups in any format: the default of each value map.

A fit works on a matrix of groups ``[G, M]``. It makes ``sum(importance * (w - decoded)^2)`` of each group small with
codes that are the nearest to ``w / scale``; another assignment may choose other codes for the parameters found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qc.ir.quant import (
    Affine,
    Clustered,
    Format,
    Learned,
    MicroScale,
    Nested,
    Planes,
    Power,
    SearchedFloat,
    Select,
    SignedLowRank,
    Table,
    Vector,
)
from qc.passes.quantize._fit_base import Fit, better, measured
from qc.passes.quantize._fit_scaled import fit_affine, fit_power, fit_searched_float, fit_select, fit_table
from qc.passes.quantize._fit_stored import (
    fit_clustered,
    fit_learned,
    fit_nested,
    fit_planes,
    fit_signed_low_rank,
    fit_vector,
)
from qc.passes.quantize._search import Search

__all__ = ["fit_scales", "spread"]

_FITS: Mapping[type, Callable[[Any, np.ndarray, np.ndarray | None, Search], Fit]] = {
    Affine: fit_affine,
    Table: fit_table,
    SearchedFloat: fit_searched_float,
    Select: fit_select,
    Power: fit_power,
    Learned: fit_learned,
    Clustered: fit_clustered,
    Nested: fit_nested,
    Planes: fit_planes,
    Vector: fit_vector,
    SignedLowRank: fit_signed_low_rank,
}
"""Each takes a value map, groups ``[G, M]`` (finite float32, padded with zeros), the weight of each squared error or
None for one, and how hard to search."""


def fit_scales(
    format: Format, w: np.ndarray, importance: np.ndarray | None, effort: Search
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Fits a format to rows of a weight.

    Args:
        format: Its groups lie along the rows of `w`.
        w: ``[N, K]``, float32 and finite.
        importance: Weight of the squared error of each column, ``[K]``, of each element, ``[N, K]``, or of each row,
            ``[N, 1]``; None for one.
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
        wide = importance[None] if importance.ndim == 1 else importance
        if all(p.scope == "group" for p in format.values.params):
            wide = spread(np.broadcast_to(wide, (len(wide), columns)), groups, width)
        else:  # groups share parameters, so it matters which group counts how much
            wide = spread(np.broadcast_to(wide, w.shape).reshape(1, -1), 1, w.size).reshape(w.shape)
            wide = np.pad(wide, ((0, 0), (0, missing)))
        importance = np.ascontiguousarray(np.broadcast_to(wide, (rows, wide.shape[1]))).reshape(rows * groups, width)
    found = _FITS[type(format.values)](format.values, grouped, importance, effort)
    if isinstance(format.scale, MicroScale):
        lower = np.exp2(np.floor(np.log2(np.abs(found.scale)))).astype(np.float32)
        options = [measured(format.values, grouped, importance, s, found.params) for s in (lower, 2 * lower)]
        found = better(*options)
    scopes = {p.name: p.scope for p in format.values.params}
    params = {
        key: array.reshape(rows, groups, *array.shape[1:]) if scopes[key] == "group" else array
        for key, array in found.params.items()
    }
    return found.scale.reshape(rows, groups), params


def spread(weights: np.ndarray, groups: int, width: int) -> np.ndarray:
    """Weights of elements ``[N, K]`` by group, ``[N, groups * width]``, the largest of each group one.

    A group whose elements all weigh nothing counts them alike. Padding weighs nothing.
    """
    wide = np.pad(weights, ((0, 0), (0, groups * width - weights.shape[1]))).reshape(len(weights), groups, width)
    wide = np.where(wide.any(axis=2, keepdims=True), wide, np.float32(1))
    return (wide / wide.max(axis=2, keepdims=True)).reshape(len(weights), -1)
