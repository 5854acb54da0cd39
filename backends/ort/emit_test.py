from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qc.backends.inputs import text_inputs
from qc.backends.ort.emit import MODEL, WEIGHTS, emit, emit_genai
from qc.backends.ort.genai import CONFIG, genai_config
from qc.backends.ort.runner import open_runner
from qc.ir.model import Model
from qc.ir.runtime import Session


def test_an_emitted_model_computes_what_the_model_computes(build, tmp_path):
    model = build("appending")
    emit(model, tmp_path)
    inputs = text_inputs(model.signature, np.array([[3, 5, 7]]))
    expected = Session(model).run(inputs)
    found = open_runner(tmp_path, threads=1).run(inputs)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)


def test_two_emissions_are_equal_to_the_byte(build, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        emit(build("sharing"), tmp_path / name)
    for file in (MODEL, WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_emitting_leaves_the_model_and_its_metadata_as_they_were(build, tmp_path):
    model = build("appending")
    node = model.graph[0]
    node.metadata_props["stack_trace"] = "/home/somebody/model.py"
    emit(model, tmp_path)
    assert node.metadata_props["stack_trace"] == "/home/somebody/model.py"
    assert not isinstance(model.graph.initializers["embed"].const_value, ir.ExternalTensor)


def test_foreign_metadata_is_stripped_and_ours_kept(build, tmp_path):
    model = build("appending")
    model.doc_string = model.graph[0].doc_string = "/home/somebody/model.py"
    model.graph[0].metadata_props.update({"stack_trace": "/home/somebody/model.py", "qc.scope": "layers.0"})
    model.metadata_props["exporter"] = "/home/somebody"
    emit(model, tmp_path)
    assert b"somebody" not in (tmp_path / MODEL).read_bytes()
    written = Model.load(tmp_path)
    assert written.graph[0].metadata_props == {"qc.scope": "layers.0"}
    assert written.provenance == model.provenance
    assert written.signature == model.signature


def test_weights_are_aligned_and_small_ones_stay_in_the_graph(build, tmp_path):
    model = build("appending")
    small = ir.Value(name="small", const_value=ir.tensor(np.ones(3, np.float32), name="small"))
    model.graph.register_initializer(small)
    emit(model, tmp_path)
    proto = onnx.load(tmp_path / MODEL, load_external_data=False)
    stored = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    assert stored.pop("small") == {}
    assert all(entry["location"] == WEIGHTS and int(entry["offset"]) % 64 == 0 for entry in stored.values())


def test_weights_go_on_in_another_file_once_one_is_full(build, tmp_path):
    model = build("appending")
    emit(model, tmp_path, shard=10_000)
    files = sorted(tmp_path.glob("model-*.onnx.data"))
    largest = max(v.const_value.nbytes for v in model.graph.initializers.values())
    assert len(files) > 2
    assert all(f.stat().st_size <= max(10_000, largest) for f in files)
    assert not (tmp_path / WEIGHTS).exists()
    inputs = text_inputs(model.signature, np.array([[3, 5, 7]]))
    found = open_runner(tmp_path, threads=1).run(inputs)
    np.testing.assert_allclose(found["logits"], Session(model).run(inputs)["logits"], atol=1e-5)


def test_a_tensor_that_two_initializers_share_is_stored_once(build, tmp_path):
    model = build("appending")
    place, embed = model.graph.initializers["place"], model.graph.initializers["embed"]
    place.const_value, place.shape = embed.const_value, embed.shape
    emit(model, tmp_path)
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert (tmp_path / WEIGHTS).stat().st_size < total
    inputs = text_inputs(model.signature, np.array([[3, 5]]))
    np.testing.assert_allclose(
        open_runner(tmp_path, threads=1).run(inputs)["logits"], Session(model).run(inputs)["logits"], atol=1e-5
    )


def test_a_weight_on_disk_is_copied_and_sub_byte_types_survive(build, tmp_path):
    model = build("encoder")
    codes = ir.tensor((np.arange(4096).reshape(64, 64) % 16 - 8).astype(np.int8), dtype=ir.DataType.INT4, name="codes")
    value = ir.Value(name="codes", const_value=codes)
    model.graph.register_initializer(value)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        emit(model, tmp_path / name)
        model = Model.load(tmp_path / name)
    found = model.graph.initializers["codes"].const_value
    assert found.dtype == ir.DataType.INT4
    np.testing.assert_array_equal(found.numpy(), codes.numpy())
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()


def test_a_model_without_large_weights_has_no_weights_file(tmp_path):
    model = Model.of(
        ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> g (float[0] x) => (float[0] y) {y = Relu(x)}')
    )
    emit(model, tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    assert open_runner(tmp_path, threads=1).run({"x": np.zeros(0, np.float32)})["y"].shape == (0,)


def test_assets_are_copied_byte_for_byte(build, tmp_path, decoder_files):
    model = Model.of(build("encoder"), assets=decoder_files)
    emit(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == decoder_files["config.json"].read_bytes()
    assert not (tmp_path / CONFIG).exists()


def test_the_genai_file_says_what_the_graph_and_the_configuration_say(build, decoder_files):
    config = genai_config(Model.of(build("sharing"), assets=decoder_files), MODEL)
    assert config["search"]["past_present_share_buffer"] is True
    body = config["model"]
    assert (body["vocab_size"], body["context_length"]) == (96, 48)
    assert (body["bos_token_id"], body["eos_token_id"], body["pad_token_id"]) == (0, 1, 1)
    decoder = body["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (1, 2, 16)
    assert decoder["num_attention_heads"] == 2
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["outputs"]["present_key_names"] == "present.%d.key"


def test_the_buffer_is_shared_only_where_attention_writes_into_it(build):
    assert genai_config(build("appending"), MODEL)["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize("kind", ["plain", "encoder"])
def test_only_a_decoder_with_a_cache_gets_a_genai_file(build, kind):
    assert genai_config(build(kind), MODEL) is None


@pytest.mark.parametrize("kind", ["appending", "sharing"])
def test_onnxruntime_genai_generates_the_same_tokens_as_the_runner(build, kind, tmp_path, decoder_files):
    genai = pytest.importorskip("onnxruntime_genai", reason="the extra [genai] is not installed")
    model = Model.of(build(kind), assets=decoder_files)
    emit(model, tmp_path)
    emit_genai(model, tmp_path)
    expected = list(open_runner(tmp_path, threads=1).generate([3, 5, 7], 12))
    model = genai.Model(str(tmp_path))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=15, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens([3, 5, 7])
    found = []
    while not generator.is_done() and len(found) < 12:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected[: len(found)]
    assert len(found) == 12 or found[-1] == 1
