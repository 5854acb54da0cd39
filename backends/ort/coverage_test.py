from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.backends.ort.coverage import coverage

_W = np.ones((4, 4), np.float32)


def _model(text: str, **weights: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>' + text)
    for value in tuple(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name])
            model.graph.register_initializer(value)
    return model


def _reasons(model: ir.Model) -> dict[str, str]:
    found = coverage(model)
    assert found.on_target + found.off_target == len(list(model.graph.all_nodes()))
    assert all(bool(entry["reason"]) != entry["on_target"] for entry in found.nodes)
    return {str(entry["op"]): str(entry["reason"]) for entry in found.nodes}


def test_float_products_are_on_target():
    model = _model("f (float[a,4] x, float[4,4] w) => (float[a,4] y) { y = MatMul(x, w) }", w=_W)
    assert _reasons(model) == {"MatMul": ""}


def test_a_weight_that_is_decoded_on_each_call_is_off_target_with_its_product():
    text = "f (float[a,4] x, int8[4,4] q, float s) => (float[a,4] y) { w = DequantizeLinear(q, s)\n y = MatMul(x, w) }"
    model = _model(text, q=np.ones((4, 4), np.int8), s=np.array(0.5, np.float32))
    reasons = _reasons(model)
    assert "decodes a whole weight" in reasons["DequantizeLinear"]
    assert "decoded whole" in reasons["MatMul"]


def test_a_slow_fused_kernel_is_off_target_with_the_limit():
    text = """f (float[a,4] x, uint8[4,1,4] b, float[4,1] s) => (float[a,4] y) {
        y = com.microsoft.MatMulNBits <K = 4, N = 4, bits = 8, block_size = 16, accuracy_level = 0> (x, b, s)
    }"""
    assert "accuracy level 4" in _reasons(_model(text))["com.microsoft::MatMulNBits"]


def test_dynamic_quantization_is_on_target_only_in_front_of_an_integer_product():
    integer = """f (float[a,4] x, int8[4,4] b, float t) => (float[a,4] y) {
        q, s, z = DynamicQuantizeLinear(x)
        y = com.microsoft.MatMulIntegerToFloat(q, b, s, t, z)
    }"""
    assert set(_reasons(_model(integer)).values()) == {""}
    rounded = """f (float[a,4] x, float[4,4] w) => (float[a,4] y) {
        q, s, z = DynamicQuantizeLinear(x)
        r = DequantizeLinear(q, s, z)
        y = MatMul(r, w)
    }"""
    reasons = _reasons(_model(rounded, w=_W))
    assert "float" in reasons["DynamicQuantizeLinear"]
    assert "float" in reasons["DequantizeLinear"]


def test_operators_without_a_kernel_are_off_target():
    text = "f (float[a,4] x) => (float[a,4] y) { t = com.microsoft.Nothing(x)\n y = Relu(t) }"
    assert "no CPU kernel" in _reasons(_model(text))["com.microsoft::Nothing"]
