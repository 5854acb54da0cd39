from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.decoding import generate
from qc.backends.ort.npu.device import NpuSession
from qc.backends.reference import ModelRunner
from qc.backends.target import backend_for
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.verify import STAGES, check_structure, compare
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

_TARGET = "ort-npu:qnn,length=12,prefill=4,cache=16"
_RECIPE = "quantize-weights{format=int8,group=0,embedding=float}"


@pytest.fixture
def simulator() -> None:
    pytest.importorskip("onnxruntime_qnn", reason="the simulator comes with the extra npu, on Linux and Windows")


def _lowered(model: Model, batch) -> Model:
    """Calibrated on token ids of all lengths that are asked for later."""
    rng = np.random.default_rng(1)
    batches = [batch(model, length, rng) for length in (3, 12, 12, 12)]
    model, _ = PassManager(canonicalize_passes()).run(model)
    model, _ = PassManager(parse_pipeline(_RECIPE)).run(model, calibration=batches)
    backend = backend_for(_TARGET)
    model, _ = PassManager(backend.lowering(), stage="lowering").run(model, calibration=batches)
    check_structure(model, STAGES[backend.target.stage])
    assert backend.coverage(model).off_target == 0
    return model


def _emitted(build, kind, batch, tmp_path) -> tuple[Model, Model]:
    """The float model, and the lowered one, whose files are in `tmp_path`."""
    model = build(kind)
    reference = model.clone()
    lowered = _lowered(model, batch)
    backend_for(_TARGET).emit(lowered, tmp_path)
    return reference, lowered


def test_the_graphs_of_a_decoder_have_fixed_shapes_and_share_their_weights(build, batch, tmp_path):
    _emitted(build, "appending", batch, tmp_path)
    for file, new in (("prefill.onnx", 4), ("decode.onnx", 1)):
        graph = ir.load(tmp_path / file).graph
        shapes = {v.name: (v.dtype.name, tuple(v.shape)) for v in graph.inputs}
        assert shapes["input_ids"] == ("INT32", (1, new))
        assert shapes["past_key_values.0.key"] == ("UINT8", (1, 2, 16, 16)), "keys lose little in 8 bits"
        assert all(isinstance(d, int) for n in graph for v in n.outputs if v.shape is not None for d in v.shape)
        assert not {"Shape", "Range", "Where", "Cast"} & {n.op_type for n in graph}, "lengths and masks are outside"
        large = [v.const_value for v in graph.initializers.values() if v.const_value.nbytes > 1024]
        assert large
        assert {t.location for t in large} == {"model.onnx.data"}


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("kind", ["appending", "encoder"])
def test_every_node_runs_on_the_npu_and_texts_of_any_length_are_as_lowered(build, batch, tmp_path, kind):
    _, lowered = _emitted(build, kind, batch, tmp_path)
    runner, exact = backend_for(_TARGET).open(tmp_path), ModelRunner(lowered)
    rng = np.random.default_rng(2)
    for length in (1, 5, 12):
        given = batch(runner, length, rng)
        for difference in compare(exact.run(given), runner.run(given)):
            assert difference.sqnr > 35, (length, difference)


@pytest.mark.usefixtures("simulator")
def test_text_is_generated_over_a_cache_of_fixed_size(build, batch, tmp_path):
    reference, _ = _emitted(build, "appending", batch, tmp_path)
    runner, exact = backend_for(_TARGET).open(tmp_path), ModelRunner(reference)
    prompt = [5, 9, 33, 60, 7, 12]
    found = list(runner.generate(prompt, 10))
    assert found == list(generate(exact, prompt, 10))
    batch = {"input_ids": np.zeros((1, 17), np.int64), "position_ids": np.arange(17)[None]}
    batch |= {n: np.zeros((1, 2, 0, 16), np.float32) for n in ("past_key_values.0.key", "past_key_values.0.value")}
    with pytest.raises(InputError, match="at most 16 tokens"):
        runner.run(batch)


@pytest.mark.usefixtures("simulator")
def test_what_the_graphs_are_compiled_to_runs_without_them(build, batch, tmp_path):
    lowered = _lowered(build("encoder"), batch)
    for name, options in (("plain", ""), ("compiled", ",context")):
        (tmp_path / name).mkdir()
        backend_for(_TARGET + options).emit(lowered, tmp_path / name)
    (tmp_path / "compiled" / "encoder.onnx").unlink()
    kit = (tmp_path / "compiled" / "android/src/main/kotlin/qc/model/Steps.kt").read_text()
    assert 'listOf("encoder_ctx.onnx", "encoder_ctx_qnn.bin"' in kit
    runners = [backend_for("ort-npu:qnn").open(tmp_path / name) for name in ("plain", "compiled")]
    batch = {"input_ids": np.arange(7)[None], "attention_mask": np.ones((1, 7), np.int64)}
    plain, compiled = (r.run(batch)["last_hidden_state"] for r in runners)
    np.testing.assert_array_equal(plain, compiled)


@pytest.mark.usefixtures("simulator")
def test_a_node_that_the_npu_refuses_is_named(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[1,4] x) => (float[1,4] y) { a = Relu(x)\n y = Erf(a) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="which refuses Erf"):
        NpuSession(tmp_path / "m.onnx", 43)


def test_options_of_the_target_are_read_or_refused():
    backend = backend_for("ort-npu:qnn,8gen3,u8,length=64,height=32")
    assert (backend.soc, backend.bits, backend.length, backend.sizes) == ("8gen3", 8, 64, {"height": 32})
    for options in ("tpu", "qnn,8gen9", "qnn,length=0", "qnn,length="):
        with pytest.raises(InputError, match="Expected"):
            backend_for(f"ort-npu:{options}")


def test_open_sizes_of_other_models_must_be_said(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 23]>
    net (float[batch,3,height,8] x) => (float[batch,3,height,8] y) { y = Relu(x) }"""
    model = Model.of(ir.from_onnx_text(text))
    lowered, _ = PassManager(backend_for("ort-npu:qnn").lowering(), stage="lowering").run(model)
    with pytest.raises(UnsupportedError, match="height=SIZE"):
        backend_for("ort-npu:qnn").emit(lowered, tmp_path)
    backend_for("ort-npu:qnn,height=6").emit(lowered, tmp_path)
    assert tuple(ir.load(tmp_path / "network.onnx").graph.inputs[0].shape) == (1, 3, 6, 8)
