"""Which channels can become one: bipartite matching by the error that merging two causes."""

from __future__ import annotations

import numpy as np

__all__ = ["Matching"]

_BLOCK = 1 << 22
"""Distances that are computed at a time."""


class Matching:
    """The errors of merging even channels into odd ones.

    Two channels become their mean, and their columns the sum, so that the output of the products changes by
    ``(x_i - x_j) (W_i - W_j) / 2``, of square

        ``D(i, j) = |X_i - X_j|^2 |W_i - W_j|^2 / 4``

    Source: QLLM, arXiv 2310.08041, equation 5; the released code has a sum of columns instead of their difference.
    """

    def __init__(self, width: int) -> None:
        """Starts without products.

        Args:
            width: Number of channels.
        """
        self._width = width
        self.errors = np.zeros(((width + 1) // 2, width // 2), np.float32)

    def add(self, x: np.ndarray, weight: np.ndarray, scale: float = 1.0) -> None:
        """Adds the errors of a product.

        Args:
            x: Rows of its input, ``[S, width]``.
            weight: Its weight, ``[N, width]``.
            scale: Weight of its errors.
        """
        step = max(1, _BLOCK // max(1, self._width // 2))
        for start in range(0, len(self.errors), step):
            part = slice(start, start + step)
            self.errors[part] += (0.25 * scale) * _distances(x, part) * _distances(weight, part)

    def clusters(self, copies: np.ndarray) -> np.ndarray | None:
        """Joins as many channels as copies were added, so that the width stays the same.

        Each even channel may go to the odd one where it costs least; those that cost least go. Channels with copies are
        left alone.

        Args:
            copies: ``[width]``, how many copies there are of each channel.

        Returns:
            The cluster of each copy, as `qc.passes.transform.actions.Reassemble` takes it; None if there are not enough
            channels.
        """
        added = int(copies.sum()) - self._width
        alone = copies > 1
        errors = np.where(alone[1::2], np.inf, self.errors)
        best = errors.argmin(axis=1)
        costs = np.where(alone[0::2], np.inf, errors[np.arange(len(errors)), best])
        chosen = np.argsort(costs, kind="stable")[:added]
        if len(chosen) < added or not np.all(np.isfinite(costs[chosen])):
            return None
        target = np.arange(self._width)
        target[2 * chosen] = 2 * best[chosen] + 1
        labels = np.concatenate([target, self._width + np.arange(added)])
        return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _distances(columns: np.ndarray, part: slice) -> np.ndarray:
    """Squared distances between even columns, those of `part`, and odd ones."""
    even, odd = columns[:, 0::2][:, part], columns[:, 1::2]
    sums = np.square(even).sum(axis=0)[:, None] + np.square(odd).sum(axis=0)
    return np.maximum(sums - 2.0 * (even.T @ odd), 0.0)
