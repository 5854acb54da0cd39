from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from qc.passes.base import Outcome
from qc.passes.canonicalize.attention import RecogniseAttention

_RNG = np.random.default_rng(0)
_Q = _RNG.standard_normal((2, 4, 3, 8)).astype(np.float32)
_K, _V = (_RNG.standard_normal((2, 4, 5, 8)).astype(np.float32) for _ in range(2))
_ALLOWED = np.broadcast_to(np.tril(np.ones((3, 5), bool), 2), (2, 1, 3, 5)).copy()
_BIAS = np.where(_ALLOWED, 0, -3.4e38).astype(np.float32)

_NUMBERS = {"scale": 0.3, "inv": 4.0, "cap": 20.0, "zero": 0.0, "low": -1e9, "some": -1.0}
_CONSTANTS = "".join(f"{n} = Constant <value = float {{{v}}}> () " for n, v in _NUMBERS.items())
_HEADER = 'float["b",4,"s",8] q, float["b",4,"t",8] k, float["b",4,"t",8] v'
_SCORES = "kt = Transpose <perm = [0, 1, 3, 2]> (k) qk = MatMul (q, kt) "
_SUM = "w = Softmax <axis = -1> (z) y = MatMul (w, v)"


def _build(build, body: str, header: str = _HEADER, outputs: str = 'float["b",4,"s",8] y'):
    model = build(f"g ({header}) => ({outputs}) {{" + _CONSTANTS + body + "}")
    common.ShapeInferencePass()(model)
    return model


def _ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type != "Constant"]


def _attention(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.op_type == "Attention")


@pytest.mark.parametrize(
    ("body", "scale"),
    [
        (_SCORES + "z = Mul (qk, scale) ", 0.3),
        (_SCORES + "z = Div (qk, inv) ", 0.25),
        (
            "qa = Mul (q, scale) kt = Transpose <perm = [0, 1, 3, 2]> (k) ka = Mul (kt, scale) z = MatMul (qa, ka) ",
            0.09,
        ),
        (_SCORES.replace("qk =", "z ="), 1.0),
    ],
)
def test_every_place_of_the_scale_is_one_attribute(build, keeps, body, scale):
    model = _build(build, body + _SUM)
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V)
    assert _ops(model) == ["Attention"]
    assert _attention(model).attributes["scale"].value == pytest.approx(scale)


def test_added_mask_is_passed_on(build, keeps):
    body = _SCORES + "a = Mul (qk, scale) z = Add (m, a) " + _SUM
    model = _build(build, body, _HEADER + ', float["b",1,"s","t"] m')
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V, m=_BIAS)
    assert _ops(model) == ["Attention"]
    assert _attention(model).inputs[3].name == "m"


def test_position_bias_and_mask_are_summed(build, keeps):
    body = _SCORES + "a = Add (qk, p) z = Add (a, m) " + _SUM
    model = _build(build, body, _HEADER + ', float["b",1,"s","t"] m, float[1,4,"s","t"] p')
    bias = _RNG.standard_normal((1, 4, 3, 5)).astype(np.float32)
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V, m=_BIAS, p=bias)
    assert _ops(model) == ["Add", "Attention"]


@pytest.mark.parametrize("select", ["Where (m, qk, low)", "Where (m, low, qk)"])
def test_selected_scores_become_an_added_mask(build, keeps, select):
    model = _build(build, _SCORES + f"z = {select} " + _SUM, _HEADER + ', bool["b",1,"s","t"] m')
    allowed = _ALLOWED if select.endswith("low)") else ~_ALLOWED
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V, m=allowed)
    assert _ops(model) == ["Where", "Attention"]


def test_a_query_whose_scores_are_all_replaced_by_the_lowest_number_sees_all_keys_alike(build, keeps):
    """Padding that is masked as a query too, as in DeBERTa."""
    least = "least = Constant <value = float {-3.4028234663852886e38}> () "
    body = _SCORES + least + "z = Where (m, qk, least) " + _SUM
    model = _build(build, body, _HEADER + ', bool["b",1,"s","t"] m')
    allowed = _ALLOWED.copy()
    allowed[0, 0, 2] = False
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V, m=allowed)
    assert _ops(model) == ["Where", "Attention"]


def test_mask_of_keys_only_is_expanded_to_the_queries(build, keeps):
    model = _build(build, _SCORES + "z = Add (qk, m) " + _SUM, _HEADER + ', float["b",1,1,"t"] m')
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V, m=_BIAS[:, :, :1])
    assert "Expand" in _ops(model)
    assert "Softmax" not in _ops(model)


def test_guard_against_nan_goes(build, keeps):
    guard = "w0 = Softmax <axis = -1> (z) n = IsNaN (w0) w = Where (n, zero, w0) y = MatMul (w, v)"
    model = _build(build, _SCORES.replace("qk =", "z =") + guard)
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V)
    assert _ops(model) == ["Attention"]


