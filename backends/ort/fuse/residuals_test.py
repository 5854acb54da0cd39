from __future__ import annotations

import numpy as np
import pytest

from qc.backends.ort.fuse.residuals import FuseResiduals, KeepResiduals

_RNG = np.random.default_rng(0)
_GAIN = _RNG.standard_normal(8).astype(np.float32)
_FEED = {name: _RNG.standard_normal((2, 3, 8), np.float32) for name in ("x", "r")}
_HEAD = "f (float[b,s,8] x, float[b,s,8] r, float[8] g) => "


def test_a_residual_in_front_of_a_layer_norm_becomes_a_sum(build, keeps):
    model = build(_HEAD + "(float[b,s,8] y) { t = Add(x, r)\n y = LayerNormalization(t, g, g) }", g=_GAIN)
    keeps(KeepResiduals(), model, [_FEED])
    assert [n.op_type for n in model.graph] == ["Sum", "LayerNormalization"]


def test_the_runtime_does_not_fuse_the_sum_to_its_slow_kernel(build, tmp_path):
    import onnx
    import onnx_ir as ir
    import onnxruntime as ort

    def loaded_ops(model):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
        return {n.op_type for n in onnx.load(tmp_path / "loaded.onnx").graph.node}

    model = build(_HEAD + "(float[b,s,8] y) { t = Add(x, r)\n y = LayerNormalization(t, g, g) }", g=_GAIN)
    assert loaded_ops(model) == {"SkipLayerNormalization"}
    KeepResiduals()(model)
    assert loaded_ops(model) == {"Sum", "LayerNormalization"}


def test_a_sum_that_is_an_output_and_read_again_keeps_its_readers(build, keeps):
    outputs = "(float[b,s,8] y, float[b,s,8] t, float[b,s,8] u)"
    text = " { t = Add(x, r)\n y = LayerNormalization(t, g)\n u = Mul(t, t) }"
    model = build(_HEAD + outputs + text, g=_GAIN)
    keeps(KeepResiduals(), model, [_FEED])
    assert [n.op_type for n in model.graph] == ["Sum", "LayerNormalization", "Mul"]


def test_the_sum_with_a_bias_and_an_add_elsewhere_stay(build, keeps):
    text = "(float[b,s,8] y) { t = Add(x, g)\n n = LayerNormalization(t, g)\n y = Add(n, r) }"
    result = keeps(KeepResiduals(), build(_HEAD + text, g=_GAIN), [_FEED])
    assert not result.modified
    assert "constant" in result.sites[0].reason


_DECODER = (
    "f (float[b,s,8] x, float[b,s,8] r, float[8] g, float[b,1,p,8] past) => "
    "(float[b,s,8] y, float[b,1,p,8] present{}) {{ present = Identity(past)\n {} }}"
)
_ROLES = {"past": "past_key", "present": "present_key"}
_STEP = _FEED | {"past": _RNG.standard_normal((2, 1, 4, 8), np.float32)}


def test_the_residual_of_a_decoder_and_its_norm_are_one_kernel_that_yields_both(build, keeps):
    text = "t = Add(x, r)\n n = RMSNormalization <axis = -1, epsilon = 0.01> (t, g)\n y = Add(n, t)"
    model = build(_DECODER.format("", text), _ROLES, g=_GAIN)
    result = keeps(FuseResiduals(), model, [_STEP])
    assert [n.op_type for n in model.graph] == ["Identity", "SkipSimplifiedLayerNormalization", "Add"]
    assert result.sites[0].details["kernel"] == "SkipSimplifiedLayerNormalization"


def test_a_gain_that_is_cast_behind_the_sum_is_no_obstacle(build, keeps):
    text = "t = Add(x, r)\n w = Cast <to = 1> (h)\n y = RMSNormalization(t, w)"
    model = build(_DECODER.format("", text).replace("float[8] g", "float16[8] h"), _ROLES, h=_GAIN.astype(np.float16))
    keeps(FuseResiduals(), model, [_STEP])
    assert [n.op_type for n in model.graph] == ["Identity", "Cast", "SkipSimplifiedLayerNormalization"]


def test_a_sum_that_is_an_output_is_still_one_after_the_fusion(build, keeps):
    text = "u = Mul(r, r)\n t = Add(x, u)\n y = RMSNormalization(t, g)"
    keeps(FuseResiduals(), build(_DECODER.format(", float[b,s,8] t", text), _ROLES, g=_GAIN), [_STEP])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("t = Add(x, g)\n y = RMSNormalization(t, g)", "broadcasts"),
        ("t = Add(x, r)\n y = RMSNormalization <axis = 1> (t, g)", "last axis"),
        ("t = Add(x, r)\n h = Abs(g)\n w = Add(h, g)\n y = RMSNormalization(t, w)", "gain is computed"),
    ],
)
def test_what_the_kernel_does_not_compute_stays_two_nodes(build, keeps, text, reason):
    result = keeps(FuseResiduals(), build(_DECODER.format("", text), _ROLES, g=_GAIN), [_STEP])
    assert not result.modified
    assert reason in result.sites[0].reason


def test_an_encoder_keeps_the_two_nodes_which_are_faster_for_many_tokens(build, keeps):
    model = build(_HEAD + "(float[b,s,8] y) { t = Add(x, r)\n y = RMSNormalization(t, g) }", g=_GAIN)
    assert not keeps(FuseResiduals(), model, [_FEED]).modified
