from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qc.backends.decoding import generate
from qc.backends.reference import ModelRunner
from qc.backends.target import backend_for
from qc.ir.errors import InputError
from qc.ir.model import Model, set_role
from qc.ir.verify import STAGES, check_structure, compare
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

_OPTIONS = ",length=12,prefill=4,cache=16"
_RECIPE = "quantize-weights{format=int8,group=0,embedding=float}"


def _lowered(model: Model, target: str, batch) -> tuple[Model, Model]:
    """The quantized model, and what it is lowered to."""
    rng = np.random.default_rng(1)
    batches = [batch(model, length, rng) for length in (3, 12)]
    model, _ = PassManager(canonicalize_passes()).run(model)
    model, _ = PassManager(parse_pipeline(_RECIPE)).run(model, calibration=batches)
    backend, quantized = backend_for(target), model.clone()
    model, _ = PassManager(backend.lowering(), stage="lowering").run(model, calibration=batches)
    check_structure(model, STAGES[backend.target.stage])
    return quantized, model


@pytest.mark.parametrize("kind", ["appending", "encoder"])
@pytest.mark.parametrize(("target", "decibels"), [("coreml", 50), ("coreml,f32", 80), ("nnapi", 25)])
def test_texts_of_any_length_are_as_in_the_model(build, batch, tmp_path, target, decibels, kind):
    target = f"ort-npu:{target}{_OPTIONS}"
    quantized, lowered = _lowered(build(kind), target, batch)
    exact = ModelRunner(quantized)
    backend_for(target).emit(lowered, tmp_path)
    assert (tmp_path / "model.onnx.data").is_file() == (",f32" not in target and "nnapi" not in target)
    runner = backend_for(target).open(tmp_path)
    rng = np.random.default_rng(2)
    for length in (1, 5, 12):
        given = batch(lowered, length, rng)
        for difference in compare(exact.run(given), runner.run(given)):
            assert difference.sqnr > decibels, (length, difference)


@pytest.mark.parametrize(
    ("target", "left"), [("coreml", {"Gather", "Cast"}), ("coreml,f32", {"Gather"}), ("nnapi", set())]
)
def test_only_look_ups_and_what_comes_in_stay_on_the_processor(build, batch, target, left):
    target = f"ort-npu:{target}{_OPTIONS}"
    _, lowered = _lowered(build("appending"), target, batch)
    found = backend_for(target).coverage(lowered)
    assert {n["op"] for n in found.nodes if not n["on_target"]} == left
    assert found.on_target > 20


@pytest.mark.parametrize("target", ["coreml,f32", "nnapi"])
def test_the_checker_of_the_runtime_agrees_on_what_it_optimizes(build, batch, tmp_path, target):
    tools = pytest.importorskip("onnxruntime.tools.onnx_model_utils")
    import onnxruntime as ort
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    name = f"ort-npu:{target}{_OPTIONS}"
    _, lowered = _lowered(build("appending"), name, batch)
    backend = backend_for(name)
    backend.emit(lowered, tmp_path)
    ours = {n["op"] for n in backend.coverage(lowered).nodes if not n["on_target"]}
    level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    tools.optimize_model(tmp_path / "prefill.onnx", tmp_path / "optimized.onnx", level=level)
    proto = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "optimized.onnx"))
    if target == "nnapi":
        found = checker.check_nnapi_partitions(proto, True)
    else:
        found = checker.check_coreml_partitions(proto, True, "coreml_supported_mlprogram_ops.md")
    assert {op.removeprefix("ai.onnx:") for op in found.unsupported_ops} == ours
    assert found.num_partitions == 1
    assert found.suitability().name == "YES"


def test_options_are_read_or_refused():
    backend = backend_for("ort-npu:coreml,f32,length=64,height=32")
    assert (backend.half, backend.length, backend.sizes) == (False, 64, {"height": 32})
    for options in ("coreml,8gen2", "nnapi,u16", "nnapi,cache=0", "edge"):
        with pytest.raises(InputError, match="Expected"):
            backend_for(f"ort-npu:{options}")


def test_text_is_generated_over_a_cache_of_floats(build, batch, tmp_path):
    target = f"ort-npu:coreml{_OPTIONS}"
    quantized, lowered = _lowered(build("appending"), target, batch)
    backend_for(target).emit(lowered, tmp_path)
    grids = json.loads((tmp_path / "npu.json").read_text())["caches"].values()
    assert {grid["dtype"] for grid in grids} == {"float16"}
    exact, prompt = ModelRunner(quantized), [5, 9, 33, 60, 7, 12]
    found = list(backend_for(target).open(tmp_path).generate(prompt, 8))
    assert found == list(generate(exact, prompt, 8))


def test_weights_and_rows_are_cast_once_and_integers_not(build, batch):
    _, lowered = _lowered(build("appending"), f"ort-npu:coreml{_OPTIONS}", batch)
    nodes = list(lowered.graph)
    made = [
        n for n in nodes if n.op_type in ("MatMul", "Softmax", "Add", "Mul") and n.outputs[0].dtype == ir.DataType.FLOAT
    ]
    assert not [n for n in made if any(v.dtype == ir.DataType.FLOAT16 for v in n.inputs)]
    casts = [n.inputs[0] for n in nodes if n.op_type == "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT16]
    assert len(casts) == len(set(casts))
    assert [v.dtype for v in lowered.graph.outputs] == [ir.DataType.FLOAT] * 3


def test_rows_that_constant_positions_look_up_have_a_fixed_shape():
    text = """<ir_version: 10, opset_import: ["" : 23]>
    encoder (int64[batch,seq] i, float[64,32] table, float[32,32] w) => (float[batch,seq,32] y)
    <int64 zero = {0}, int64 one = {1}, int64[1] axes = {0}> {
        n = Shape <start = 1, end = 2> (i)
        length = Squeeze (n, axes)
        places = Range (zero, length, one)
        r = Gather (table, places)
        e = Gather (table, i)
        x = Add (e, r)
        y = MatMul (x, w) }"""
    model = Model.of(ir.from_onnx_text(text))
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(rng.standard_normal(list(value.shape), np.float32), name=value.name)
        model.graph.register_initializer(value)
    set_role(model.graph.inputs[0], "tokens")
    model, _ = PassManager([*canonicalize_passes(), *parse_pipeline("quantize-weights{format=int8,group=32}")]).run(
        model
    )
    backend = backend_for(f"ort-npu:coreml{_OPTIONS}")
    model, _ = PassManager(backend.lowering(), stage="lowering").run(model)
    found = backend.coverage(Model.of(model))
    assert not [n for n in found.nodes if "not fixed" in str(n["reason"])]
