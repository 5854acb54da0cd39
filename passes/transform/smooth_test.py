"""Smoothing on graphs small enough to work by hand, run and verified by the manager."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.quant import read_weight
from qc.ir.text import parse
from qc.passes.base import Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step, parse_pipeline
from qc.passes.transform.smooth import Smooth

CHAIN = "g (float[n,2] x) => (float[n,2] y) { h = qc.Linear (x, w1) y = qc.Linear (h, w2) }"
X = np.array([[16.0, 0.5], [-8.0, -1.0]], np.float32)
EYE = np.eye(2, dtype=np.float32)
W2 = np.array([[1.0, -1.0], [0.5, 0.25]], np.float32)


def smoothed(
    text: str, weights: dict[str, np.ndarray], x: np.ndarray, spec: str = "smooth"
) -> tuple[Model, PassReport]:
    """Runs the pass, calibrated and verified on `x`."""
    model = parse(text, weights=weights)
    batch = [{model.graph.inputs[0].name or "": x}]
    model, reports = PassManager(parse_pipeline(spec)).run(model, calibration=batch, probe=batch)
    return model, reports[-1]


def weight(model: Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def tensors(model: Model) -> dict[str, object]:
    return {n: v.const_value for n, v in model.graph.initializers.items()}


@pytest.mark.parametrize(
    ("alpha", "factors"),
    # s = 16^a, 1^a over columns of maximum 1, so the ratio of the factors is 16^a; they are inverse to each other.
    [(0.0, [1.0, 1.0]), (0.5, [2.0, 0.5]), (1.0, [4.0, 0.25])],
)
def test_two_channels_get_the_factors_of_the_equation(alpha: float, factors: list[float]) -> None:
    optional = Step(Smooth(alpha=alpha), optional=True)
    model = parse(CHAIN, weights={"w1": EYE, "w2": W2})
    model, (report,) = PassManager([optional]).run(model, calibration=[{"x": X}], probe=[{"x": X}])
    np.testing.assert_allclose(weight(model, "w1"), np.diag(1 / np.array(factors)), rtol=1e-6)
    np.testing.assert_allclose(weight(model, "w2"), W2 * factors, rtol=1e-6)
    site = report.sites[-1]
    assert site.name == "w2"
    assert site.outcome is (Outcome.CHANGED if alpha else Outcome.MATCHED)
    assert site.details["alpha"] == alpha


def test_alpha_zero_makes_all_columns_of_the_weight_equally_large() -> None:
    wide = np.array([[8.0, -0.5], [1.0, 0.25]], np.float32)
    model, _ = smoothed(CHAIN, {"w1": EYE, "w2": wide}, X, "smooth{alpha=0.0}")
    np.testing.assert_allclose(np.abs(weight(model, "w2")).max(axis=0), [2.0, 2.0], rtol=1e-6)


def test_alpha_one_makes_all_channels_of_the_activation_equally_large() -> None:
    model, _ = smoothed(CHAIN, {"w1": EYE, "w2": W2}, X, "smooth{alpha=1.0}")
    np.testing.assert_allclose(np.abs(X @ weight(model, "w1").T).max(axis=0), [4.0, 4.0], rtol=1e-6)


def test_a_channel_that_is_always_zero_keeps_its_scale() -> None:
    silent = X * np.array([1, 0], np.float32)
    model, _ = smoothed(CHAIN, {"w1": EYE, "w2": W2 * np.array([4, 1], np.float32)}, silent)
    assert weight(model, "w1")[1].tolist() == [0.0, 1.0]
    assert weight(model, "w2")[:, 1].tolist() == W2[:, 1].tolist()


def test_a_column_of_zeros_gives_a_finite_factor() -> None:
    model, _ = smoothed(CHAIN, {"w1": EYE, "w2": W2 * np.array([1, 0], np.float32)}, X)
    assert np.all(np.isfinite(weight(model, "w1")))
    assert not weight(model, "w2")[:, 1].any()


def test_weights_of_zeros_are_left_alone() -> None:
    _, report = smoothed(CHAIN, {"w1": EYE, "w2": 0 * W2}, X, "smooth{optional=true}")
    assert not report.modified
    assert report.sites[-1].outcome is Outcome.MATCHED


ATTENTION_INPUT = """g (float[n,4] x) => (float[n,4] a, float[n,2] b, float[n,3] c) {
  h = RMSNormalization (x, g)  a = qc.Linear (h, q)  b = qc.Linear (h, k)  c = qc.Linear (h, v)
}"""


def test_layers_on_one_norm_share_factors_that_see_the_largest_column_of_all() -> None:
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 4), "k": (2, 4), "v": (3, 4)}
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    weights["g"] = np.array([0.5, 1.0, 20.0, -2.0], np.float32)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    model, report = smoothed(ATTENTION_INPUT, weights, x)
    normed = np.abs(x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weights["g"]).max(axis=0)
    s = np.sqrt(normed / np.abs(np.vstack([weights[n] for n in shapes])).max(axis=0))
    s /= np.sqrt(s.max() * s.min())
    np.testing.assert_allclose(weight(model, "g"), weights["g"] / s, rtol=1e-4)
    for name in shapes:
        np.testing.assert_allclose(weight(model, name), weights[name] * s, rtol=1e-4)
    (site,) = report.sites
    assert site.details["products"] == ["q", "k", "v"]
    assert site.details["kind"] == "normalized"


GATED = """g (float[n,4] x) => (float[n,4] y) {
  p = qc.Linear (x, gate)  s = qc.Swish <alpha=1.0> (p)  u = qc.Linear (x, up)  z = Mul (s, u)  y = qc.Linear (z, down)
}"""


def test_in_a_gated_layer_the_factors_go_into_the_linear_side() -> None:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("gate", (6, 4)), ("up", (6, 4)))}
    weights["down"] = rng.standard_normal((4, 6)).astype(np.float32)
    model, report = smoothed(GATED, weights, rng.standard_normal((8, 4)).astype(np.float32))
    assert np.array_equal(weight(model, "gate"), weights["gate"])
    factors = weight(model, "down")[0] / weights["down"][0]
    np.testing.assert_allclose(weight(model, "up"), weights["up"] / factors[:, None], rtol=1e-5)
    assert [s.details["products"] for s in report.sites if s.outcome is Outcome.CHANGED] == [["down"]]


GROUPED = """g (float[n,t,6] x) => (float[n,t,5] y) {
  q0 = qc.Linear (x, wq)  k0 = qc.Linear (x, wk)  v0 = qc.Linear (x, wv)
  q1 = Reshape (q0, to_q)  k1 = Reshape (k0, to_k)  v1 = Reshape (v0, to_k)
  q = Transpose <perm=[0,2,1,3]> (q1)  k = Transpose <perm=[0,2,1,3]> (k1)  v = Transpose <perm=[0,2,1,3]> (v1)
  a = Attention (q, k, v)  m = Transpose <perm=[0,2,1,3]> (a)  h = Reshape (m, to_o)  y = qc.Linear (h, wo)
}"""


def test_query_heads_on_one_value_head_share_its_factors() -> None:
    rng = np.random.default_rng(0)
    shapes = {"wq": (16, 6), "wk": (8, 6), "wv": (8, 6), "wo": (5, 16)}
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    shape_inputs = {"to_q": np.array([0, 0, 4, 4]), "to_k": np.array([0, 0, 2, 4]), "to_o": np.array([0, 0, 16])}
    model, report = smoothed(GROUPED, weights | shape_inputs, rng.standard_normal((2, 7, 6)).astype(np.float32))
    (site,) = (s for s in report.sites if s.outcome is Outcome.CHANGED)
    assert (site.details["kind"], site.details["products"]) == ("value", ["wo"])
    value = (weights["wv"] / weight(model, "wv"))[:, 0].reshape(2, 1, 4)
    factors = (weight(model, "wo") / weights["wo"])[0].reshape(2, 2, 4)
    np.testing.assert_allclose(factors, np.broadcast_to(value, (2, 2, 4)), rtol=1e-5)


def test_two_factors_of_one_product_are_not_both_scaled() -> None:
    text = """g (float[n,2] x) => (float[n,2] y) {
      p = qc.Linear (x, w1)  u = qc.Linear (x, w3)  z = Mul (p, u)  y = qc.Linear (z, w2) }"""
    _, report = smoothed(text, {"w1": EYE, "w2": W2, "w3": EYE}, X)
    outcomes = [s.outcome for s in report.sites if s.name == "w2"]
    assert sorted(o.value for o in outcomes) == ["changed", "skipped"]


DECLINED = {
    "unknown operator": (
        "g (float[n,2] x) => (float[n,2] y) { h = qc.Linear (x, w1) t = Tanh (h) y = qc.Linear (t, w2) }",
        "smooth",
        "Tanh",
    ),
    "excluded": (CHAIN, "smooth{exclude=[^w2$]}", "excluded by"),
    "shared weight": (
        """g (float[n,2] x) => (float[n,2] y, float[n,2] z) {
          h = qc.Linear (x, w1)  y = qc.Linear (h, w2)  e = Exp (x)  z = qc.Linear (e, w2) }""",
        "smooth",
        "read elsewhere",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_a_site_that_is_declined_says_why_and_leaves_the_model_bit_identical(name: str) -> None:
    text, spec, words = DECLINED[name]
    model = parse(text, weights={"w1": EYE, "w2": W2})
    before = tensors(model)
    with pytest.raises(UnsupportedError, match=words):
        PassManager(parse_pipeline(spec)).run(model, calibration=[{"x": X}], probe=[{"x": X}])
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(after[n] is before[n] for n in before)


def test_quantized_weights_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((32, 32)).astype(np.float32) for n in ("w1", "w2")}
    text = CHAIN.replace("2]", "32]")
    model, report = smoothed(text, weights, np.tile(X, 16), "quantize-weights{exclude=[w1]},smooth{optional=true}")
    assert not report.modified
    assert "in front of quantization" in report.sites[-1].reason
    assert read_weight(list(model.graph)[-1].inputs[1]).format is not None


def test_without_statistics_nothing_is_done() -> None:
    model = parse(CHAIN, weights={"w1": EYE, "w2": W2})
    result = Smooth()(model)
    assert not result.modified
    assert "no statistics" in result.sites[-1].reason


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"exclude": ("(",)}])
def test_impossible_options_are_refused_when_the_pass_is_built(options: dict) -> None:
    with pytest.raises(InputError, match="Expected"):
        Smooth(**options)
