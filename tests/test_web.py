"""The target ort-web: its kit computes what Python does, in a browser and in Node, and refuses what was changed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qc.backends.artifact import Artifact, ArtifactWriter
from qc.backends.evaluate import embedding
from qc.backends.inputs import text_inputs
from qc.backends.manifest import Manifest
from qc.backends.target import backend_for
from qc.backends.tokenizer import Tokenizer
from qc.frontend import load
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, steps_of
from qc.recipes import load_recipe

Script = Callable[..., dict[str, Any]]

PROMPT = """"No," said 'é' 😀 日本: It was a dark and stormy night , and"""
SENTENCE = "A leaf turns sunlight, water and carbon dioxide into sugar."
CLOSE = 1e-4
"""What the integer path of WebAssembly may differ by: it rounds to the same codes, float sums differ."""


def _quantized(model: Model) -> Model:
    """In the target's own recipe."""
    steps = [*(Step(p, optional=True) for p in canonicalize_passes()), *steps_of(load_recipe("w8a8-dynamic").passes)]
    return Model.of(PassManager(steps, verify=False).run(model)[0])


def _artifact(quantized: Model, out: Path, target: str = "ort-web") -> Path:
    """An artifact for the web, without the measurements of a compile."""
    backend = backend_for(target)
    lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(quantized)
    with ArtifactWriter(out) as writer:
        backend.emit(Model.of(lowered), writer.directory)
        writer.describe(Manifest.of(Model.of(lowered), backend.target, recipe="w8a8-dynamic"))
    return out


@pytest.fixture(scope="session")
def modules(root: Path) -> Path:
    """The Node packages that `.ci/tools` installs."""
    found = root / "build" / "node" / "node_modules"
    if shutil.which("node") is None or not (found / "onnxruntime-web").is_dir():
        pytest.skip("needs node and the packages that .ci/tools installs")
    return found


@pytest.fixture(scope="session")
def model() -> Model:
    return _quantized(load("builtin:tiny-llama"))


@pytest.fixture(scope="session")
def decoder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _artifact(model.clone(), tmp_path_factory.mktemp("web") / "decoder")


