"""Transforms that choose by closed forms, each against its formula, on graphs that fit into a few lines."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import Format
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline
from qc.passes.transform._trial import Product, Quantizers

CHAIN = "g (float[n,16] x) => (float[n,3] y) { h = qc.Linear (x, w1)  y = qc.Linear (h, w2) }"
BIASED = "g (float[n,16] x) => (float[n,3] y) { h = qc.Linear:bias (x, w1, b1)  y = qc.Linear (h, w2) }"
NORM = "g (float[n,16] x) => (float[n,3] y) { h = RMSNormalization (x, gain)  y = qc.Linear (h, w2) }"
CURVED = "g (float[n,16] x) => (float[n,3] y) { p = qc.Linear (x, w1)  h = Gelu (p)  y = qc.Linear (h, w2) }"
EYE = np.eye(16, dtype=np.float32)
SIZES = np.geomspace(1, 64, 16).astype(np.float32)


@pytest.fixture
def x() -> np.ndarray:
    return (np.random.default_rng(0).uniform(-1, 1, (64, 16)) * SIZES).astype(np.float32)


def build(text: str) -> Model:
    rng = np.random.default_rng(1)
    weights = {"w1": EYE, "b1": rng.standard_normal(16), "gain": 1 + rng.random(16), "w2": rng.standard_normal((3, 16))}
    return parse(text, weights={n: w.astype(np.float32) for n, w in weights.items() if n in text})


def transformed(text: str, spec: str, x: np.ndarray) -> tuple[Model, PassReport]:
    model = build(text)
    batch = [{"x": x}]
    model, reports = PassManager(parse_pipeline(spec)).run(model, calibration=batch, probe=batch)
    return model, reports[-1]


def array(model: Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def channels(model: Model, x: np.ndarray) -> np.ndarray:
    """What the last layer reads."""
    probe = model.clone()
    last = next(n for n in reversed(list(probe.graph)) if n.op_type == "Linear")
    probe.graph.outputs[:] = [last.inputs[0]]
    return next(iter(Session(probe).run({"x": x}).values()))


@pytest.mark.parametrize(("share", "rank"), [(0.005, 1), (0.1, 3), (0.5, 9)])
def test_the_largest_channels_come_down_to_the_percentile(share: float, rank: int, x: np.ndarray) -> None:
    model, report = transformed(CHAIN, f"smooth-percentile{{share={share},optional=true}}", x)
    magnitude = np.abs(x).max(axis=0)
    bound = np.sort(magnitude)[-rank]
    np.testing.assert_allclose(np.abs(channels(model, x)).max(axis=0), np.minimum(magnitude, bound), rtol=1e-5)
    assert report.sites[-1].details["channels"] == rank - 1
    small = magnitude <= bound
    assert np.array_equal(array(model, "w2")[:, small], array(build(CHAIN), "w2")[:, small])


def test_powers_of_two_change_no_bit_of_the_output(x: np.ndarray) -> None:
    model, report = transformed(NORM, "smooth-powers", x)
    before, after = (Session(m).run({"x": x})["y"] for m in (build(NORM), model))
    assert report.sites[0].outcome is Outcome.CHANGED
    assert before.tobytes() == after.tobytes()
    factors = array(build(NORM), "gain") / array(model, "gain")
    assert set(np.log2(factors)) <= {0.0, 1.0, 2.0, 3.0}


def test_each_channel_gets_the_smallest_power_of_two_that_does_not_clip_it(x: np.ndarray) -> None:
    lopsided = np.where(x < 0, x / 4, x)
    model, report = transformed(CHAIN, "smooth-powers{largest=3}", lopsided)
    low, high = lopsided.min() / 8, lopsided.max() / 8
    for channel in range(16):
        fits = [
            lopsided[:, channel].min() >= low * 2**k and lopsided[:, channel].max() <= high * 2**k for k in range(4)
        ]
        assert array(model, "w1")[channel, channel] == 2.0 ** -fits.index(True)
    assert sum(report.sites[-1].details["exponents"]) == 16
    found = channels(model, lopsided)
    assert found.min() == low, "all channels share an eighth of the range"
    assert found.max() == high


@pytest.mark.parametrize("bits", [4, 8])
def test_without_a_bias_channels_get_the_step_one(bits: int, x: np.ndarray) -> None:
    model, report = transformed(NORM, f"outlier-tune{{bits={bits}}}", x)
    np.testing.assert_allclose(np.abs(channels(model, x)).max(axis=0), 2 ** (bits - 1) - 1, rtol=1e-5)
    assert "shifted" not in report.sites[-1].details


@pytest.mark.parametrize(("text", "spec", "added"), [
    (BIASED, "outlier-tune", []),
    (CHAIN, "outlier-tune", []),
    (NORM, "outlier-tune{runtime=true}", [{"operator": "Add", "operations": 16}]),
])  # fmt: skip
def test_channels_become_symmetric_with_step_one(text: str, spec: str, added: list, x: np.ndarray) -> None:
    shifted = x + 3 * SIZES
    model, report = transformed(text, spec, shifted)
    found = channels(model, shifted)
    np.testing.assert_allclose(found.max(axis=0), 127, rtol=1e-4)
    np.testing.assert_allclose(found.min(axis=0), -127, rtol=1e-4)
    details = report.sites[-1].details
    assert details["shifted"] is True
    assert details.get("added", []) == added
    before, after = (Session(m).run({"x": shifted})["y"] for m in (build(text), model))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)


def test_codes_are_those_of_a_scale_for_each_channel(x: np.ndarray) -> None:
    """Rounding after the transform is rounding each channel with its own step before it."""
    model, _ = transformed(CHAIN, "outlier-tune{symmetrize=false}", x)
    steps = np.abs(x).max(axis=0) / 127
    assert np.array_equal(np.rint(channels(model, x)), np.rint(x / steps))


def test_channels_are_ordered_by_importance(x: np.ndarray) -> None:
    shuffled = x[:, np.random.default_rng(2).permutation(16)]
    for by, measure in (("moment", np.square(shuffled).mean(axis=0)), ("magnitude", np.abs(shuffled).max(axis=0))):
        model, report = transformed(CHAIN, f"permute-channels{{by={by}}}", shuffled)
        order = np.argsort(-measure)
        assert np.array_equal(channels(model, shuffled), shuffled[:, order])
        assert np.array_equal(array(model, "w2"), array(build(CHAIN), "w2")[:, order])
        assert [s.outcome for s in report.sites] == [Outcome.SKIPPED, Outcome.CHANGED], "the caller orders the input"


def test_smoothing_multiplies_at_run_time_where_no_weight_takes_factors_up(x: np.ndarray) -> None:
    model, report = transformed(CURVED, "smooth{runtime=true,alpha=1.0}", x)
    assert [n.op_type for n in model.graph] == ["Mul", "Linear", "Gelu", "Mul", "Linear"]
    assert report.sites[-1].details["added"] == [{"operator": "Mul", "operations": 16}]
    assert np.ptp(np.abs(channels(model, x)).max(axis=0)) < 1e-4, "all channels are equally large"
    _, plain = transformed(CURVED, "smooth{alpha=1.0,optional=true}", x)
    assert {s.outcome for s in plain.sites} == {Outcome.SKIPPED}


def test_the_searched_alpha_rounds_no_worse_than_any_other(x: np.ndarray) -> None:
    def loss(spec: str) -> float:
        model, _ = transformed(CHAIN, f"smooth{{{spec},optional=true}}", x)
        rounding, h = Quantizers(Format.parse("int4"), 4, "tensor"), channels(model, x)
        weight = rounding.weight(array(model, "w2"), np.square(h).mean(axis=0))
        power = np.square(weight, dtype=np.float64).sum(axis=0)
        rounded = rounding.activation(Product(h, h.min(axis=0), h.max(axis=0), weight), power) @ weight.T
        return float(np.square(rounded - x @ array(build(CHAIN), "w2").T).sum())

    search = "alpha=search,bits=4,weights=int4,granularity=tensor"
    found = loss(search)
    assert all(found <= loss(f"alpha={alpha}") * (1 + 1e-5) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0))
    site = transformed(CHAIN, f"smooth{{{search}}}", x)[1].sites[-1]
    assert 0 <= site.details["alpha"] <= 1
    assert site.details["error"] < 1


@pytest.mark.parametrize(
    "spec",
    ["smooth{alpha=find}", "smooth-percentile{share=1.0}", "smooth-powers{largest=0}", "smooth-powers{largest=20}",
     "outlier-tune{bits=40}", "permute-channels{by=name}"],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="Expected"):
        parse_pipeline(spec)
