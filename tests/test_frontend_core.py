"""What reading a model does without torch: the built-in model, and errors that come before any export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from qc.frontend import load
from qc.ir.errors import InputError
from qc.ir.runtime import Session


def test_the_builtin_model_runs_without_torch() -> None:
    script = (
        "import sys, numpy as np; from qc.frontend import load; from qc.ir.runtime import Session; "
        "from qc.ir.probe import probe_inputs; m = load('builtin:tiny-llama'); "
        "out = Session(m).run(probe_inputs(m)[1]); "
        "print(out['logits'].shape, np.isfinite(out['logits']).all(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "(1, 1, 4096) True False", done.stderr


def test_the_builtin_model_holds_its_weights_as_they_are_stored() -> None:
    model = load("builtin:tiny-llama")
    weight = model.graph.initializers["model.embed_tokens.weight"]
    assert weight.dtype == ir.DataType.BFLOAT16
    assert isinstance(weight.const_value, ir.ExternalTensor)
    assert [node.op_type for node, _ in weight.uses()] == ["Cast"]
    assert model.signature.is_decoder
    assert {"tokenizer.json", "config.json"} <= set(model.assets)
    tokens = model.signature.input("tokens")
    assert tokens is not None
    assert tokens.shape == ("batch", "seq")


def test_a_step_with_a_cache_continues_the_prefill() -> None:
    session = Session(load("builtin:tiny-llama"), threads=1)
    ids = np.random.default_rng(0).integers(2, 4096, (1, 9))

    def run(begin: int, end: int, cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return session.run(
            {
                "input_ids": ids[:, begin:end],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(begin, end)[None],
                **{k.replace("present", "past_key_values"): v for k, v in cache.items() if k.startswith("present")},
            }
        )

    empty = {f"present.{i}.{part}": np.zeros((1, 4, 0, 32), np.float32) for i in range(6) for part in ("key", "value")}
    whole = run(0, 9, empty)["logits"]
    stepped = run(8, 9, run(0, 8, empty))["logits"]
    np.testing.assert_allclose(stepped[:, 0], whole[:, -1], atol=1e-4)


def directory_with(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros((4, 4), np.float32)}, path / "model.safetensors")
    return path


def test_a_truncated_checkpoint_is_refused_before_the_export(tmp_path: Path) -> None:
    hf = directory_with(tmp_path / "hf", model_type="llama")
    os.truncate(hf / "model.safetensors", 100)
    with pytest.raises(InputError, match=r"model\.safetensors.*100"):
        load(hf)


def test_missing_torch_names_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = directory_with(tmp_path / "hf", model_type="llama", architectures=["LlamaForCausalLM"])
    for package in ("torch", "transformers"):
        (tmp_path / "absent").mkdir(exist_ok=True)
        (tmp_path / f"absent/{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"qc-compiler\[torch\]"):
        load(hf)


def test_a_directory_without_weights_is_an_input_error(tmp_path: Path) -> None:
    hf = directory_with(tmp_path / "hf", model_type="llama")
    (hf / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(hf)
