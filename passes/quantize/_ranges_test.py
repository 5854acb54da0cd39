"""The range of a static quantizer, against brute force and theory."""

from __future__ import annotations

import numpy as np
import pytest

from qc.passes.quantize._ranges import Grid, Observed, choose


def seen(x: np.ndarray, weights: np.ndarray | None = None) -> Observed:
    order = np.argsort(x)
    counts = np.ones(x.size) if weights is None else weights
    return Observed(x.min(keepdims=True), x.max(keepdims=True), x[order], counts[order])


def noise(x: np.ndarray, grid: Grid, weights: np.ndarray | float = 1.0) -> float:
    return float(np.sum(weights * (x - grid.rounded(x)) ** 2))


@pytest.fixture
def heavy() -> np.ndarray:
    """Heavy tails on one side: what clipping is for."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.standard_normal(4000), [60.0, 55.0, -3.0]])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_minmax_holds_every_value_to_half_a_step(heavy: np.ndarray, bits: int, symmetric: bool) -> None:
    grid = choose(seen(heavy), "minmax", bits, symmetric, 99.0)
    span = 120.0 / (2**bits - 2) if symmetric else (60 - heavy.min()) / (2**bits - 1)
    assert float(grid.scale) == pytest.approx(span, rel=1e-6)
    assert np.abs(heavy - grid.rounded(heavy)).max() <= span / 2 * 1.001
    assert grid.rounded(np.zeros(1)) == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_least_noise_is_that_of_the_best_range_of_all(heavy: np.ndarray, bits: int, symmetric: bool) -> None:
    found = noise(heavy, choose(seen(heavy), "mse", bits, symmetric, 99.0))
    tops = np.geomspace(1, 60, 150)
    lows = [0.0] if symmetric else np.geomspace(0.5, 3.6, 12)
    best = min(noise(heavy, Grid.of(-low, top, bits, symmetric)) for low in lows for top in tops)
    assert found <= 1.05 * best
    assert found <= noise(heavy, choose(seen(heavy), "minmax", bits, symmetric, 99.0))


def test_a_percentile_leaves_out_its_share_at_either_end(heavy: np.ndarray) -> None:
    grid = choose(seen(heavy), "percentile", 8, False, 99.0)
    low, high = np.percentile(heavy, [1, 99])
    assert float(grid.scale) * 255 == pytest.approx(high - low, rel=0.02)


def test_what_counts_more_is_clipped_less() -> None:
    rng = np.random.default_rng(1)
    small, large = rng.standard_normal(4000), rng.standard_normal(50) * 20
    x = np.concatenate([small, large])
    tops = []
    for factor in (1e-4, 1.0, 1e4):
        weights = np.concatenate([np.ones(small.size), np.full(large.size, factor)])
        grid = choose(seen(x, weights), "output", 4, True, 99.0)
        tops.append(float(grid.scale))
        best = min(noise(x, Grid.of(-t, t, 4, True), weights) for t in np.geomspace(0.5, 60, 200))
        assert noise(x, grid, weights) <= 1.05 * best
    assert tops[0] < tops[1] < tops[2]


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "output"])
@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_constants_stay_what_they_are(rule: str, value: float) -> None:
    x = np.full(100, value)
    grid = choose(seen(x), rule, 8, False, 99.9)
    np.testing.assert_allclose(grid.rounded(x), x, rtol=1e-6)
    assert 0 <= grid.zero <= 255
