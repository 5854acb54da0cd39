from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.npu.activations import WriteOutActivations
from qc.backends.ort.npu.attention import LOWEST, WriteOutAttention
from qc.backends.ort.npu.norms import CenterByHalves, WriteOutNormalizations
from qc.backends.ort.npu.outside import outside_values
from qc.backends.ort.npu.rotary import WriteOutRotary
from qc.ir import dialect
from qc.ir.model import Model, set_role
from qc.ir.runtime import Session
from qc.ir.simplify import infer_shapes
from qc.ir.verify import compare
from qc.passes.base import Pass

_RNG = np.random.default_rng(0)
_HEADER = '<ir_version: 10, opset_import: ["" : 23, "qc" : 1]> f '


def _model(text: str) -> Model:
    model = Model.of(ir.from_onnx_text(_HEADER + text))
    dialect.sync_functions(model)
    infer_shapes(model)
    return model


def _keeps(rewrite: Pass, model: Model, feed: dict[str, np.ndarray]) -> Counter[str]:
    """Runs a pass, which must keep the outputs; returns the operators that are left."""
    before = Session(model).run(feed)
    assert rewrite(model).modified
    dialect.sync_functions(model)
    for difference in compare(before, Session(model).run(feed)):
        assert difference.max_abs <= 2e-5 * difference.scale, difference
    assert not rewrite(model).modified, "a second run must find nothing to do"
    return Counter(n.op_type for n in model.graph)


def _floats(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ("", "bool[b,1,n,n] m"),
        ("scale = 0.2, softcap = 3.0", "bool[b,1,n,n] m"),
        ("is_causal = 1", "bool[b,1,n,n] m"),
        ("is_causal = 1", ""),
        ("", ""),
        ("", "float[1,4,n,n] m"),
        ("", "float[n,n] m"),
    ],
)
def test_attention_with_shared_keys_is_written_out(options, mask):
    inputs = "float[b,4,n,8] q, float[b,2,n,8] k, float[b,2,n,8] v" + (f", {mask}" if mask else "")
    read = "q, k, v" + (", m" if mask else "")
    call = f"Attention <{options}>" if options else "Attention"
    model = _model(
        f"({inputs}, int64[b,n] i) => (float[b,4,n,8] y, int64[b,n] j) {{ y = {call} ({read})\n j = Neg(i) }}"
    )
    set_role(model.graph.inputs[-1], "tokens")
    feed = {
        "q": _floats(2, 4, 5, 8),
        "k": _floats(2, 2, 5, 8),
        "v": _floats(2, 2, 5, 8),
        "i": np.ones((2, 5), np.int64),
    }
    if mask.startswith("bool"):
        feed["m"] = np.tril(np.ones((2, 1, 5, 5), bool))
    elif mask:
        feed["m"] = _floats(*((1, 4, 5, 5) if "[1" in mask else (5, 5)))
    ops = _keeps(WriteOutAttention(), model, feed)
    assert (ops["MatMul"], ops["Softmax"], ops["Attention"]) == (2, 1, 0)
    assert len(outside_values(model.graph)) == 1, "the mask depends on lengths and masks alone"


def test_attention_appends_to_a_cache_and_is_causal_behind_it():
    text = """(float[b,n,32] q, float[b,n,16] k, float[b,n,16] v, float[b,2,p,8] pk, float[b,2,p,8] pv)
        => (float[b,n,32] y, float[b,2,t,8] nk, float[b,2,t,8] nv) {
        y, nk, nv = Attention <is_causal = 1, q_num_heads = 4, kv_num_heads = 2> (q, k, v, , pk, pv) }"""
    feed = {"q": _floats(2, 3, 32), "k": _floats(2, 3, 16), "v": _floats(2, 3, 16)}
    _keeps(WriteOutAttention(), _model(text), feed | {"pk": _floats(2, 2, 4, 8), "pv": _floats(2, 2, 4, 8)})


def test_a_mask_of_the_lowest_floats_is_cut():
    model = _model("(float[1,1,n,8] q, float[1,1,n,n] m) => (float[1,1,n,8] y) { y = Attention (q, q, q, m) }")
    mask = np.where(np.tril(np.ones((1, 1, 4, 4), bool)), 0, np.finfo(np.float32).min).astype(np.float32)
    feed = {"q": _floats(1, 1, 4, 8), "m": mask}
    _keeps(WriteOutAttention(), model, feed)
    (hidden,) = outside_values(model.graph)
    model.graph.outputs.append(hidden)
    assert Session(model).run(feed)[hidden.name].min() == LOWEST


