"""Tables and codebooks with the least squared error: Lloyd's alternation in one and in several dimensions."""

from __future__ import annotations

import numpy as np

from qc.ir.quant import nearest_vectors

__all__ = ["kmeans_rows", "kmeans_vectors", "split"]

_STEPS = 40
_VECTOR_STEPS = 12
_PER_CENTROID = 64
"""Vectors per centroid that a codebook is fitted on; more change its error by less than a hundredth."""

_MOST = 1 << 18


class _Sorted:
    """Rows in rising order with running sums of weights and moments, so that a step costs no pass over the elements."""

    def __init__(self, w: np.ndarray, weights: np.ndarray | None) -> None:
        order = np.argsort(w, axis=1, kind="stable")
        self.w = np.take_along_axis(w, order, axis=1).astype(np.float64)
        f = np.ones_like(self.w) if weights is None else np.take_along_axis(weights, order, axis=1).astype(np.float64)
        zero = np.zeros((len(w), 1))
        self.weight = np.concatenate([zero, np.cumsum(f, axis=1)], axis=1)
        self.moment = np.concatenate([zero, np.cumsum(f * self.w, axis=1)], axis=1)
        # One search over all rows: each is brought to [0, 1] and moved by two.
        self._low, self._span = self.w[:, :1], np.maximum(self.w[:, -1:] - self.w[:, :1], 1e-300)
        self._rows = 2.0 * np.arange(len(w))[:, None]
        self._flat = ((self.w - self._low) / self._span + self._rows).reshape(-1)

    def positions(self, values: np.ndarray) -> np.ndarray:
        """How many elements of each row are at most each of its values."""
        keys = np.clip((values - self._low) / self._span, -0.5, 1.5) + self._rows
        found = np.searchsorted(self._flat, keys.reshape(-1), side="right").reshape(values.shape)
        return found - np.arange(len(self.w))[:, None] * self.w.shape[1]

    def centroids(self, bounds: np.ndarray, fallback: np.ndarray) -> np.ndarray:
        """Weighted means between bounds ``[G, k + 1]`` in sorted positions; `fallback` where nothing lies."""
        weight, moment = (np.diff(np.take_along_axis(a, bounds, axis=1), axis=1) for a in (self.weight, self.moment))
        return np.where(weight > 0, moment / np.where(weight > 0, weight, 1), fallback)


def kmeans_rows(w: np.ndarray, bits: int, weights: np.ndarray | None = None) -> np.ndarray:
    """A rising table of ``2^bits`` values for each row that is a local optimum of the weighted squared error.

    It starts from quantiles of the third root of the density, which is the best for many values (Panter and Dite 1951).

    Args:
        w: ``[G, M]``.
        bits: Width of a code.
        weights: Of the squared errors, or None for one.
    """
    rows, count = _Sorted(w, weights), 1 << bits
    gaps = np.diff(rows.w, axis=1, prepend=rows.w[:, :1]) ** (2 / 3)
    spread = np.cumsum(gaps + 1e-12, axis=1)
    goals = (np.arange(count) + 0.5) / count * spread[:, -1:]
    picks = (
        (spread[:, None, :] < goals[:, :, None]).sum(axis=2) if w.shape[1] * count <= 4096 else _picks(spread, goals)
    )
    table = np.take_along_axis(rows.w, np.minimum(picks, w.shape[1] - 1), axis=1)
    ends = np.zeros((len(w), 1), np.int64), np.full((len(w), 1), w.shape[1])
    for _ in range(_STEPS):
        inner = rows.positions((table[:, 1:] + table[:, :-1]) / 2)
        better = np.sort(rows.centroids(np.concatenate([ends[0], inner, ends[1]], axis=1), table), axis=1)
        if np.array_equal(better, table):
            break
        table = better
    return table.astype(np.float32)


def _picks(spread: np.ndarray, goals: np.ndarray) -> np.ndarray:
    return np.stack([np.searchsorted(a, b) for a, b in zip(spread, goals, strict=True)])


def split(w: np.ndarray, table: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Splits every cluster of a rising table in two, so that children stay within their parent.

    Returns:
        ``[G, 2 k]``: the children of value i are 2 i and 2 i + 1.
    """
    rows = _Sorted(w, weights)
    middles = rows.positions((table[:, 1:] + table[:, :-1]).astype(np.float64) / 2)
    ends = np.zeros((len(w), 1), np.int64), np.full((len(w), 1), w.shape[1])
    bounds = np.concatenate([ends[0], middles, ends[1]], axis=1)
    parents = rows.centroids(bounds, table)
    inner = rows.positions(parents)
    for _ in range(_STEPS):
        inner = np.clip(inner, bounds[:, :-1], bounds[:, 1:])
        both = np.empty((len(w), 2 * table.shape[1] + 1), np.int64)
        both[:, ::2], both[:, 1::2] = bounds, inner
        children = rows.centroids(both, np.repeat(parents, 2, axis=1))
        moved = rows.positions((children[:, ::2] + children[:, 1::2]) / 2)
        if np.array_equal(moved, inner):
            break
        inner = moved
    return children.astype(np.float32)


def kmeans_vectors(
    vectors: np.ndarray,
    bits: int,
    weights: np.ndarray | None,
    random: np.random.Generator,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """A codebook ``[2^bits, v]``; empty clusters take the vectors that are worst off.

    Args:
        vectors: ``[n, v]``, float32.
        bits: Width of a code.
        weights: ``[n]``, of the squared errors, or None for one.
        random: Chooses a sample and where to start.
        start: A codebook to improve; None for vectors of the sample.
    """
    count = 1 << bits
    f = np.ones(len(vectors), np.float32) if weights is None else weights.astype(np.float32)
    size = min(np.count_nonzero(f), _MOST, _PER_CENTROID * count)
    if 0 < size < np.count_nonzero(f):  # such that the weights are in the sample's numbers
        vectors = vectors[random.choice(len(vectors), size, replace=False, p=f / f.sum(dtype=np.float64))]
        f = np.ones(size, np.float32)
    if start is None:
        start = vectors[random.choice(len(vectors), count, replace=len(vectors) < count)]
    book = start.copy()
    for _ in range(_VECTOR_STEPS):
        index = nearest_vectors(vectors, book)
        weight = np.bincount(index, f, count)
        sums = np.stack([np.bincount(index, f * column, count) for column in vectors.T], axis=1)
        book = np.where(weight[:, None] > 0, sums / np.maximum(weight, 1e-30)[:, None], book).astype(np.float32)
        empty = np.flatnonzero(weight == 0)
        if len(empty):
            error = f * ((vectors - book[index]) ** 2).sum(axis=1)
            worst = np.argsort(-error, kind="stable")[: len(empty)]
            book[empty[: len(worst)]] = vectors[worst]
    return book
