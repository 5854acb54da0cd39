"""Statistics are computed in the graph and leave no trace in it."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.errors import InputError
from qc.ir.text import parse, to_text
from qc.passes.statistics import Request, Statistic, collect

BATCHES = [np.array([[1.0, -2.0], [3.0, 0.0]], np.float32), np.array([[-4.0, 0.0]], np.float32)]
EXPECTED = {
    Statistic.SECOND_MOMENT: [26 / 3, 4 / 3],
    Statistic.MEAN_ABS: [8 / 3, 2 / 3],
    Statistic.ABS_MAX: [4.0, 2.0],
    Statistic.MIN: [-3.0, 0.0],
    Statistic.MAX: [4.0, 2.0],
    Statistic.GRAM: [[26 / 3, -2 / 3], [-2 / 3, 4 / 3]],
    Statistic.SAMPLES: [[-1.0, 2.0], [-3.0, 0.0], [4.0, 0.0]],
}
VECTORS = {
    Statistic.SECOND_MOMENT: [13.0, 4.0],
    Statistic.MEAN_ABS: [3.0, 2.0],
    Statistic.ABS_MAX: [5.0, 2.0],
    Statistic.MIN: [-1.0, -2.0],
    Statistic.MAX: [5.0, 2.0],
    Statistic.GRAM: [[13.0, -6.0], [-6.0, 4.0]],
    Statistic.SAMPLES: [[-1.0, 2.0], [5.0, -2.0]],
}
HEADERS = {"new": "", "old": '<ir_version: 8, opset_import: ["": 13]>\n'}


@pytest.mark.parametrize("statistic", EXPECTED)
@pytest.mark.parametrize("header", HEADERS)
def test_a_statistic_covers_all_rows_of_all_batches(header: str, statistic: Statistic) -> None:
    model = parse(HEADERS[header] + "g (float[n,2] x) => (float[n,2] y) { z = Neg (x) y = Neg (z) }")
    before = to_text(model)
    value = next(iter(model.graph)).outputs[0]
    found = collect(model, [Request(statistic, value)], [{"x": b} for b in BATCHES])
    np.testing.assert_allclose(found[Request(statistic, value)], EXPECTED[statistic], rtol=1e-6)
    assert to_text(model) == before
    assert len(value.uses()) == 1


@pytest.mark.parametrize("statistic", EXPECTED)
@pytest.mark.parametrize("header", HEADERS)
def test_a_vector_has_one_element_per_channel(header: str, statistic: Statistic) -> None:
    model = parse(HEADERS[header] + "g (float[2] x) => (float[2] y) { z = Neg (x) y = Neg (z) }")
    value = next(iter(model.graph)).outputs[0]
    batches = [{"x": np.array([1.0, -2.0], np.float32)}, {"x": np.array([-5.0, 2.0], np.float32)}]
    found = collect(model, [Request(statistic, value)], batches)
    np.testing.assert_allclose(found[Request(statistic, value)], VECTORS[statistic])


def test_second_moments_of_more_channels_and_rows_than_a_tile_are_those_of_all_rows() -> None:
    model = parse("g (float[b,n,700] x) => (float[b,n,700] y) { z = Identity (x) y = Identity (z) }")
    request = Request(Statistic.GRAM, next(iter(model.graph)).outputs[0])
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((2, n, 700)).astype(np.float32)} for n in (900, 1, 300)]
    rows = np.concatenate([b["x"].reshape(-1, 700) for b in batches]).astype(np.float64)
    found = collect(model, [request], batches)[request]
    np.testing.assert_allclose(found, rows.T @ rows / len(rows), atol=1e-6)
    np.testing.assert_array_equal(found, found.T)


def test_samples_are_evenly_spaced_over_all_batches_and_no_more_than_asked_for() -> None:
    model = parse("g (float[n,1] x) => (float[n,1] y) { z = Identity (x) y = Identity (z) }")
    request = Request(Statistic.SAMPLES, next(iter(model.graph)).outputs[0])
    numbers = np.arange(7001, dtype=np.float32)[:, None]
    found = collect(model, [request], [{"x": part} for part in np.array_split(numbers, 13)])[request]
    np.testing.assert_array_equal(found, numbers[::8])


@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.25, 0.0])])
def test_a_histogram_counts_every_entry_of_ragged_batches_of_growing_size(weights: np.ndarray | None) -> None:
    model = parse("g (float[n,m,3] x) => (float[n,m,3] y) { z = Identity (x) y = Identity (z) }")
    kind = Statistic.HISTOGRAM if weights is None else Statistic.WEIGHTED_HISTOGRAM
    yields = None if weights is None else (lambda: weights)
    request = Request(kind, next(iter(model.graph)).outputs[0], yields)
    rng = np.random.default_rng(0)
    sizes = ((2, 5, 0.01), (1, 9, 1.0), (3, 2, 700.0), (2, 4, 0.0))
    batches = [(rng.standard_normal((n, m, 3)) * scale).astype(np.float32) for n, m, scale in sizes]
    points, counts = collect(model, [request], [{"x": b} for b in batches])[request]
    rows = np.concatenate([b.reshape(-1, 3) for b in batches])
    weight = np.broadcast_to(1.0 if weights is None else weights, rows.shape).reshape(-1)
    half = (points[1] - points[0]) / 2
    edges = np.concatenate([points - half, [points[-1] + half]])
    expected, _ = np.histogram(rows.reshape(-1).astype(np.float64), edges, weights=weight)
    np.testing.assert_allclose(counts, expected)
    assert half < np.abs(rows).max() / 4096
    reverse = collect(model, [request], [{"x": b} for b in reversed(batches)])[request]
    np.testing.assert_allclose(reverse, [points, counts])


def test_a_histogram_leaves_out_what_is_not_finite_and_knows_vectors() -> None:
    model = parse("g (float[3] x) => (float[3] y) { z = Identity (x) y = Identity (z) }")
    request = Request(Statistic.HISTOGRAM, next(iter(model.graph)).outputs[0])
    points, counts = collect(model, [request], [{"x": np.array([np.nan, 2.5, np.inf], np.float32)}])[request]
    assert counts.sum() == 1
    assert points[counts > 0] == pytest.approx(2.5, abs=1e-3)


@pytest.mark.parametrize("statistic", [Statistic.SECOND_MOMENT, Statistic.GRAM, Statistic.SAMPLES])
def test_a_sample_that_makes_no_numbers_is_named(statistic: Statistic) -> None:
    model = parse("g (float[n,2] x) => (float[n,2] y) { z = Log (x) y = Neg (z) }")
    request = Request(statistic, next(iter(model.graph)).outputs[0])
    batches = [{"x": np.array([[value, 1.0]], np.float32)} for value in (2.0, -1.0)]
    with pytest.raises(InputError, match=r"'z', which Neg reads, .* on calibration batch 1"):
        collect(model, [request], batches)