def test_layers_share_a_mask_and_the_stacking_of_it():
    text = """(float[b,4,n,8] q, float[b,2,n,8] k, bool[b,1,n,n] m) => (float[b,4,n,8] y) {
        x = Attention (q, k, k, m)
        y = Attention (x, k, k, m) }"""
    feed = {"q": _floats(1, 4, 5, 8), "k": _floats(1, 2, 5, 8), "m": np.tril(np.ones((1, 1, 5, 5), bool))}
    ops = _keeps(WriteOutAttention(), _model(text), feed)
    assert (ops["Where"], ops["Concat"]) == (1, 1)


def test_a_mask_that_depends_on_activations_stays_inside():
    text = """(float[1,1,n,8] x, float[8] g) => (float[1,1,n,8] y) {
        q = RMSNormalization (x, g)
        t = Transpose <perm = [0, 1, 3, 2]> (q)
        m = MatMul(q, t)
        y = Attention (q, q, q, m) }"""
    model = _model(text)
    _keeps(WriteOutAttention(), model, {"x": _floats(1, 1, 4, 8), "g": _floats(8)})
    assert not outside_values(model.graph)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [8, 12])
def test_rotations_are_written_out(interleaved, width):
    half = 4
    text = f"""(float[b,2,n,{width}] x, float[16,4] cos, float[16,4] sin, int64[b,n] p) => (float[b,2,n,{width}] y) {{
        y = RotaryEmbedding <interleaved = {interleaved}, rotary_embedding_dim = {2 * half}> (x, cos, sin, p) }}"""
    model = _model(text)
    angles = _floats(16, half)
    for value in list(model.graph.inputs)[1:3]:
        table = np.cos(angles) if value.name == "cos" else np.sin(angles)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(table, name=value.name)
        model.graph.register_initializer(value)
    feed = {"x": _floats(2, 2, 5, width), "p": np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])}
    _keeps(WriteOutRotary(), model, feed)
    assert len(outside_values(model.graph)) == 2


def test_swish_becomes_a_sigmoid_and_a_product():
    model = _model("(float[2,8] x) => (float[2,8] y) { y = qc.Swish <alpha = 1.5> (x) }")
    assert _keeps(WriteOutActivations(), model, {"x": _floats(2, 8)}) == {"Mul": 2, "Sigmoid": 1}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_written_out_on_demand(approximate):
    model = _model(f'(float[n,8] x) => (float[n,8] y) {{ y = Gelu <approximate = "{approximate}"> (x) }}')
    assert not WriteOutActivations()(model).modified
    ops = _keeps(
        WriteOutActivations(gelu=True), model, {"x": np.linspace(-12, 12, 800, dtype=np.float32).reshape(-1, 8)}
    )
    assert not {"Gelu", "Erf"} & set(ops)


@pytest.mark.parametrize(
    "call", ["LayerNormalization (x, g, b)", "LayerNormalization (x, g)", "RMSNormalization (x, g)"]
)
def test_normalizations_are_written_out(call):
    model = _model(f"(float[n,3,8] x, float[8] g, float[8] b) => (float[n,3,8] y) {{ y = {call} }}")
    ops = _keeps(WriteOutNormalizations(), model, {"x": 3 + _floats(4, 3, 8), "g": _floats(8), "b": _floats(8)})
    assert set(ops) <= {"Add", "Div", "Mul", "ReduceMean", "Sqrt", "Sub"}


def test_a_root_mean_square_is_that_of_a_value_and_its_negative():
    model = _model("(float[n,3,8] x, float[8] g) => (float[n,3,8] y) { y = RMSNormalization <epsilon = 0.1> (x, g) }")
    ops = _keeps(CenterByHalves(), model, {"x": 3 + _floats(4, 3, 8), "g": _floats(8)})
    assert ops["LayerNormalization"] == 1


@pytest.mark.parametrize("rewrite", [CenterByHalves(), WriteOutNormalizations()])
def test_a_normalization_of_several_axes_is_left_alone(rewrite):
    model = _model("(float[n,3,8] x, float[3,8] g) => (float[n,3,8] y) { y = RMSNormalization <axis = 1> (x, g) }")
    result = rewrite(model)
    assert not result.modified
    assert "last axis" in result.sites[0].reason
