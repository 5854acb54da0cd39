from __future__ import annotations

import numpy as np

from qc.backends.ort.fuse.residuals import KeepResiduals

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