@pytest.fixture(scope="session")
def sentences(encoder: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _artifact(_quantized(encoder.clone()), tmp_path_factory.mktemp("web") / "encoder")


@pytest.fixture
def script(root: Path, modules: Path, tmp_path: Path) -> Script:
    """Runs one of the scripts beside this file on a copy of an artifact, with the runtime installed in its kit."""

    def run(name: str, artifact: Path, *arguments: str | Path, spoil: Callable[[Path], None] | None = None) -> Any:
        copy = tmp_path / "app"
        shutil.copytree(artifact, copy)
        (copy / "web" / "node_modules").symlink_to(modules)
        if spoil is not None:
            spoil(copy)
        shutil.copy(root / "tests" / "web" / name, tmp_path)
        if not (tmp_path / "node_modules").exists():
            (tmp_path / "node_modules").symlink_to(modules)
        done = subprocess.run(
            ["node", tmp_path / name, copy, *arguments], capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium, which .ci/tools installs")
    return found


def _picture(root: Path, name: str) -> Path:
    """Where a screenshot is kept for people to look at."""
    folder = root / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _expected_vector(artifact: Path) -> np.ndarray:
    runner = Artifact.open(artifact).runner(threads=1)
    inputs = text_inputs(runner.signature, np.array([Tokenizer(artifact).encode_sentence(SENTENCE)]))
    return embedding(runner.run(inputs)["last_hidden_state"], inputs["attention_mask"], "mean")[0]


def test_the_module_in_node_generates_what_python_generates(decoder: Path, script: Script) -> None:
    found = script("load.mjs", decoder, PROMPT)
    tokenizer = Tokenizer(decoder)
    assert found["prompt"] == tokenizer.encode(PROMPT)
    assert found["again"] == tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT
    expected = list(Artifact.open(decoder).runner(threads=1).generate(found["prompt"], 12, tokenizer.stop))
    assert found["tokens"] == expected
    assert found["text"] == tokenizer.decode(expected)
    assert found["progress"] == sorted(found["progress"])
    assert found["progress"][-1] == 1.0


@pytest.mark.slow
def test_the_page_searches_sentences_with_the_numbers_of_python(sentences: Path, script: Script, root: Path) -> None:
    found = script("browse.mjs", sentences, _picture(root, "web-encoder.png"), _chromium(), SENTENCE)
    assert (found["errors"], found["failure"], found["foreign"]) == ([], "", [])
    assert found["output"].startswith("A leaf turns sunlight"), "the nearest to: How do plants make energy?"
    np.testing.assert_allclose(found["numbers"], _expected_vector(sentences), atol=CLOSE)


@pytest.mark.slow
def test_the_module_in_node_embeds_with_the_numbers_of_python(sentences: Path, script: Script) -> None:
    found = script("load.mjs", sentences, SENTENCE)
    np.testing.assert_allclose(found["vector"], _expected_vector(sentences), atol=CLOSE)


def _flip(file: str) -> Callable[[Path], None]:
    def spoil(artifact: Path) -> None:
        content = bytearray((artifact / file).read_bytes())
        content[len(content) // 2] ^= 1
        (artifact / file).write_bytes(content)

    return spoil


def _cut(artifact: Path) -> None:
    file = artifact / "model-00001.onnx.data"
    file.write_bytes(file.read_bytes()[:-1])


def _forget_tokenizer(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))


REFUSALS = {
    "a changed weight": (_flip("model-00001.onnx.data"), "", "model-00001.onnx.data", "SHA-256"),
    "a changed graph": (_flip("model.onnx"), "", "model.onnx", "SHA-256"),
    "a weight cut short": (_cut, "", "model-00001.onnx.data", "bytes, found"),
    "no tokenizer": (lambda a: (a / "tokenizer.json").unlink(), "", "tokenizer.json", "missing"),
    "no tokenizer listed": (_forget_tokenizer, "", "tokenizer.json", "missing in the manifest"),
    "an old runtime": (lambda _: None, "1.19.2", "manifest.json", "needs onnxruntime 1.26 or later, found 1.19.2"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_module_refuses_and_names_the_file(case: str, decoder: Path, script: Script) -> None:
    spoil, version, file, message = REFUSALS[case]
    found = script("load.mjs", decoder, PROMPT, *([version] if version else []), spoil=spoil)
    assert found["file"] == file
    assert found["message"].startswith(f"{file}: ")
    assert message in found["message"]


def test_the_page_generates_in_a_browser_and_asks_nobody_else(
    model: Model, modules: Path, root: Path, tmp_path: Path
) -> None:
    """The page takes its packages along: nothing is installed beside it."""
    chromium = _chromium()
    artifact = _artifact(model.clone(), tmp_path / "app", f"ort-web:modules={modules}")
    script = tmp_path / "browse.mjs"
    shutil.copy(root / "tests" / "web" / "browse.mjs", script)
    (tmp_path / "node_modules").symlink_to(modules)
    picture = _picture(root, "web-decoder.png")
    done = subprocess.run(
        ["node", script, artifact, picture, chromium, PROMPT], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["errors"], found["failure"], found["foreign"]) == ([], "", [])
    assert found["progress"] == sorted(found["progress"])
    assert found["progress"][-1] == 100
    tokens = Tokenizer(artifact).encode(PROMPT)
    assert found["numbers"] == list(Artifact.open(artifact).runner(threads=1).generate(tokens, 16))
    assert found["output"].startswith("Once upon a time, there was")
    assert len(found["output"]) > 100
    Artifact.open(artifact).verify()


def test_other_packages_than_the_kit_is_made_for_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Expected @huggingface/tokenizers \S+ in .*, found none. Run `npm install"):
        _artifact(model.clone(), tmp_path / "app", f"ort-web:modules={tmp_path}")


def test_the_types_know_the_names_of_this_model(decoder: Path, modules: Path, root: Path, tmp_path: Path) -> None:
    use = (root / "tests" / "web" / "use.mts").read_text().replace("MODULE", "./web/model.mjs")
    shutil.copytree(decoder / "web", tmp_path / "web")
    (tmp_path / "use.mts").write_text(use)
    options = ["--noEmit", "--strict", "--target", "esnext", "--module", "nodenext", "--skipLibCheck"]
    done = subprocess.run(
        ["node", modules / "typescript" / "bin" / "tsc", *options, "use.mts"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
