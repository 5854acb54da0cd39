"""The kits for Android over ONNX Runtime, run on a JVM over a stand-in for its binding, which needs Android."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qc.backends.manifest import Manifest, digest_tree
from qc.backends.target import backend_for
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

ROOT = Path(__file__).resolve().parents[2]
BRIDGE = ROOT / "tests" / "android" / "ort"
JARS = [Path("/usr/share/java") / name for name in ("json-android.jar", "kotlin-stdlib.jar")]
PROMPT = [5, 9, 33, 60, 7, 12]  # longer than one piece

pytestmark = pytest.mark.slow


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _emitted(model: Model, target: str, directory: Path) -> Path:
    """An artifact without what a compile measures."""
    rng, backend = np.random.default_rng(0), backend_for(target)
    batch = {
        "input_ids": rng.integers(0, 96, (2, 12)),
        "position_ids": np.tile(np.arange(12), (2, 1)),
        **{f"past_key_values.0.{k}": np.zeros((2, 2, 0, 16), np.float32) for k in ("key", "value")},
    }
    recipe = parse_pipeline("quantize-weights{format=int8,group=0,embedding=float}")
    model, _ = PassManager([*canonicalize_passes(), *recipe]).run(model)
    model, _ = PassManager(backend.lowering(), stage="lowering").run(model, calibration=[batch])
    directory.mkdir()
    backend.emit(Model.of(model), directory)
    manifest = Manifest.of(Model.of(model), backend.target)
    (directory / "manifest.json").write_text(dataclasses.replace(manifest, files=digest_tree(directory)).to_json())
    return directory


def _in_package(file: Path, package: str, folder: Path) -> Path:
    """A copy of a source in another package, so that one run of a compiler takes both kits."""
    folder.mkdir(exist_ok=True)
    copy = folder / file.name
    copy.write_text(file.read_text().replace("qc.model", package))
    return copy


def test_they_generate_what_the_runner_generates_and_refuse_changed_files(build, tmp_path):
    missing = [tool for tool in ("javac", "java", "kotlinc") if shutil.which(tool) is None]
    if missing or not all(j.is_file() for j in JARS):
        pytest.skip(f"needs {', '.join(missing) or JARS[0].name}, which .ci/tools installs")
    targets = {"fixed": "ort-npu:nnapi,prefill=4,cache=16", "whole": "ort-mobile"}
    artifacts = {p: _emitted(build("appending"), target, tmp_path / p) for p, target in targets.items()}
    classes, names = tmp_path / "classes", ("Artifact", "Interface", "Text", "Model", "Steps")
    kits = [
        _in_package(
            artifact / f"android/src/main/kotlin/qc/model/{name}.kt", f"qc.{package}", tmp_path / f"s-{package}"
        )
        for package, artifact in artifacts.items()
        for name in names
    ]
    uses = [_in_package(ROOT / "tests/android/Use.java", f"qc.{p}", tmp_path / f"s-{p}") for p in artifacts]
    path = os.pathsep.join(map(str, (classes, *JARS)))
    for command in (
        ["javac", "-d", classes, *BRIDGE.rglob("*.java")],
        ["kotlinc", "-cp", path, *kits, "-d", classes],
        *(["javac", "-cp", path, "-d", classes / p, u] for p, u in zip(artifacts, uses, strict=True)),
    ):
        done = _run(*command)
        assert done.returncode == 0, done.stdout + done.stderr

    def use(package: str, *prompt: int, version: str = "1.99") -> subprocess.CompletedProcess[str]:
        bridge = os.pathsep.join((sys.executable, str(BRIDGE / "bridge.py")))
        options = [f"-Dbridge={bridge}", f"-Dversion={version}", "-cp", f"{classes / package}{os.pathsep}{path}"]
        return _run("java", *options, "Use", artifacts[package], *map(str, prompt))

    for package, artifact in artifacts.items():
        done = use(package, *PROMPT)
        assert done.returncode == 0, done.stderr
        expected = backend_for(targets[package]).open(artifact, threads=1).generate(PROMPT, 8)
        assert done.stdout.splitlines()[0].split() == [str(token) for token in expected]

    done = use("fixed", 3, version="1.2")
    assert (done.returncode, done.stderr.strip()) == (
        1, "manifest.json: the model needs onnxruntime 1.26 or later, found 1.2",
    )  # fmt: skip
    file = artifacts["fixed"] / "append.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = use("fixed", 3)
    assert done.returncode == 1
    assert done.stderr.startswith("append.onnx: content differs from the manifest's SHA-256"), done.stderr
