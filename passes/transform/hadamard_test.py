"""Hadamard matrices are what their definition says, and their products are orthogonal."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qc.passes.transform.hadamard import factors_of, hadamard

PALEY = [12, 20, 24, 28, 36, 40, 44, 52, 60, 76, 100, 108, 140, 148, 164, 344]
"""Among them orders from fields with 25 and 49 (second source), 27 and 343 elements (first source)."""


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, *PALEY])
def test_all_entries_are_signs_and_all_rows_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert np.array_equal(np.abs(matrix), np.ones((order, order)))
    exact = matrix.astype(np.float64)
    assert np.array_equal(exact @ exact.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 6, 10, 22, 92])
def test_orders_that_do_not_exist_or_that_no_source_gives_are_none(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize(
    ("width", "sizes"),
    # Sizes of networks: powers of two times 1, 7, 11, 27, 43.
    [(256, [16, 16]), (4096, [64, 64]), (896, [28, 32]), (704, [44, 16]), (13824, [108, 8, 16]), (11008, [344, 32])],
)
def test_widths_of_networks_are_products_of_small_hadamard_matrices(width: int, sizes: list[int]) -> None:
    factors, drawn = factors_of(width, np.random.default_rng(0))
    assert [len(f) for f in factors] == sizes
    assert drawn == 1
    for factor in factors:
        np.testing.assert_allclose(np.abs(factor), 1 / np.sqrt(len(factor)))


@pytest.mark.parametrize(("width", "odd"), [(7, 7), (30, 15), (46, 23)])
def test_where_none_is_known_the_odd_factor_is_random_and_orthogonal(width: int, odd: int) -> None:
    factors, drawn = factors_of(width, np.random.default_rng(0))
    assert drawn == odd
    assert math.prod(len(f) for f in factors) == width
    for factor in factors:
        np.testing.assert_allclose(factor @ factor.T, np.eye(len(factor)), atol=1e-12)