def test_soft_cap_is_an_attribute(build, keeps):
    body = _SCORES + "a = Mul (qk, scale) d = Div (a, cap) h = Tanh (d) c = Mul (h, cap) z = Add (c, m) " + _SUM
    model = _build(build, body, _HEADER + ', float["b",1,"s","t"] m')
    keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V, m=_BIAS)
    assert _ops(model) == ["Attention"]
    assert _attention(model).attributes["softcap"].value == pytest.approx(20)
    assert _attention(model).attributes["scale"].value == pytest.approx(0.3)


def test_keys_transposed_together_with_the_heads_are_followed(build, keeps):
    body = "kt = Transpose <perm = [0, 2, 3, 1]> (k) z = MatMul (q, kt) " + _SUM
    model = _build(build, body, _HEADER.replace('4,"t",8] k', '"t",4,8] k'))
    keeps(RecogniseAttention(), model, q=_Q, k=_K.transpose(0, 2, 1, 3).copy(), v=_V)
    assert _ops(model) == ["Transpose", "Attention"]


_REPEAT = (
    (
        "axis = Constant <value = int64[1] {{2}}> () wide = Constant <value = int64[5] {{2, 2, 2, 5, 8}}> () "
        "flat = Constant <value = int64[4] {{2, 4, 5, 8}}> () "
        "k5 = Unsqueeze (k2, axis) kw = Expand (k5, wide) k = Reshape (kw, flat) "
        "v5 = Unsqueeze (v2, axis) vw = Expand (v5, wide) v = Reshape (vw, flat) "
    )
    .replace("{{", "{")
    .replace("}}", "}")
)
_FEW = "float[2,4,3,8] q, float[2,2,5,8] k2, float[2,2,5,8] v2"


@pytest.mark.parametrize("core", [_SCORES.replace("qk =", "z =") + _SUM, "y = Attention <scale = 1.0> (q, k, v)"])
def test_repeated_heads_are_read_as_they_are_stored(build, keeps, core):
    model = _build(build, _REPEAT + core, _FEW)
    result = keeps(RecogniseAttention(), model, q=_Q, k2=_K[:, :2].copy(), v2=_V[:, 2:].copy())
    assert _ops(model) == ["Attention"]
    assert [v.name for v in _attention(model).inputs] == ["q", "k2", "v2"]
    assert result.sites[0].details == {"query_heads": 4, "key_heads": 2}


def test_heads_that_are_tiled_instead_of_repeated_stay(build, keeps):
    tiled = _REPEAT.replace("int64[1] {2}", "int64[1] {1}")
    model = _build(build, tiled + "y = Attention <scale = 1.0> (q, k, v)", _FEW)
    result = keeps(RecogniseAttention(), model, q=_Q, k2=_K[:, :2].copy(), v2=_V[:, 2:].copy())
    assert [s.outcome for s in result.sites] == [Outcome.MATCHED]


def test_cache_stays_in_front_and_remains_an_output(build, keeps):
    body = "k = Concat <axis = 2> (pk, k1) " + _SCORES.replace("qk =", "z =") + _SUM
    header = 'float["b",4,"s",8] q, float["b",4,"p",8] pk, float["b",4,"n",8] k1, float["b",4,"t",8] v'
    model = _build(build, body, header, 'float["b",4,"s",8] y, float["b",4,"t",8] k')
    keeps(RecogniseAttention(), model, q=_Q, pk=_K[:, :, :2].copy(), k1=_K[:, :, 2:].copy(), v=_V)
    assert _ops(model) == ["Concat", "Attention"]
    assert [v.name for v in model.graph.outputs] == ["y", "k"]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (
            _SCORES.replace("qk =", "z =") + _SUM,
            'float["b",4,"s",8] y, float["b",4,"s","t"] w',
            "the attention weights are an output of the model",
        ),
        (
            _SCORES + "z = Where (m, qk, some) " + _SUM,
            None,
            "the scores are selected between, but not masked by a large negative number",
        ),
        (
            _SCORES + "z = Concat <axis = -1> (qk, qk) v2 = Concat <axis = 2> (v, v) " + _SUM.replace("v)", "v2)"),
            None,
            "the softmax is not of a product of queries and keys",
        ),
        (
            _SCORES + "z = Identity (qk) w = Softmax <axis = 2> (z) y = MatMul (w, v)",
            None,
            "the softmax is not over the last axis",
        ),
        (_SCORES + "z = Add (qk, some) " + _SUM, None, "the mask has no number for each key"),
    ],
)
def test_what_the_operator_does_not_define_is_left_alone(build, keeps, body, outputs, reason):
    model = _build(build, body, _HEADER + ', bool["b",1,"s","t"] m', outputs or 'float["b",4,"s",8] y')
    before = ir.to_proto(model).SerializeToString()
    result = keeps(RecogniseAttention(), model, q=_Q, k=_K, v=_V, m=_ALLOWED)
    assert [s.reason for s in result.sites] == [reason]
    assert ir.to_proto(model).SerializeToString() == before
