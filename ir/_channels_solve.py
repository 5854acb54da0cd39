"""From single channels to groups: which channels share an index, which share a factor, and which factors are free.

Channels that must keep one index form a *class*. Two classes that met the same operators in the same roles are alike,
so classes fall into *families*: index ``i`` of a family is one class. Within a class, channels that must share a factor
form a *sheet* of the family: the residual stream and the output of a norm are two sheets of one family. The equations
between sheets are solved by elimination, for positive factors and for signs; each factor that stays free is a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qc.ir._channels_trace import Limit, Trace

__all__ = ["Factors", "Solution", "solve"]


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """Families and sheets of all channels.

    Attributes:
        family: Family of each channel.
        index: Index of each channel within its family.
        sheet: Sheet of each channel.
        widths: Number of classes of each family.
        factors: By kind (``scale``, ``sign``): what each sheet's factor is made of.
    """

    family: np.ndarray
    index: np.ndarray
    sheet: np.ndarray
    widths: np.ndarray
    factors: Mapping[str, Factors]

    def sheets_of(self, ids: np.ndarray) -> tuple[int, ...]:
        """The sheets that an array of channels touches."""
        sheets = self.sheet[ids].ravel()
        if (sheets == sheets[0]).all():  # nearly always, and much cheaper to see
            return (int(sheets[0]),)
        return tuple(np.unique(sheets).tolist())


class Factors:
    """The logarithms of the factors of all sheets, each a linear combination of free ones."""

    def __init__(self, rank: Mapping[int, int]) -> None:
        """Starts with every sheet free.

        Args:
            rank: How much each sheet is worth keeping free; the lowest of an equation is expressed by the others.
        """
        self._rank = rank
        self._expressed: dict[int, dict[int, float]] = {}
        self._used: dict[int, set[int]] = {}
        self.fixed: dict[int, Limit] = {}
        """Sheets that a limit fixes, with the first one."""

    def __getitem__(self, sheet: int) -> dict[int, float]:
        """Coefficients by free sheet; empty if the factor must be one."""
        return self._expressed.get(sheet, {sheet: 1.0})

    def impose(self, terms: Iterable[tuple[float, int]], limit: Limit | None = None) -> None:
        """Demands that the combination is zero."""
        terms, total = list(terms), {}
        for coefficient, sheet in terms:
            for free, share in self[sheet].items():
                total[free] = total.get(free, 0.0) + coefficient * share
        total = {s: c for s, c in total.items() if abs(c) > 1e-9}
        if not total:
            return
        victim = min(total, key=lambda s: (self._rank.get(s, 0), s))
        scale = -1.0 / total.pop(victim)
        rest = {s: c * scale for s, c in total.items()}
        if limit is None:
            limit = next((self.fixed[s] for _, s in terms if s in self.fixed), None)
        for sheet in (victim, *self._used.pop(victim, ())):
            held = self[sheet]
            share = held.pop(victim)
            for free, coefficient in rest.items():
                value = held.get(free, 0.0) + share * coefficient
                if abs(value) > 1e-9:
                    held[free] = value
                    self._used.setdefault(free, set()).add(sheet)
                else:
                    held.pop(free, None)
            self._expressed[sheet] = held
            if not held and limit is not None:
                self.fixed.setdefault(sheet, limit)


def solve(trace: Trace) -> Solution:
    """Groups the channels of a trace. Time is linear in the number of channels that its operators touch."""
    same = _components(trace.count, trace.same, None)
    alike = _components(trace.count, trace.alike, same)
    marks = _marks(trace)
    family, index, widths = _partition(alike, _summed(marks, alike))
    mixed = _summed(marks, same)[same] + family.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    _, first, sheet = np.unique(mixed, return_index=True, return_inverse=True)
    sheet = _in_order(first)[sheet]
    solution = Solution(family, index, sheet, widths, {})
    rank = _ranks(trace, solution)
    factors = {kind: _factors(trace, solution, rank, kind) for kind in ("scale", "sign")}
    return dataclasses.replace(solution, factors=factors)


def _components(count: int, ties: Sequence[tuple[np.ndarray, np.ndarray]], base: np.ndarray | None) -> np.ndarray:
    """The smallest channel connected to each channel by ties (and by `base`), by hooking and pointer jumping."""
    parent = np.arange(count)
    sides = [np.concatenate([np.ravel(t[i]) for t in ties]) if ties else np.empty(0, int) for i in (0, 1)]
    if base is not None:
        sides = [np.concatenate([sides[0], np.arange(count)]), np.concatenate([sides[1], base])]
    left, right = sides
    while True:
        low = np.minimum(parent[left], parent[right])
        before = parent.copy()
        for side in (left, right):
            np.minimum.at(parent, before[side], low)
        while not np.array_equal(jumped := parent[parent], parent):
            parent = jumped
        if np.array_equal(parent, before):
            return parent
        moved = parent[left] != parent[right]
        left, right = left[moved], right[moved]


def _marks(trace: Trace) -> np.ndarray:
    """A random number per channel, the sum over what it met: equal sums mean equal histories."""
    rng = np.random.default_rng(0)
    marks = np.zeros(trace.count, np.uint64)

    def mark(ids: np.ndarray, labels: np.ndarray | None = None) -> None:
        marks[ids] += rng.integers(1, 2**63, dtype=np.uint64)

    for member in trace.members:
        mark(member.ids)
    for limit in trace.limits:
        mark(limit.ids)
    for cells in trace.cells:
        mark(cells.ids)
    for equation in trace.equations:
        for _, ids in equation.terms:
            mark(ids)
    for view in {id(v): v for v in trace.views.values()}.values():
        mark(view.ids)
    return marks


def _summed(marks: np.ndarray, roots: np.ndarray) -> np.ndarray:
    total = np.zeros_like(marks)
    np.add.at(total, roots, marks)
    return total


def _partition(roots: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Family and index of each channel, and the widths: classes with one mark, in the order of their first channel."""
    if not len(roots):
        return roots, roots, roots
    leaders = np.flatnonzero(roots == np.arange(len(roots)))
    _, first, labels = np.unique(marks[leaders], return_index=True, return_inverse=True)
    labels = _in_order(first)[labels]
    widths = np.bincount(labels)
    by_family = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
    position = np.empty_like(by_family)
    position[by_family] = np.arange(len(by_family)) - np.repeat(starts, widths)
    family, index = np.zeros_like(roots), np.zeros_like(roots)
    family[leaders], index[leaders] = labels, position
    return family[roots], index[roots], widths


