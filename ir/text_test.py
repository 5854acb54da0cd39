from __future__ import annotations

import numpy as np
import pytest
from onnx_ir import AttrFloat32

from qc.ir.blocks import find_blocks
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import diff, parse, to_text

_GRAPH = """
net (float[batch,4] x) => (float[batch,16] y) {
    # a layer
    h = qc.Linear:bias (x, W, b)
    y = qc.Swish <alpha: float = 1.702> (h)
}
"""


def _linear() -> Model:
    weights = {"W": np.ones((16, 4), np.float32), "b": np.zeros(16, np.float32)}
    return parse(_GRAPH, weights=weights, roles={"x": "hidden"})


def test_text_shows_roles_types_weights_and_attributes() -> None:
    model = _linear()
    model.record(source="hand")
    assert to_text(model) == (
        "model  ir 10, opset onnx 23, qc 1\n"
        "fact   source = 'hand'\n"
        "input  %x: f32[batch,4]  hidden\n"
        "output %y: f32[batch,16]  other\n"
        "{\n"
        "  %h: f32[batch,16] = qc.Linear:bias(%x, W: f32[16,4], b: f32[16])\n"
        "  %y: f32[batch,16] = qc.Swish(%h) {alpha=1.702}\n"
        "}\n"
        "function qc.Linear:bias(%x, %weight, %bias) -> (%return_val) {\n"
        "  %tmp = Transpose(%weight) {perm=[1, 0]}\n"
        "  %tmp_0 = MatMul(%x, %tmp)\n"
        "  %return_val = Add(%tmp_0, %bias)\n"
        "}\n"
        "function qc.Swish(%x) -> (%return_val) {\n"
        "  %tmp = Constant() {value_float=@alpha}\n"
        "  %tmp_0 = CastLike(%tmp, %x)\n"
        "  %tmp_1 = Mul(%x, %tmp_0)\n"
        "  %tmp_2 = Sigmoid(%tmp_1)\n"
        "  %return_val = Mul(%x, %tmp_2)\n"
        "}\n"
    )


def test_text_shows_small_constants_and_omitted_inputs() -> None:
    model = parse(
        "g (float[4] x) => (float[2,2] y) <int64[2] s = {2, -1}> { a = Clip (x, , top) y = Reshape (a, s) }",
        weights={"top": np.array(1.5, np.float32)},
    )
    assert "= Clip(%x, _, top: f32[]{1.5})" in to_text(model)
    assert "= Reshape(%a, s: i64[2]{2, -1})" in to_text(model)


def test_text_indents_subgraphs() -> None:
    model = parse(
        "g (bool c, float[2] x) => (float[2] y) { y = If <"
        "then_branch: graph = t () => (float[2] a) { a = Relu (x) },"
        "else_branch: graph = e () => (float[2] b) { b = Neg (x) }> (c) }"
    )
    assert (
        "  %y: f32[2] = If(%c)\n"
        "    else_branch: () -> (%b) {\n"
        "      %b: f32[2] = Neg(%x)\n"
        "    }\n"
        "    then_branch: () -> (%a) {\n"
        "      %a: f32[2] = Relu(%x)\n"
        "    }\n"
    ) in to_text(model)


def test_text_marks_blocks() -> None:
    model = parse(
        "g (float[1,9] x) => (float[1,9] y) { a = MatMul (x, u) b = Add (x, a) c = MatMul (b, v) y = Add (b, c) }",
        weights={"u": np.ones((9, 9), np.float32), "v": np.ones((9, 9), np.float32)},
    )
    blocks = find_blocks(model.graph)
    comments = [line.strip() for line in to_text(model, blocks=blocks).splitlines() if "#" in line]
    assert comments == [f"# {s.label}" for s in blocks.segments]


def test_hashes_tell_weights_of_one_shape_apart() -> None:
    a, b = _linear(), _linear()
    b.graph.initializers["W"].const_value = (
        parse(_GRAPH, weights={"W": np.zeros((16, 4), np.float32), "b": np.zeros(16, np.float32)})
        .graph.initializers["W"]
        .const_value
    )
    assert diff(a, b) == ""
    assert diff(a, b, hashes=True).count("\n-") == 1


def test_diff_shows_the_changed_line() -> None:
    a = _linear()
    b = a.clone()
    b.graph.node(1).attributes["alpha"] = AttrFloat32("alpha", 1.0)
    changed = [line for line in diff(a, b).splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == [
        "-  %y: f32[batch,16] = qc.Swish(%h) {alpha=1.702}",
        "+  %y: f32[batch,16] = qc.Swish(%h) {alpha=1.0}",
    ]


def test_equal_models_have_no_diff() -> None:
    assert diff(_linear(), _linear(), hashes=True) == ""


def test_parsed_dialect_runs() -> None:
    found = Session(_linear()).run({"x": np.full((1, 4), 0.5, np.float32)})["y"]
    np.testing.assert_allclose(found, np.full((1, 16), 2 / (1 + np.exp(-1.702 * 2))), rtol=1e-6)


def test_a_full_header_is_kept() -> None:
    model = parse('<ir_version: 9, opset_import: ["": 20]> g (float[2] x) => (float[2] y) { y = Relu (x) }')
    assert (model.ir_version, model.opset_imports) == (9, {"": 20})


@pytest.mark.parametrize(
    ("text", "weights", "roles", "message"),
    [
        ("g (float[2] x) => (float[2] y) { y = Relu x }", {}, {}, "textual syntax"),
        ("g (float[2] x) => (float[2] y) { y = Relu (x) }", {"w": np.ones(2)}, {}, "'w'"),
        ("g (float[2] x) => (float[2] y) { y = Relu (x) }", {}, {"z": "tokens"}, "'z'"),
    ],
)
def test_parse_names_what_is_wrong(
    text: str, weights: dict[str, np.ndarray], roles: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse(text, weights=weights, roles=roles)
