"""Tandem repeats: where a sequence says the same thing several times in a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

__all__ = ["Repeat", "find_repeats"]

_LONGEST_PERIOD = 256
"""Bounds the search to linear time. A layer has a handful of items, a stage of a plain convolutional network dozens."""


@dataclasses.dataclass(frozen=True)
class Repeat:
    """``count`` equal, adjacent windows of ``period`` items, the first at ``start``."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count


def find_repeats(items: Sequence[int], weights: Sequence[int]) -> list[Repeat]:
    """Finds disjoint repeats (two or more windows), in order.

    The repeat that covers the most weight is taken first, then the rest on either side of it is searched. Among equals
    the shortest period wins, then a window that starts with weight, then the first. A window without weight is none.

    Args:
        items: The sequence.
        weights: What each item counts, not negative.
    """
    found: list[Repeat] = []
    todo = [(0, len(items))]
    array, total = np.asarray(items), np.concatenate([[0], np.cumsum(weights, dtype=np.int64)])
    while todo:
        lo, hi = todo.pop()
        best = _best(array, total, lo, hi)
        if best is not None:
            found.append(best)
            todo += [(lo, best.start), (best.stop, hi)]
    return sorted(found, key=lambda r: r.start)


def _best(array: np.ndarray, total: np.ndarray, lo: int, hi: int) -> Repeat | None:
    best, covered = None, 0
    for period in range(1, min((hi - lo) // 2, _LONGEST_PERIOD) + 1):
        if covered == total[hi] - total[lo]:
            break
        equal = array[lo : hi - period] == array[lo + period : hi]
        if np.count_nonzero(equal) < period:
            continue
        edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]])))
        lengths = edges[1::2] - edges[::2]
        for at in np.flatnonzero(lengths >= period):
            first, length = int(edges[2 * at]) + lo, int(lengths[at])
            count = length // period + 1
            start = _phase(total, first, length % period)
            weight = total[start + period * count] - total[start]
            if weight > covered:
                best, covered = Repeat(start, period, count), weight
    return best


def _phase(total: np.ndarray, first: int, slack: int) -> int:
    """The start among ``first .. first + slack`` whose item has weight; the first one if none has."""
    return next((s for s in range(first, first + slack + 1) if total[s + 1] > total[s]), first)
