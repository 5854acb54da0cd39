"""Tables of least squared error against every partition there is, and Lloyd's alternation against the optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.passes.quantize._kmeans import _Sorted, kmeans_rows
from qc.passes.quantize._kmeans_exact import optimal_bounds


def error(w: np.ndarray, table: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The weighted squared error of each row with its nearest values."""
    return (f * np.abs(w[:, :, None] - table[:, None, :].astype(np.float64)).min(axis=2) ** 2).sum(axis=1)


def data(seed: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers with heavy tails, and weights that differ by much."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(3, (rows, width)).astype(np.float32), np.exp(rng.normal(size=(rows, width))).astype("f4")


def least(w: np.ndarray, f: np.ndarray, count: int) -> float:
    """The error of the best partition of sorted numbers into runs, by trying all."""
    order = np.argsort(w)
    w, f = w[order].astype(np.float64), f[order].astype(np.float64)

    def cost(a: int, b: int) -> float:
        mean = np.average(w[a:b], weights=f[a:b])
        return float(np.sum(f[a:b] * (w[a:b] - mean) ** 2))

    cuts = itertools.combinations(range(1, len(w)), count - 1)
    return min(sum(cost(a, b) for a, b in itertools.pairwise((0, *inner, len(w)))) for inner in cuts)


@given(seed=st.integers(0, 10**6), width=st.integers(4, 9), bits=st.integers(1, 2))
@settings(max_examples=25)
def test_short_groups_get_the_best_of_all_partitions(seed: int, width: int, bits: int) -> None:
    w, f = data(seed, 1, width)
    assert error(w, kmeans_rows(w, bits, f), f)[0] == pytest.approx(least(w[0], f[0], 1 << bits), rel=1e-5, abs=1e-9)


@given(seed=st.integers(0, 10**6), width=st.integers(130, 400), bits=st.integers(1, 4))
@settings(max_examples=15)
def test_the_alternation_is_never_better_than_the_optimum_and_seldom_worse(seed: int, width: int, bits: int) -> None:
    w, f = data(seed, 4, width)
    rows = _Sorted(w, f)
    optimum = error(w, rows.optimum(1 << bits), f)
    found = error(w, kmeans_rows(w, bits, f), f)
    assert np.all(found >= optimum * (1 - 1e-5))
    assert found.sum() < 1.03 * optimum.sum()
    assert np.all(error(w, rows.alternated(rows.at(rows.quantiles(1 << bits, 0.5))), f) >= optimum * (1 - 1e-5))


def test_no_step_of_the_alternation_raises_the_error() -> None:
    w, f = data(0, 8, 300)
    rows = _Sorted(w, f)
    table = rows.at(rows.quantiles(8, 0.5))
    end = rows.alternated(table)
    assert np.all(error(w, end, f) <= error(w, table, f))
    assert np.allclose(rows.alternated(end), end)


def test_as_many_values_as_elements_leave_no_error_and_more_are_harmless() -> None:
    w, f = data(1, 3, 6)
    assert np.allclose(error(w, kmeans_rows(w, 3, f), f), 0, atol=1e-9)
    assert optimal_bounds(np.sort(w, axis=1), f, 8)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6]


def test_elements_without_weight_are_ignored() -> None:
    w, f = data(2, 4, 40)
    f[:, 20:] = 0
    assert np.allclose(error(w, kmeans_rows(w, 2, f), f), error(w, kmeans_rows(w[:, :20], 2, f[:, :20]), f))
