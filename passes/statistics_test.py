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
}
VECTORS = {Statistic.SECOND_MOMENT: [13.0, 4.0], Statistic.MEAN_ABS: [3.0, 2.0], Statistic.ABS_MAX: [5.0, 2.0]}
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
