"""The search of weight scales, on graphs small enough to check every candidate."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import Format
from qc.ir.text import parse
from qc.passes.base import Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline
from qc.passes.quantize.assign import assign

CHAIN = "g (float[n,32] x) => (float[n,8] y) { h = qc.Linear (x, w1) y = qc.Linear (h, w2) }"
EYE = np.eye(32, dtype=np.float32)
SPEC = "awq{format=uint4,group=32,optional=true}"


def scaled(weight: np.ndarray, x: np.ndarray, spec: str = SPEC) -> tuple[Model, PassReport]:
    model = parse(CHAIN, weights={"w1": EYE, "w2": weight})
    model, reports = PassManager(parse_pipeline(spec)).run(model, calibration=[{"x": x}], probe=[{"x": x}])
    return model, reports[-1]


def numbers(model: Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def error(weight: np.ndarray, s: np.ndarray, moment: np.ndarray) -> float:
    found = assign((weight * s).astype(np.float32), Format.parse("uint4:g32"), moment / s**2).decode() / s
    return float((np.square(found - weight) @ moment).sum())


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)


@pytest.fixture
def x() -> np.ndarray:
    """Inputs whose channels differ by up to a hundred."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((64, 32)) * np.geomspace(0.1, 10, 32)).astype(np.float32)


def test_the_best_of_twenty_exponents_is_taken(weight: np.ndarray, x: np.ndarray) -> None:
    model, report = scaled(weight, x)
    magnitude, moment = np.abs(x).mean(axis=0, dtype=np.float64), np.square(x, dtype=np.float64).mean(axis=0)
    candidates = [magnitude ** (i / 20) for i in range(20)]
    candidates = [s / np.sqrt(s.max() * s.min()) for s in candidates]
    errors = [error(weight, s, moment) for s in candidates]
    best = int(np.argmin(errors))
    assert best > 0, "these inputs ask for scales"
    site = report.sites[-1]
    assert site.details["exponent"] == best / 20
    assert site.details["error"] == pytest.approx(errors[best] / errors[0], rel=1e-2)
    np.testing.assert_allclose(numbers(model, "w2"), weight * candidates[best], rtol=1e-4)
    np.testing.assert_allclose(numbers(model, "w1"), np.diag(1 / candidates[best]), rtol=1e-4)


def test_the_error_of_quantized_outputs_becomes_smaller(weight: np.ndarray, x: np.ndarray) -> None:
    quantize = "quantize-weights{format=uint4,group=32,exclude=[w1]}"
    noise = []
    for spec in (quantize, f"{SPEC},{quantize}"):
        model = parse(CHAIN, weights={"w1": EYE, "w2": weight})
        reports = PassManager(parse_pipeline(spec)).run(model, calibration=[{"x": x}], probe=[{"x": x}])[1]
        noise.append(10 ** (-reports[-1].differences[0].sqnr / 10))
    assert noise[1] < noise[0]


def test_equal_channels_stay_bit_identical(weight: np.ndarray) -> None:
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (64, 32)).astype(np.float32)
    model, report = scaled(weight, signs)
    assert not report.modified
    assert report.sites[-1].outcome is Outcome.MATCHED
    assert report.sites[-1].details["exponent"] == 0
    assert np.array_equal(numbers(model, "w2"), weight)


def test_a_weight_without_rounding_error_stays_bit_identical(x: np.ndarray) -> None:
    exact = np.tile(np.arange(16, dtype=np.float32), (8, 2))
    model, report = scaled(exact, x)
    assert not report.modified
    assert np.array_equal(numbers(model, "w2"), exact)


def test_channels_that_are_always_zero_keep_their_scale(weight: np.ndarray, x: np.ndarray) -> None:
    x[:, :4] = 0
    model, report = scaled(weight, x)
    assert report.modified
    assert np.array_equal(numbers(model, "w2")[:, :4], weight[:, :4])
    assert np.array_equal(np.diag(numbers(model, "w1"))[:4], np.ones(4))


def test_an_input_without_signal_changes_nothing(weight: np.ndarray, x: np.ndarray) -> None:
    _, report = scaled(weight, 0 * x)
    assert not report.modified


@pytest.mark.parametrize("spec", ["awq{format=int9}", "awq{group=-1}", "awq{exclude=[(]}"])
def test_impossible_options_are_refused_when_the_pass_is_built(spec: str) -> None:
    with pytest.raises(InputError, match="Expected"):
        parse_pipeline(spec)
