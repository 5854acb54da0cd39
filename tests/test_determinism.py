"""Equal compiles give equal bytes, wherever and however they run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from any_onnx_models import CASES

TEXT = "Once upon a time there was a small house by the sea, and in it lived a cat who could count.\n" * 12


def files(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file by its path."""
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def compiled(model: str | Path, out: Path, recipe: str, hash_seed: str, *options: str | Path) -> dict[str, str]:
    """Compiles in a process of its own, from the directory where `out` shall stand."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [Path(sys.executable).parent / "qc", "compile", model, "-o", out.name, "--recipe", recipe, *options]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return files(out)


def twice(model: str | Path, place: Path, recipe: str, *options: str | Path) -> None:
    """Two compiles that differ in directory, name and hash seed agree in every byte."""
    first = compiled(model, place / "here" / "artifact", recipe, "1", *options)
    second = compiled(model, place / "some" / "where" / "else" / "other-name", recipe, "2", *options)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["float", "w4", "w8a8-dynamic"])
def test_the_builtin_model(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    twice("builtin:tiny-llama", tmp_path, recipe, "--calib", tmp_path / "text.txt")


@pytest.mark.parametrize("name", ["nested_subgraphs", "large_weights_inside_a_branch", "local_functions"])
def test_odd_graphs(name: str, tmp_path: Path) -> None:
    model, _ = CASES[name]()
    onnx.save(model, tmp_path / "model.onnx")
    twice(tmp_path / "model.onnx", tmp_path, "float")


@pytest.mark.slow
def test_a_hugging_face_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the import needs torch")
    transformers = pytest.importorskip("transformers", reason="the import needs transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    twice(tmp_path / "model", tmp_path, "w4")


def test_another_place_of_the_model_changes_nothing(tmp_path: Path) -> None:
    model, _ = CASES["newer_opset"]()
    found = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        onnx.save(model, tmp_path / place / "model.onnx")
        found.append(compiled(tmp_path / place / "model.onnx", tmp_path / place / "out", "w4", "0"))
    assert found[0] == found[1]


def test_an_artifact_says_nothing_of_this_machine(tmp_path: Path) -> None:
    model, _ = CASES["newer_opset"]()
    onnx.save(model, tmp_path / "model.onnx")
    compiled(tmp_path / "model.onnx", tmp_path / "out", "w4", "0")
    for file in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert str(tmp_path).encode() not in file.read_bytes(), file
