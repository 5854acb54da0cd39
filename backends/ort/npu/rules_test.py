from __future__ import annotations

import importlib.resources
import re

import onnx_ir as ir
import pytest

from qc.backends.ort.npu.provider_rules import PROVIDERS
from qc.backends.ort.npu.rules import coverage, placement
from qc.ir.simplify import infer_shapes

_LISTS = {"coreml": "coreml_supported_mlprogram_ops.md", "nnapi": "nnapi_supported_ops.md"}
_NEVER_WRITTEN = {
    "coreml": {"Argmax", "com.microsoft::FusedConv"},
    "nnapi": {
        "QLinearConv", "QLinearMatMul", "com.microsoft::QLinearAdd", "com.microsoft::QLinearAveragePool",
        "com.microsoft::QLinearSigmoid",
    },
}  # fmt: skip
"""Operators of the lists that are results of the runtime's optimizations, or a slip of the pen."""


@pytest.mark.parametrize("kind", ["coreml", "nnapi"])
def test_the_tables_have_the_operators_of_the_runtime_that_is_installed(kind):
    text = (importlib.resources.files("onnxruntime.tools.mobile_helpers") / _LISTS[kind]).read_text("utf-8")
    listed = {
        name if domain == "ai.onnx" else f"{domain}::{name}"
        for domain, name in re.findall(r"^\|([\w.]+)[:.](\w+)\|", text, re.MULTILINE)
    }
    assert len(listed) > 40
    assert listed - set(PROVIDERS[kind].rules) == _NEVER_WRITTEN[kind]
    assert set(PROVIDERS[kind].rules) <= listed


def _model(text: str) -> ir.Model:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> f ' + text)
    infer_shapes(model)
    return model


def _quantized(
    product: str, scale: str = "0.5", weight: str = "int8[2,4] w = {1,2,3,4,5,6,7,8}", sizes: str = "2"
) -> str:
    """A product of codes of an input with those of a weight, whose result has a grid with that step."""
    ones = ", ".join(["0.5"] * int(sizes))
    zeros = ", ".join(["0"] * int(sizes))
    return f"""(float[3,4] x) => (float[3,2] y)
        <float s = {{0.5}}, uint8 z = {{7}}, float t = {{{scale}}}, uint8 o = {{0}},
         float[{sizes}] ws = {{{ones}}}, int8[{sizes}] wz = {{{zeros}}}, {weight}> {{
        a = QuantizeLinear(x, s, z)
        b = DequantizeLinear(a, s, z)
        c = DequantizeLinear <axis = 0> (w, ws, wz)
        {product}
        e = QuantizeLinear(d, t, o)
        y = DequantizeLinear(e, t, o) }}"""


@pytest.mark.parametrize(
    ("kind", "text", "op", "reason"),
    [
        ("coreml", "(int32[2] i, float[8,4] t) => (float[2,4] y) { y = Gather(t, i) }", "Gather", "has no Gather"),
        ("coreml", "(float16[2] x, float16[2] z) => (float16[2] y) { y = Pow(x, z) }", "Pow", "float16, not float"),
        ("coreml", "(float[n,4] x) => (float[n,4] y) { y = Relu(x) }", "Relu", "shape of 'x' is not fixed"),
        ("coreml", "(float[1,1,1,1,1,2] x) => (float[1,1,1,1,1,2] y) { y = Relu(x) }", "Relu", "6 axes"),
        (
            "coreml",
            "(float[2,4] x, float[4] g) => (float[2,4] y) { y = LayerNormalization(x, g) }",
            "LayerNormalization",
            "input 1 is not constant",
        ),
        ("coreml", "(float[2] x) => (float16[2] y) { y = Cast <to = 10> (x) }", "Cast", "input of the graph"),
        (
            "coreml",
            "(float[2,3] x, float[3,2] w) => (float[2,2] y) { y = Gemm <alpha = 2.0> (x, w) }",
            "Gemm",
            "input 1 is not constant",
        ),
        ("nnapi", "(float[2,4] x) => (float[2,4] y) { y = Erf(x) }", "Erf", "NNAPI has no Erf"),
        ("nnapi", "(float16[2,4] x) => (float16[2,4] y) { y = Relu(x) }", "Relu", "float16, not float"),
        ("nnapi", "(float[1,3,4] x, float[2,4,3] z) => (float[2,3,3] y) { y = MatMul(x, z) }", "MatMul", "batches"),
        ("nnapi", "(float[3,4] x, float[4,3] z) => (float[3,3] y) { y = MatMul(x, z) }", "MatMul", "not constant"),
        (
            "nnapi",
            """(float[3,4] x) => (float[3,4] y) <float[4] s = {1, 2, 3, 4}, uint8[4] z = {0, 0, 0, 0}> {
                a = QuantizeLinear <axis = 1> (x, s, z)
                y = DequantizeLinear <axis = 1> (a, s, z) }""",
            "QuantizeLinear",
            "not one number",
        ),
        (
            "nnapi",
            _quantized("d = Gemm <transB = 1> (b, c)"),
            "DequantizeLinear",
            "int8, not uint8",
        ),
    ],
)  # fmt: skip
def test_a_node_that_a_provider_does_not_take_has_a_reason(kind, text, op, reason):
    found = {n.op_type: r for n, r in placement(_model(text).graph, PROVIDERS[kind]) if r}
    assert reason in found[op], found


@pytest.mark.parametrize(
    ("product", "sizes", "taken"),
    [("d = Gemm <transB = 1> (b, c)", "1", True), ("d = Gemm <transB = 1> (b, c)", "2", False)],
)
def test_a_matrix_product_of_codes_has_one_scale(product, sizes, taken):
    found = placement(_model(_quantized(product, sizes=sizes)).graph, PROVIDERS["nnapi"])
    assert all(not reason for _, reason in found) == taken, found


@pytest.mark.parametrize("kind", ["coreml", "nnapi"])
def test_what_depends_on_constants_alone_does_not_run(kind):
    model = _model(
        "(float[2,4] x) => (float[2,4] y) <float[4] w = {1, 2, 3, 4}> { a = Erf(w)\n b = Exp(a)\n y = Mul(x, b) }"
    )
    found = coverage(model, PROVIDERS[kind])
    assert [(n["op"], n["on_target"]) for n in found.nodes] == [("Mul", True)]
    assert "by its rules" in found.nodes[0]["reason"]
