from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qc.backends.inputs import text_inputs
from qc.backends.ort.accelerators import accelerators
from qc.backends.ort.mobile import CONFIG, OrtMobile
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline


def _lowered(model: Model, recipe: str) -> Model:
    model, _ = PassManager([*canonicalize_passes(), *parse_pipeline(recipe)]).run(model)
    return Model.of(PassManager(OrtMobile().lowering(), stage="lowering").run(model)[0])


@pytest.fixture
def emitted(build, tmp_path):
    OrtMobile().emit(_lowered(build("appending"), "quantize-weights{format=int4,group=32}"), tmp_path)
    return tmp_path


def test_both_forms_of_the_file_compute_the_same(emitted):
    runner = OrtMobile().open(emitted, threads=1)
    inputs = text_inputs(runner.signature, np.array([[3, 5, 7]]))
    found = runner.run(inputs)
    expected = super(OrtMobile, OrtMobile()).open(emitted, threads=1).run(inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-6)
    assert len(list(runner.generate([3, 5, 7], 4))) == 4


def test_what_is_opened_is_the_form_that_an_app_ships(emitted):
    (emitted / "model.onnx.data").unlink()
    OrtMobile().open(emitted, threads=1)


def test_every_file_has_the_same_bytes_each_time(build, tmp_path):
    lowered = _lowered(build("appending"), "quantize-weights{format=int4,group=32}")
    found = []
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        OrtMobile().emit(lowered, tmp_path / name)
        found.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()})
    assert {"model.onnx", "model.ort", CONFIG} <= set(found[0])
    assert found[0] == found[1] == found[2]


def test_the_list_of_operators_is_that_of_the_optimized_graph(emitted):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(emitted / "optimized.onnx")
    ort.InferenceSession(str(emitted / "model.onnx"), options, ["CPUExecutionProvider"])
    nodes = onnx.load(emitted / "optimized.onnx").graph.node
    text = (emitted / CONFIG).read_text()
    listed = [line.split(";") for line in text.splitlines()]
    assert {(d, op) for d, _, ops in listed for op in ops.split(",")} == {
        (n.domain or "ai.onnx", n.op_type) for n in nodes
    }
    assert str(emitted) not in text


def test_the_checker_says_of_every_accelerator_what_it_would_take(build):
    model = _lowered(build("encoder"), "quantize-weights{format=int4,group=32}")
    found = accelerators(model)
    assert [f["name"] for f in found] == ["NNAPI", "Core ML, neural network", "Core ML, ML program"]
    assert all(f["as_is"]["of"] == len(list(model.graph)) for f in found)
    assert "com.microsoft:MatMulNBits" in found[0]["unsupported"]
    assert all("fixed_shapes" in f for f in found), "the batch and the length are dynamic"
    json.dumps(found)


def test_2_bit_weights_are_off_target_as_arm_has_no_kernel(build):
    model = _lowered(build("encoder"), "quantize-weights{format=int2,group=32}")
    found = OrtMobile().coverage(model)
    reasons = {str(n["reason"]) for n in found.nodes if n["op"] == "com.microsoft::MatMulNBits"}
    assert reasons == {"arm64 has no 2-bit kernel: the weight is decoded on each call; choose 4 bits"}
    assert not any(f.startswith(("int2", "uint2")) for f in OrtMobile().target.formats)
