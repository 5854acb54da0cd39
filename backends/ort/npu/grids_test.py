from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.npu.attention import WriteOutAttention
from qc.backends.ort.npu.grids import QuantizeValues
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.simplify import infer_shapes
from qc.passes.base import Context, Outcome
from qc.passes.manager import PassManager

_RNG = np.random.default_rng(0)


def _model(text: str) -> Model:
    model = Model.of(ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> f ' + text))
    infer_shapes(model)
    return model


def _grid(model: Model, name: str) -> tuple[float, int]:
    """Step and code of zero of the grid of a value."""
    node = next(n for n in model.graph if n.op_type == "QuantizeLinear" and n.outputs[0].name == f"{name}.codes")
    scale, zero = (v.const_value.numpy() for v in node.inputs[1:])
    return float(scale), int(zero)


def test_every_value_gets_a_grid_and_rounding_is_all_that_changes():
    text = "(float[n,8] x) => (float[n,8] y) {\n a = Relu(x)\n b = Mul(a, x)\n y = Tanh(b)\n}"
    x = _RNG.uniform(-2, 2, (16, 8)).astype(np.float32)
    before = Session(_model(text)).run({"x": x})["y"]
    model, (report,) = PassManager([QuantizeValues()], stage="lowering").run(_model(text), calibration=[{"x": x}])
    assert report.count(Outcome.CHANGED) == 4
    after = Session(model).run({"x": x})["y"]
    assert 0 < np.abs(after - before).max() < 1e-3
    assert [n.op_type for n in model.graph if n.op_type not in ("QuantizeLinear", "DequantizeLinear")] == [
        "Relu",
        "Mul",
        "Tanh",
    ]
    assert _grid(model, "y")[0] == pytest.approx(2 / 65535), "the range of tanh needs no data"


def test_what_moves_numbers_keeps_their_grid():
    text = """(float[n,8] x, float[n,8] z) => (float[n,16] y) {
        t = Concat <axis = 1> (x, z)
        y = Transpose <perm = [0, 1]> (t) }"""
    batch = {"x": _RNG.uniform(-2, 1, (4, 8)).astype(np.float32), "z": _RNG.uniform(-1, 3, (4, 8)).astype(np.float32)}
    model, _ = PassManager([QuantizeValues()], stage="lowering").run(_model(text), calibration=[batch])
    grids = {_grid(model, name) for name in ("x", "z", "t", "y")}
    assert len(grids) == 1
    assert grids.pop()[0] >= (batch["z"].max() - batch["x"].min()) / 65535


def test_a_mask_hides_by_the_range_of_the_scores():
    text = "(float[1,2,n,8] q, bool[1,1,n,n] m) => (float[1,2,n,8] y) { y = Attention (q, q, q, m) }"
    q, mask = _RNG.standard_normal((1, 2, 6, 8), np.float32), np.tril(np.ones((1, 1, 6, 6), bool))
    batch = {"q": q, "m": mask}
    before = Session(_model(text)).run(batch)["y"]
    passes = [WriteOutAttention(), QuantizeValues()]
    model, _ = PassManager(passes, stage="lowering").run(_model(text), calibration=[batch])
    assert np.abs(Session(model).run(batch)["y"] - before).max() < 2e-3
    node = next(n for n in model.graph if n.op_type == "Where")
    depth = -float(node.inputs[2].const_value.numpy())
    scores = q @ q.swapaxes(2, 3) / np.sqrt(8)
    assert scores.max() - min(0, scores.min()) + 16 <= depth <= 1.2 * (scores.max() - min(0, scores.min())) + 17


def test_tables_and_their_rows_share_a_grid():
    model = _model("(int64[n] i, float[6,4] w) => (float[n,4] y) {\n g = Gather(w, i)\n y = Neg(g)\n}")
    table = model.graph.inputs[1]
    model.graph.inputs.remove(table)
    table.const_value = ir.tensor(_RNG.standard_normal((6, 4), np.float32), name="w")
    model.graph.register_initializer(table)
    infer_shapes(model)
    batch = {"i": np.array([1, 2])}
    done, _ = PassManager([QuantizeValues()], stage="lowering").run(model, calibration=[batch])
    held = next(n for n in done.graph if n.op_type == "DequantizeLinear" and n.inputs[0].const_value is not None)
    step, zero = (v.const_value.numpy() for v in held.inputs[1:])
    assert (float(step), int(zero)) == _grid(done, "g")


def test_what_was_not_observed_stays_as_it_is_and_says_so():
    model = _model("(float[n,8] x) => (float[n,8] y) { y = Neg(x) }")
    result = QuantizeValues().call(model, Context())
    assert not result.modified
    assert {s.outcome for s in result.sites} == {Outcome.SKIPPED}
    assert "half precision" in result.sites[0].reason


@pytest.mark.parametrize(("decibels", "bits"), [(0, 16), (20, 8), (60, 16)])
def test_keys_and_values_are_narrow_where_they_lose_little(decibels, bits):
    text = """(float[b,2,n,8] q, float[b,2,n,8] k) => (float[b,2,n,8] y) {
        s = Tanh(k)
        t = Transpose <perm = [0, 1, 3, 2]> (s)
        p = MatMul(q, t)
        r = Softmax(p)
        y = MatMul(r, s) }"""
    batch = {name: _RNG.standard_normal((2, 2, 6, 8), np.float32) for name in "qk"}
    before = Session(_model(text)).run(batch)["y"]
    rewrite = QuantizeValues(narrow=decibels)
    model, (report,) = PassManager([rewrite], stage="lowering").run(_model(text), calibration=[batch])
    found = {s.name: s.details["bits"] for s in report.sites}
    assert found == {"q": 16, "k": 16, "s": bits, "t": bits, "p": 16, "r": 16, "y.exact": 16}
    rounded = [n.op_type for n in model.graph].count("QuantizeLinear")
    assert rounded == (7 if bits == 16 else 8), "arithmetic yields 16 bits, and the grid is changed behind it"
    error = np.abs(Session(model).run(batch)["y"] - before).max()
    assert (error > 1e-3) == (bits == 8)
    assert error < 2e-2


@pytest.mark.parametrize("options", [{"bits": 12}, {"margin": 0.5}, {"narrow": -1}])
def test_wrong_options_are_refused(options):
    with pytest.raises(InputError, match="Expected"):
        QuantizeValues(**options)


@pytest.mark.parametrize(
    ("op_type", "expected"), [("RMSNormalization", ir.DataType.UINT8), ("Mul", ir.DataType.UINT16)]
)
def test_constants_of_normalizations_are_as_wide_as_the_values(op_type, expected):
    model = _model(f"(float[n,8] x, float[8] w) => (float[n,8] y) {{ y = {op_type}(x, w) }}")
    gain = model.graph.inputs[1]
    model.graph.inputs.remove(gain)
    gain.const_value = ir.tensor(np.linspace(0.5, 2, 8, dtype=np.float32), name="w")
    model.graph.register_initializer(gain)
    batch = {"x": _RNG.standard_normal((4, 8), np.float32)}
    done, _ = PassManager([QuantizeValues(bits=8)], stage="lowering").run(model, calibration=[batch])
    held = next(n for n in done.graph if n.op_type == "DequantizeLinear" and n.inputs[0].const_value is not None)
    assert held.inputs[0].dtype == expected
