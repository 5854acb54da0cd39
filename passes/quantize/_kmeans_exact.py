"""The table of least squared error in one dimension, by dynamic programming: no start, no local optimum.

The clusters of an optimum are runs of the sorted elements. With ``cost(i, j)`` the squared error of one value for
elements i to j - 1, which prefix sums give, the least error of the first j elements in c clusters is

    D_c(j) = min_i D_{c-1}(i) + cost(i, j)

(Wang and Song 2011, Ckmeans.1d.dp). All i are tried: n^2 steps for each value, so this is for short groups.
"""

from __future__ import annotations

import numpy as np

__all__ = ["optimal_bounds"]

_CELLS = 1 << 20
"""Entries of cost matrices that are held at a time: 8 MiB each."""


def optimal_bounds(points: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Where the clusters of the least weighted squared error begin and end.

    Args:
        points: ``[G, n]``, each row in rising order.
        weights: ``[G, n]``, non-negative.
        count: Number of clusters; with more than n, the last ones are empty.

    Returns:
        ``[G, count + 1]``: cluster c has the elements from bound c up to bound c + 1 of its row.
    """
    step = max(1, _CELLS // (points.shape[1] + 1) ** 2)
    parts = [slice(start, start + step) for start in range(0, len(points), step)]
    return np.concatenate([_bounds(points[part], weights[part], count) for part in parts])


def _bounds(points: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    n = points.shape[1]
    x, f = (points - points.mean(axis=1, keepdims=True)).astype(np.float64), weights.astype(np.float64)
    cost = _costs(f, f * x, f * x * x)
    least, picks = cost[:, 0], []
    for _ in range(1, min(count, n)):
        total = least[:, :, None] + cost
        picks.append(total.argmin(axis=1))
        least = np.take_along_axis(total, picks[-1][:, None], axis=1)[:, 0]
    bounds = np.full((len(points), count + 1), n)
    bounds[:, 0] = 0
    for c in range(len(picks), 0, -1):
        bounds[:, c] = np.take_along_axis(picks[c - 1], bounds[:, c + 1 : c + 2], axis=1)[:, 0]
    return bounds


def _costs(*moments: np.ndarray) -> np.ndarray:
    """``[G, n + 1, n + 1]``: squared error of elements i to j - 1 around their mean; infinite below the diagonal."""
    totals = (np.cumsum(np.pad(m, ((0, 0), (1, 0))), axis=1) for m in moments)
    weight, first, second = (t[:, None, :] - t[:, :, None] for t in totals)
    cost = np.maximum(second - first * first / np.where(weight > 0, weight, 1), 0)
    below = np.tril_indices(cost.shape[1], -1)
    cost[:, below[0], below[1]] = np.inf
    return cost
