"""Equalization on graphs small enough to work by hand, run and verified by the manager."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.errors import UnsupportedError
from qc.ir.model import Model
from qc.ir.text import parse
from qc.passes.base import Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline

CHAIN = "g (float[n,2] x) => (float[n,2] y) { h = qc.Linear (x, w1) r = Relu (h) y = qc.Linear (r, w2) }"
NET = """
  g (float[n,3,8,8] x) => (float[n,4,H,W] y) {
    a = Conv <pads=[1,1,1,1]> (x, w1, b1)  c = ACT
    d = Conv <group=8, pads=[1,1,1,1]> (c, w2, b2)  f = Relu (d)
    y = Conv (f, w3, b3)
  }
"""
SHAPES = {"w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (4, 8, 1, 1), "b1": (8,), "b2": (8,), "b3": (4,)}
CLIP = "Clip (a, low, high)"
ENDS = {"low": np.float32(0), "high": np.float32(6)}


def net(activation: str = "Relu (a)", **more: np.ndarray) -> Model:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    sizes = np.exp(rng.uniform(-3, 3, 8)).astype(np.float32)  # channels of very different sizes
    weights["w1"] *= sizes[:, None, None, None]
    weights["w3"] *= sizes[None, ::-1, None, None]
    return parse(NET.replace("ACT", activation), weights=weights | more)


def equalized(model: Model, spec: str = "equalize") -> tuple[Model, PassReport]:
    model, (report,) = PassManager(parse_pipeline(spec)).run(model)
    return model, report


def weight(model: Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def operators(model: Model) -> list[str]:
    return [n.op_type for n in model.graph]


def channels(array: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)).max(axis=1)


def test_two_channels_meet_in_the_middle() -> None:
    # r1 = (1, 1/16), r2 = (1, 1): s = (1, 4), and as (1/2, 2) its largest entry is the inverse of its smallest.
    w1, w2 = np.diag([16.0, 1.0]).astype(np.float32), np.ones((2, 2), np.float32)
    model, report = equalized(parse(CHAIN, weights={"w1": w1, "w2": w2}))
    np.testing.assert_allclose(weight(model, "w1"), np.diag([8.0, 2.0]), rtol=1e-6)
    np.testing.assert_allclose(weight(model, "w2"), [[2.0, 0.5], [2.0, 0.5]], rtol=1e-6)
    (site,) = [s for s in report.sites if s.outcome is Outcome.CHANGED]
    assert site.details["weights"] == ["w1", "w2"]


def test_every_channel_becomes_as_large_where_it_is_made_as_where_it_is_read() -> None:
    model, _ = equalized(net())
    first, filters, last = weight(model, "w1"), weight(model, "w2"), weight(model, "w3")
    for made, read in ((channels(first, 0), channels(filters, 0)), (channels(filters, 0), channels(last, 1))):
        np.testing.assert_allclose(made / made.max(), read / read.max(), rtol=5e-3)


def test_a_second_run_finds_nothing_to_do() -> None:
    model, _ = equalized(net())
    before = weight(model, "w1").copy()
    _, report = equalized(model)
    assert np.abs(weight(model, "w1") / before - 1).max() < 5e-3
    assert all("evenness" in s.details or s.reason for s in report.sites)


def test_a_side_without_weights_takes_up_what_makes_the_other_even() -> None:
    text = "g (float[n,4] x) => (float[n,3] y) { n1 = LayerNormalization (x, g, b) y = qc.Linear (n1, w) }"
    weights = {"g": np.ones(4), "b": np.ones(4), "w": np.random.default_rng(0).standard_normal((3, 4))}
    model, _ = equalized(parse(text, weights={n: w.astype(np.float32) for n, w in weights.items()}))
    columns = channels(weight(model, "w"), 1)
    np.testing.assert_allclose(columns, np.full(4, columns[0]), rtol=1e-5)


def test_a_clipped_activation_gets_a_range_for_each_channel() -> None:
    model, report = equalized(net(CLIP, **ENDS))
    assert operators(model) == ["Conv", "Relu", "Min", "Conv", "Relu", "Conv"]
    (bound,) = [v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("bound")]
    assert bound.shape == (8, 1, 1)
    assert bound.max() > 10 * bound.min()
    assert "1 clipped activations" in report.notes[0]


def test_without_ranges_for_each_channel_a_clipped_activation_stays_and_its_other_side_is_scaled() -> None:
    model, report = equalized(net(CLIP, **ENDS), "equalize{bounds=false}")
    assert operators(model) == operators(net(CLIP, **ENDS))
    assert [s.reason for s in report.sites if "Clip" in s.reason]
    assert report.modified


def test_a_range_that_brings_nothing_is_taken_back() -> None:
    original = net(CLIP, **ENDS)
    names = {n.outputs[0].name for n in original.graph}
    model, report = equalized(original, "equalize{exclude=[w1]}")
    assert operators(model) == operators(net(CLIP, **ENDS))
    assert {n.outputs[0].name for n in model.graph} == names
    assert report.notes == ()


def test_a_silent_channel_keeps_its_scale() -> None:
    w1 = np.array([[4.0, 1.0], [0.0, 0.0]], np.float32)
    model, _ = equalized(parse(CHAIN, weights={"w1": w1, "w2": np.ones((2, 2), np.float32)}))
    assert np.isfinite(weight(model, "w2")).all()
    assert not weight(model, "w1")[1].any()


@pytest.mark.parametrize("middle", ["Gelu (h)", "Sigmoid (h)"])
def test_what_lets_no_factors_through_is_named(middle: str) -> None:
    weights = {"w1": np.diag([16.0, 1.0]).astype(np.float32), "w2": np.ones((2, 2), np.float32)}
    model = parse(CHAIN.replace("Relu (h)", middle), weights=weights)
    with pytest.raises(UnsupportedError, match=f"{middle.split(maxsplit=1)[0]} forbids it"):
        equalized(model)
