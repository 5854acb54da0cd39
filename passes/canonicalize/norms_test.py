from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from qc.passes.base import Outcome
from qc.passes.canonicalize.norms import RecogniseNorms

_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((2, 3, 8)).astype(np.float32)
_G = _RNG.uniform(0.5, 2, 8).astype(np.float32)
_B = _RNG.standard_normal(8).astype(np.float32)

_CONSTANTS = (
    "two = Constant <value = float {2.0}> () eps = Constant <value = float {0.01}> () "
    "one = Constant <value = float {1.0}> () half = Constant <value = float {-0.5}> () last = "
    "Constant <value = int64[1] {-1}> () "
)
_MEAN = "m = ReduceMean <keepdims = 1> (sq, last) v = Add (m, eps) "


def _ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type != "Constant"]


def _norm(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.op_type.endswith("Normalization"))


@pytest.mark.parametrize(
    "root",
    [
        "sq = Pow (x, two) " + _MEAN + "s = Sqrt (v) r = Reciprocal (s) n = Mul (x, r)",
        "sq = Mul (x, x) " + _MEAN + "s = Sqrt (v) n = Div (x, s)",
        "sq = Pow (x, two) " + _MEAN + "s = Sqrt (v) r = Div (one, s) n = Mul (r, x)",
        "sq = Pow (x, two) " + _MEAN + "r = Pow (v, half) n = Mul (x, r)",
    ],
)
def test_every_spelling_of_rms_norm_is_one_node(build, keeps, root):
    model = _build(build, root + " y = Mul (g, n)", "float[2,3,8] x, float[8] g", g=_G)
    result = keeps(RecogniseNorms(), model, x=_X)
    assert _ops(model) == ["RMSNormalization"]
    assert _norm(model).attributes["epsilon"].value == pytest.approx(0.01)
    assert [s.outcome for s in result.sites] == [Outcome.CHANGED]


_RMS = "sq = Pow (x, two) " + _MEAN + "s = Sqrt (v) r = Reciprocal (s) n = Mul (x, r) "
_LAYER = (
    "mu = ReduceMean <keepdims = 1> (x, last) d = Sub (x, mu) sq = Mul (d, d) " + _MEAN + "s = Sqrt (v) n = Div (d, s) "
)


def _build(build, body: str, header: str = "float[2,3,8] x", outputs: str = "float[2,3,8] y", **weights: np.ndarray):
    model = build(f"g ({header}) => ({outputs}) {{" + _CONSTANTS + body + "}", **weights)
    common.ShapeInferencePass()(model)
    return model


def test_layer_norm_takes_gain_and_bias(build, keeps):
    header = "float[2,3,8] x, float[8] g, float[8] b"
    model = _build(build, _LAYER + "h = Mul (n, g) y = Add (h, b)", header, g=_G, b=_B)
    keeps(RecogniseNorms(), model, x=_X)
    assert _ops(model) == ["LayerNormalization"]
    assert [v.name for v in _norm(model).inputs] == ["x", "g", "b"]


def test_gain_of_one_plus_weight_is_computed_when_read(build, keeps):
    model = _build(build, _RMS + "w = Add (g, one) y = Mul (n, w)", "float[2,3,8] x, float[8] g", g=_G)
    keeps(RecogniseNorms(), model, x=_X)
    scale = _norm(model).inputs[1]
    assert _ops(model) == ["RMSNormalization"]
    assert isinstance(scale.const_value, ir.LazyTensor)
    assert scale.name == "g_plus_1"


def test_gain_of_one_plus_decoded_weight_is_float32(build, keeps):
    body = _RMS + "c = Cast <to = 1> (g) w = Add (one, c) y = Mul (n, w)"
    model = _build(build, body, "float[2,3,8] x, bfloat16[8] g", g=_G.astype(ml_dtypes.bfloat16))
    keeps(RecogniseNorms(), model, x=_X)
    assert _ops(model) == ["RMSNormalization"]
    assert _norm(model).inputs[1].dtype == ir.DataType.FLOAT


def test_norm_without_gain_gets_ones(build, keeps):
    model = _build(build, _RMS + "y = Relu (n)")
    keeps(RecogniseNorms(), model, x=_X)
    assert _ops(model) == ["RMSNormalization", "Relu"]
    np.testing.assert_array_equal(_norm(model).inputs[1].const_value.numpy(), np.ones(8, np.float32))


def test_computed_gain_stays_a_product(build, keeps):
    model = _build(build, _RMS + "y = Mul (n, z)", "float[2,3,8] x, float[2,3,8] z")
    keeps(RecogniseNorms(), model, x=_X, z=_X + 1)
    assert _ops(model) == ["RMSNormalization", "Mul"]


def test_half_precision_norm_keeps_its_float32_statistics(build, keeps):
    body = "x = Cast <to = 1> (h) " + _RMS + "c = Cast <to = 10> (n) y = Mul (c, g)"
    model = _build(build, body, "float16[2,3,8] h, float16[8] g", "float16[2,3,8] y", g=_G.astype(np.float16))
    keeps(RecogniseNorms(), model, tol=2e-3, h=_X.astype(np.float16))
    assert _ops(model) == ["RMSNormalization"]
    assert _norm(model).inputs[0].name == "h"


def test_intermediate_with_another_use_keeps_its_value(build, keeps):
    model = _build(build, _RMS + "y = Mul (n, g)", "float[2,3,8] x, float[8] g", "float[2,3,8] y, float[2,3,1] v", g=_G)
    keeps(RecogniseNorms(), model, x=_X)
    assert "ReduceMean" in _ops(model)
    assert [v.name for v in model.graph.outputs] == ["y", "v"]


def test_two_gains_on_one_norm_stay_products(build, keeps):
    body = _RMS + "a = Mul (n, g) b = Mul (n, k) y = Add (a, b)"
    model = _build(build, body, "float[2,3,8] x, float[8] g, float[8] k", g=_G, k=_B)
    keeps(RecogniseNorms(), model, x=_X)
    assert _ops(model) == ["RMSNormalization", "Mul", "Mul", "Add"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_RMS.replace("(sq, last)", "(sq, first)"), "the mean is over axes [1], expected the last one"),
        ("k = Relu (x) " + _RMS.replace("Pow (x, two)", "Pow (k, two)"), None),
    ],
)
def test_near_misses_are_left_alone(build, keeps, body, reason):
    model = _build(build, "first = Constant <value = int64[1] {1}> () " + body + "y = Relu (n)")
    before = ir.to_proto(model).SerializeToString()
    result = keeps(RecogniseNorms(), model, x=_X)
    assert [s.reason for s in result.sites] == ([reason] if reason else [])
    assert ir.to_proto(model).SerializeToString() == before


def test_older_opsets_are_left_alone_with_a_note(build):
    model = _build(build, _RMS + "y = Relu (n)")
    model.opset_imports[""] = 18
    result = RecogniseNorms()(model)
    assert not result.modified
    assert "opset 18" in result.notes[0]
