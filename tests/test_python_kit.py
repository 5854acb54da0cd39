"""The kit for Python: without qc, it says what qc says, and refuses files that were changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qc.backends.artifact import Artifact, ArtifactWriter
from qc.backends.manifest import Manifest
from qc.backends.target import backend_for
from qc.backends.tokenizer import Tokenizer
from qc.frontend import load
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline

PROMPT = "It was a dark and stormy night, and"

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend, out = backend_for("ort-cpu"), tmp_path_factory.mktemp("python") / "decoder"
    steps = [Step(p, optional=True) for p in canonicalize_passes()]
    steps += parse_pipeline("quantize-weights{format=int4,group=32}")
    quantized, _ = PassManager(steps, verify=False).run(load("builtin:tiny-llama"))
    lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(quantized)
    with ArtifactWriter(out) as writer:
        backend.emit(Model.of(lowered), writer.directory)
        writer.describe(Manifest.of(Model.of(lowered), backend.target))
    return out


@pytest.fixture
def program(decoder: Path, tmp_path: Path) -> Program:
    """Runs the kit as a program where qc cannot be imported."""
    shutil.copytree(decoder, tmp_path / "app")
    (tmp_path / "qc.py").write_text("raise ImportError")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, tmp_path / "app" / "python" / "model.py", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": str(tmp_path)}
        )

    return run


def test_it_generates_what_qc_generates(decoder: Path, program: Program) -> None:
    done = program(PROMPT)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer(decoder)
    tokens = list(Artifact.open(decoder).runner().generate(tokenizer.encode(PROMPT), 64, tokenizer.stop))
    assert done.stdout == tokenizer.decode(tokens) + "\n"


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _ask_for_more(file: Path) -> None:
    file.write_text(file.read_text().replace('"minimum": "1.26"', '"minimum": "99.1"'))


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("model.onnx.data", _cut, "bytes, found"),
        ("model.onnx.data", _change, "content differs from the manifest's SHA-256"),
        ("model.onnx", _change, "content differs from the manifest's SHA-256"),
        ("tokenizer.json", Path.unlink, "missing at "),
        ("manifest.json", _ask_for_more, "the model needs onnxruntime 99.1 or later, found "),
        ("manifest.json", Path.unlink, "cannot be read"),
    ],
)
def test_it_refuses_and_names_the_file(
    file: str, spoil: Callable[[Path], None], message: str, program: Program, tmp_path: Path
) -> None:
    spoil(tmp_path / "app" / file)
    done = program(PROMPT)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{file}: ")
    assert message in done.stderr