def _in_order(first: np.ndarray) -> np.ndarray:
    """New numbers for labels that first occur at those positions: in the order of the graph."""
    rename = np.empty_like(first)
    rename[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rename


_WORTH = {"gain": 1, "deviation": 1, "mean": 1, "bias": 2, "consumer": 3, "producer": 4}


def _ranks(trace: Trace, solution: Solution) -> dict[int, int]:
    """Sheets of gains are expressed by others first, then those without a weight, then those that are only read."""
    rank: dict[int, int] = {}
    for member in trace.members:
        for sheet in solution.sheets_of(member.ids):
            rank[sheet] = max(rank.get(sheet, 0), _WORTH[member.role])
    # A sheet that no weight touches is worth less than one that is read, but more than a gain.
    return {s: -1 if r == 1 else r for s, r in rank.items()}


def _factors(trace: Trace, solution: Solution, rank: Mapping[int, int], kind: str) -> Factors:
    factors = Factors(rank)
    for limit in trace.limits:
        if kind in limit.rule.forbids:
            for sheet in solution.sheets_of(limit.ids):
                factors.impose([(1.0, sheet)], limit)
    for equation in trace.equations:
        if kind not in equation.kinds:
            continue
        coefficients = [c for c, _ in equation.terms]
        sheets = np.stack([solution.sheet[ids].ravel() for _, ids in equation.terms])
        rows = sheets[:, :1] if (sheets == sheets[:, :1]).all() else np.unique(sheets, axis=1)
        for row in rows.T.tolist():
            factors.impose(zip(coefficients, row, strict=True))
    return factors
