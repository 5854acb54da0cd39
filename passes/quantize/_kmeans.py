"""Tables and codebooks with the least squared error: exact in short groups, else by Lloyd's alternation."""

from __future__ import annotations

import numpy as np

from qc.ir.quant import nearest_vectors
from qc.passes.quantize._kmeans_exact import optimal_bounds

__all__ = ["kmeans_rows", "kmeans_vectors", "split"]

_STEPS = 40
_EXACT = 64
"""Elements up to which a group gets its optimum: where weights differ by much, Lloyd's alternation from quantiles
leaves 5 to 90 % more error, at 1 to 4 bits. In groups of 128 the optimum takes three times as long as what is done in
longer ones, and is 0.01 to 0.4 % better."""

_POINTS = 64
"""Points that longer groups are condensed to for the start. From their optimum the alternation comes within half a
percent of the true one; from quantiles, it leaves up to a third more (rows of 288 and 768, 1 to 4 bits)."""

_VECTOR_STEPS = 12
_PER_CENTROID = 64
"""Vectors per centroid that a codebook is fitted on; more change its error by less than a hundredth."""

_MOST = 1 << 18


class _Sorted:
    """Rows in rising order with running sums of weights and moments, so that a step costs no pass over the elements."""

    def __init__(self, w: np.ndarray, weights: np.ndarray | None) -> None:
        order = np.argsort(w, axis=1, kind="stable")
        self.w = np.take_along_axis(w, order, axis=1).astype(np.float64)
        self.f = np.ones_like(self.w)
        if weights is not None:
            self.f = np.take_along_axis(weights, order, axis=1).astype(np.float64)
        zero = np.zeros((len(w), 1))
        self.weight = np.concatenate([zero, np.cumsum(self.f, axis=1)], axis=1)
        self.moment = np.concatenate([zero, np.cumsum(self.f * self.w, axis=1)], axis=1)
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

    def at(self, places: np.ndarray) -> np.ndarray:
        """The elements in sorted positions ``[G, k]``; behind the last one, the last one."""
        return np.take_along_axis(self.w, np.minimum(places, self.w.shape[1] - 1), axis=1)

    def quantiles(self, count: int, offset: float) -> np.ndarray:
        """Sorted positions that divide the integral of the third root of the density into `count` equal parts."""
        gaps = np.diff(self.w, axis=1, prepend=self.w[:, :1]) ** (2 / 3)
        spread = np.cumsum(gaps + 1e-12, axis=1)
        goals = (np.arange(count) + offset) / count * spread[:, -1:]
        return np.stack([np.searchsorted(a, b) for a, b in zip(spread, goals, strict=True)])

    def optimum(self, count: int) -> np.ndarray:
        """The table of least error, ``[G, count]``."""
        bounds = optimal_bounds(self.w, self.f, count)
        return self.centroids(bounds, self.at(bounds[:, :-1]))

    def condensed(self, count: int) -> _Sorted:
        """As many points in place of the elements, each with the weight and the mean of those that it stands for."""
        inner = self.quantiles(count, 0.0)[:, 1:]
        ends = np.zeros((len(self.w), 1), np.int64), np.full((len(self.w), 1), self.w.shape[1])
        bounds = np.concatenate([ends[0], inner, ends[1]], axis=1)
        means = np.maximum.accumulate(self.centroids(bounds, self.at(bounds[:, :-1])), axis=1)
        return _Sorted(means, np.diff(np.take_along_axis(self.weight, bounds, axis=1), axis=1))

    def alternated(self, table: np.ndarray) -> np.ndarray:
        """Lloyd's alternation from a rising table, to a local optimum."""
        ends = np.zeros((len(self.w), 1), np.int64), np.full((len(self.w), 1), self.w.shape[1])
        for _ in range(_STEPS):
            inner = self.positions((table[:, 1:] + table[:, :-1]) / 2)
            better = np.sort(self.centroids(np.concatenate([ends[0], inner, ends[1]], axis=1), table), axis=1)
            if np.array_equal(better, table):
                break
            table = better
        return table


def kmeans_rows(w: np.ndarray, bits: int, weights: np.ndarray | None = None) -> np.ndarray:
    """A rising table of ``2^bits`` values for each row, of least weighted squared error.

    That is the optimum in rows of up to 64 elements, a local one in longer rows: Lloyd's alternation, from the optimum
    of 64 points that stand for the row, or, for many values, from quantiles of the third root of the density (Panter
    and Dite 1951).

    Args:
        w: ``[G, M]``.
        bits: Width of a code.
        weights: Of the squared errors, or None for one.
    """
    rows, count = _Sorted(w, weights), 1 << bits
    if w.shape[1] <= _EXACT:
        return rows.optimum(count).astype(np.float32)
    start = rows.condensed(_POINTS).optimum(count) if 4 * count <= _POINTS else rows.at(rows.quantiles(count, 0.5))
    return rows.alternated(start).astype(np.float32)


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
