"""Statistics are computed in the graph and leave no trace in it."""

from __future__ import annotations

import numpy as np
import pytest

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


@pytest.mark.parametrize("statistic", Statistic)
@pytest.mark.parametrize("header", HEADERS)
def test_a_statistic_covers_all_rows_of_all_batches(header: str, statistic: Statistic) -> None:
    model = parse(HEADERS[header] + "g (float[n,2] x) => (float[n,2] y) { z = Neg (x) y = Neg (z) }")
    before = to_text(model)
    value = next(iter(model.graph)).outputs[0]
    found = collect(model, [Request(statistic, value)], [{"x": b} for b in BATCHES])
    np.testing.assert_allclose(found[Request(statistic, value)], EXPECTED[statistic], rtol=1e-6)
    assert to_text(model) == before
    assert len(value.uses()) == 1


@pytest.mark.parametrize("statistic", Statistic)
@pytest.mark.parametrize("header", HEADERS)
def test_a_vector_has_one_element_per_channel(header: str, statistic: Statistic) -> None:
    model = parse(HEADERS[header] + "g (float[2] x) => (float[2] y) { z = Neg (x) y = Neg (z) }")
    value = next(iter(model.graph)).outputs[0]
    batches = [{"x": np.array([1.0, -2.0], np.float32)}, {"x": np.array([-5.0, 2.0], np.float32)}]
    found = collect(model, [Request(statistic, value)], batches)
    np.testing.assert_allclose(found[Request(statistic, value)], VECTORS[statistic])


def test_samples_are_evenly_spaced_over_all_batches_and_no_more_than_asked_for() -> None:
    model = parse("g (float[n,1] x) => (float[n,1] y) { z = Identity (x) y = Identity (z) }")
    request = Request(Statistic.SAMPLES, next(iter(model.graph)).outputs[0])
    numbers = np.arange(7001, dtype=np.float32)[:, None]
    found = collect(model, [request], [{"x": part} for part in np.array_split(numbers, 13)])[request]
    np.testing.assert_array_equal(found, numbers[::8])
