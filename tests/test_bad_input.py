"""Whatever a user gets wrong: a clear message, the documented exit code, and nothing of theirs touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qc.cli import main

TOKENIZER_TEXT = "Once upon a time there was a small house by the sea, and in it lived a cat who could count.\n" * 12


def mlp(path: Path, *, poison: float | None = None, external: bool = False) -> Path:
    """Writes a small model from x [n, 64] to y."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    if poison is not None:
        second[3, 5] = poison
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "second"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """Writes a safetensors file by hand: name -> type, shape, bytes."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(d for _, _, d in tensors.values()))
    return path


def digest(path: Path) -> str:
    """Of a file, or of all files and names under a directory."""
    sha = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        sha.update(file.relative_to(path.parent).as_posix().encode())
        if file.is_file():
            sha.update(file.read_bytes())
    return sha.hexdigest()


def hidden(directory: Path) -> list[str]:
    """What a compile would leave behind."""
    return [p.name for p in directory.iterdir() if p.name.startswith(".")]


def outcome(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what was said on standard error, in this process."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def refused(arguments: list[str | Path], words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> None:
    """The command fails with `code`, says all `words`, and shows no traceback."""
    found, said = outcome(arguments, capsys)
    assert found == code, said
    assert "Traceback" not in said, said
    flat = " ".join(said.split())
    missing = [w for w in words if w not in flat]
    assert not missing, f"expected {missing} in:\n{said}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, an artifact of it, and other things."""
    root = tmp_path_factory.mktemp("bad")
    mlp(root / "model.onnx")
    assert main(["compile", str(root / "model.onnx"), "-o", str(root / "artifact"), "--recipe", "float", "--json"]) == 0
    (root / "foreign").mkdir()
    (root / "foreign" / "letter.txt").write_text("mine")
    (root / "file").write_text("mine")
    (root / "broken.yaml").write_text("passes: [unclosed")
    (root / "list.yaml").write_text("- float")
    (root / "unknown.yaml").write_text("passes:\n  - make-faster: {}\n")
    (root / "option.yaml").write_text("passes:\n  - quantize-weights: {colour: red}\n")
    (root / "extra.yaml").write_text("passes: []\nnotes: hi\n")
    (root / "twice.yaml").write_text("passes:\n  - {quantize-weights: {}, quantize-activations: {}}\n")
    (root / "bytes.yaml").write_bytes(b"\xff\xfe\x00passes")
    (root / "model.txt").write_text("not a model")
    (root / "empty").mkdir()
    (root / "truncated.onnx").write_bytes((root / "model.onnx").read_bytes()[:20000])
    (root / "garbage.onnx").write_bytes(bytes(range(256)) * 8)
    (root / "zero.onnx").write_bytes(b"")
    (root / "bad.pt2").write_bytes(b"PK\x03\x04 no")
    mlp(root / "external" / "model.onnx", external=True)
    (root / "external" / "weights.bin").write_bytes(b"short")
    mlp(root / "lost" / "model.onnx", external=True)
    (root / "lost" / "weights.bin").unlink()
    mlp(root / "nan.onnx", poison=np.nan)
    mlp(root / "inf.onnx", poison=np.inf)
    return root


# what is wrong -> command line ({d} is the directory above), exit code, words in the message
TABLE: dict[str, tuple[str, int, list[str]]] = {
    "no model": ("compile {d}/nothing -o {d}/out", 2, ["nothing", "found nothing there", "builtin:NAME"]),
    "no such built-in": ("compile builtin:huge -o {d}/out", 2, ["tiny-llama", "'huge'"]),
    "not a model": ("compile {d}/model.txt -o {d}/out", 2, ["model.txt", ".onnx", "'.txt'"]),
    "an empty directory": ("compile {d}/empty -o {d}/out", 2, ["config.json or model.onnx", "empty"]),
    "a truncated graph": ("compile {d}/truncated.onnx -o {d}/out", 2, ["truncated.onnx", "truncated; copy it again"]),
    "no graph at all": ("compile {d}/garbage.onnx -o {d}/out", 2, ["garbage.onnx", "copy it again"]),
    "an empty file": ("compile {d}/zero.onnx -o {d}/out", 2, ["zero.onnx", "copy it again"]),
    "weights too short": ("compile {d}/external/model.onnx -o {d}/out", 2, ["weights.bin", "too short"]),
    "weights missing": ("compile {d}/lost/model.onnx -o {d}/out", 2, ["weights.bin", "no such file"]),
    "a damaged program": ("compile {d}/bad.pt2 -o {d}/out", 2, ["bad.pt2"]),
    "NaN in float": ("compile {d}/nan.onnx -o {d}/out --recipe float", 2, ["NaN", "'second'", "Check the checkpoint"]),
    "NaN quantized": ("compile {d}/nan.onnx -o {d}/out --recipe w8", 2, ["NaN", "'second'"]),
    "infinity quantized": ("compile {d}/inf.onnx -o {d}/out --recipe w8", 2, ["infinity", "'second'", "--exclude"]),
    "output holds other files": ("compile {d}/model.onnx -o {d}/foreign", 2, ["letter.txt", "another output"]),
    "not even with force": ("compile {d}/model.onnx -o {d}/foreign --force", 2, ["never removed", "letter.txt"]),
    "an artifact without force": ("compile {d}/model.onnx -o {d}/artifact", 2, ["already stands", "--force"]),
    "output is a file": ("compile {d}/model.onnx -o {d}/file", 2, ["directory or nothing", "found a file"]),
    "output below a file": ("compile {d}/model.onnx -o {d}/file/deep", 2, ["file"]),
    "no output": ("compile {d}/model.onnx", 2, ["-o/--output"]),
    "no such recipe": ("compile {d}/model.onnx -o {d}/out --recipe w3", 2, ["w4", "'w3'", "qc recipes"]),
    "no such recipe file": ("compile {d}/model.onnx -o {d}/out --recipe {d}/no.yaml", 2, ["no.yaml", "found none"]),
    "broken YAML": ("compile {d}/model.onnx -o {d}/out --recipe {d}/broken.yaml", 2, ["broken.yaml", "not valid YAML"]),
    "YAML of another shape": ("compile {d}/model.onnx -o {d}/out --recipe {d}/list.yaml", 2, ["passes", "list.yaml"]),
    "a pass that is none": ("compile {d}/model.onnx -o {d}/out --recipe {d}/unknown.yaml", 2, ["'make-faster'"]),
    "an option that is none": ("compile {d}/model.onnx -o {d}/out --recipe {d}/option.yaml", 2, ["'colour'", "format"]),
    "an unknown key": ("compile {d}/model.onnx -o {d}/out --recipe {d}/extra.yaml", 2, ["about, passes, source"]),
    "two passes in one entry": ("compile {d}/model.onnx -o {d}/out --recipe {d}/twice.yaml", 2, ["one pass per entry"]),
    "a recipe in bytes": ("compile {d}/model.onnx -o {d}/out --recipe {d}/bytes.yaml", 2, ["bytes.yaml"]),
    "an unknown pass": ("compile {d}/model.onnx -o {d}/out --passes faster", 2, ["'faster'", "quantize-weights"]),
    "unbalanced braces": ("compile {d}/model.onnx -o {d}/out --passes quantize-weights{", 2, ["braces"]),
    "no value": ("compile {d}/model.onnx -o {d}/out --passes quantize-weights{format}", 2, ["option=value"]),
    "a bad value": ("compile {d}/model.onnx -o {d}/out --passes quantize-weights{group=many}", 2, ["int", "'many'"]),
    "a format that is none": ("compile {d}/model.onnx -o {d}/out --passes quantize-weights{format=int9}", 2, ["bits"]),
    "recipe and passes": ("compile {d}/model.onnx -o {d}/out --recipe w4 --passes x", 2, ["not allowed with"]),
    "no such target": ("compile {d}/model.onnx -o {d}/out --target toaster", 2, ["ort-cpu", "'toaster'", "qc targets"]),
    "a malformed setting": ("compile {d}/model.onnx -o {d}/out --set group", 2, ["pass.option=value", "'group'"]),
    "a setting of no pass": ("compile {d}/model.onnx -o {d}/out --set prune.x=1", 2, ["'prune'", "quantize-weights"]),
    "a setting of no option": ("compile {d}/model.onnx -o {d}/out --set quantize-weights.x=1", 2, ["'x'", "group"]),
    "a setting of no target": ("compile {d}/model.onnx -o {d}/out --set target.x=1", 2, ["'target'"]),
    "nothing excluded": ("compile {d}/model.onnx -o {d}/out --exclude layerz", 2, ["layerz", "match a weight"]),
    "no regular expression": ("compile {d}/model.onnx -o {d}/out --exclude [", 2, ["regular expression", "'['"]),
    "memory that is no size": ("compile {d}/model.onnx -o {d}/out --memory lots", 2, ["8G", "'lots'"]),
    "negative memory": ("compile {d}/model.onnx -o {d}/out --memory -1G", 2, ["--memory"]),
    "endless memory": ("compile {d}/model.onnx -o {d}/out --memory infG", 2, ["'infG'"]),
    "too little memory": ("compile {d}/model.onnx -o {d}/out --memory 1M", 2, ["needs about", "--memory", "1 MiB"]),
    "a seed that is none": ("compile {d}/model.onnx -o {d}/out --seed x", 2, ["--seed"]),
    "a negative seed": ("compile {d}/model.onnx -o {d}/out --seed -1", 2, ["--seed"]),
    "no such text": ("compile builtin:tiny-llama -o {d}/out --calib {d}/no.txt", 2, ["no.txt", "--calib"]),
    "text for what reads none": ("compile {d}/model.onnx -o {d}/out --calib {d}/file", 2, ["no tokens", ".npz"]),
    "no such command": ("squeeze {d}/model.onnx", 2, ["invalid choice"]),
    "no such option": ("compile {d}/model.onnx -o {d}/out --fast", 2, ["--fast"]),
    "a number below zero": ("bench {d}/artifact --threads -2", 2, ["0 or more"]),
    "no artifact to run": ("run {d}/empty --prompt x", 2, ["manifest.json", "qc compile"]),
    "nothing to run": ("run {d}/nowhere --prompt x", 2, ["nowhere", "found none"]),
    "a prompt for a network of numbers": ("run {d}/artifact --prompt x", 2, ["generates no text", "--input"]),
    "input without output": ("run {d}/artifact --input {d}/in.npz", 2, ["--output"]),
    "no such input": ("run {d}/artifact --input {d}/in.npz --output {d}/out.npz", 2, ["in.npz", "found none"]),
    "a text as arrays": ("run {d}/artifact --input {d}/file --output {d}/out.npz", 2, ["cannot be read"]),
    "no model to evaluate": ("eval {d}/nothing", 2, ["found nothing there"]),
    "text to measure what reads none": ("eval {d}/artifact --text {d}/file", 2, ["no tokens", ".npz"]),
    "no text": ("eval {d}/artifact", 2, ["--text", "--input"]),
    "nothing to bench": ("bench {d}/foreign", 2, ["manifest.json"]),
    "nothing to compare with": ("bench {d}/artifact --vs {d}/foreign", 2, ["foreign", "manifest.json"]),
    "nothing to verify": ("verify {d}/model.onnx", 2, ["artifact directory"]),
    "nothing to report": ("report {d}/foreign", 2, ["foreign"]),
    "nothing to inspect": ("inspect {d}/nothing", 2, ["found nothing there"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_named(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, code, words = TABLE[name]
    before = digest(place)
    refused(
        [a.replace("{d}", str(place)).replace("{{", "{").replace("}}", "}") for a in line.split()], words, capsys, code
    )
    assert digest(place) == before


ARRAYS: dict[str, tuple[dict[str, np.ndarray], list[str]]] = {
    "missing": ({"other": np.zeros(1)}, ["x: expected float [n, 64], found nothing"]),
    "wrong type": ({"x": np.zeros((2, 64))}, ["expected float [n, 64], found float64 [2, 64]"]),
    "wrong width": ({"x": np.zeros((2, 63), np.float32)}, ["found float32 [2, 63]"]),
    "wrong rank": ({"x": np.zeros(64, np.float32)}, ["found float32 [64]"]),
    "pickled": ({"x": np.array([{"evil": 1}], object)}, ["plain arrays", "object"]),
}


@pytest.mark.parametrize("command", ["run", "eval"])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_do_not_fit_are_named(
    name: str, command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, words = ARRAYS[name]
    np.savez(tmp_path / "in.npz", **arrays)
    (tmp_path / "out.npz").write_text("before")
    more = ["--output", tmp_path / "out.npz"] if command == "run" else ["--reference", place / "model.onnx"]
    refused([command, place / "artifact", "--input", tmp_path / "in.npz", *more], words, capsys)
    assert (tmp_path / "out.npz").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "a", "--top-p", "1.5"], ["top-p above 0 and up to 1", "1.5"]),
        (["--prompt", "a", "--temperature=-1"], ["temperature of 0", "-1"]),
        (["--input", "in.npz", "--output", "out.npz", "--top-k", "3"], ["--prompt together with", "--top-k"]),
        (["--prompt", "a", "--seed", "1"], ["generates no text"]),
    ],
)
def test_ways_to_draw_that_do_not_fit_are_named(
    options: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["run", place / "artifact", *options], words, capsys)


def damage_weights(artifact: Path) -> None:
    file = artifact / "model.onnx.data"
    file.write_bytes(file.read_bytes()[:100])


def damage_graph(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"\x00garbage")


def damage_manifest(artifact: Path) -> None:
    (artifact / "manifest.json").write_text('{"format_version": 1, "tar')


def empty_manifest(artifact: Path) -> None:
    (artifact / "manifest.json").write_text("[]")


def lose_graph(artifact: Path) -> None:
    (artifact / "model.onnx").unlink()


@pytest.mark.parametrize("damage", [damage_weights, damage_graph, damage_manifest, empty_manifest, lose_graph])
@pytest.mark.parametrize("command", ["run", "eval", "bench", "verify", "inspect"])
def test_a_damaged_artifact_is_refused(
    damage: Callable[[Path], None], command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(place / "artifact", artifact)
    damage(artifact)
    np.savez(tmp_path / "in.npz", x=np.zeros((2, 64), np.float32))
    more = {
        "run": ["--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz"],
        "eval": ["--input", tmp_path / "in.npz", "--reference", place / "model.onnx"],
        "inspect": ["--sizes"],
    }.get(command, [])
    if command == "inspect" and "manifest" in damage.__name__:
        return  # it looks into the graph, which is sound
    refused([command, artifact, *more], [str(artifact)], capsys)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("text", ['{"summary": 1}', "[]", "{", ""])
def test_a_damaged_report_is_refused(
    text: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "artifact", tmp_path / "artifact")
    (tmp_path / "artifact" / "report.json").write_text(text)
    refused(["report", tmp_path / "artifact"], ["report.json"], capsys)


def test_an_artifact_with_files_of_the_user_is_never_replaced(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "artifact", tmp_path / "artifact")
    (tmp_path / "artifact" / "notes.txt").write_text("mine")
    before = digest(tmp_path / "artifact")
    refused(["compile", place / "model.onnx", "-o", tmp_path / "artifact", "--force"], ["notes.txt"], capsys)
    assert digest(tmp_path / "artifact") == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory that even root cannot write")
def test_a_place_that_is_not_writable_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        ["compile", place / "model.onnx", "-o", "/proc/out"], ["writable directory at /proc", "another output"], capsys
    )


CHECKPOINT = {"a.weight": ("F32", [2, 2], bytes(16))}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def no_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 32)


def wrong_type(file: Path) -> None:
    safetensors(file, {"a.weight": ("F4", [2, 2], bytes(2))})


def wrong_shape(file: Path) -> None:
    safetensors(file, {"a.weight": ("F32", [2, 3], bytes(16))})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ["truncated", "download it again"]),
        (no_header, ["not a complete safetensors file"]),
        (wrong_type, ["'F4'", "F32"]),
        (wrong_shape, ["'a.weight'", "(2, 3)"]),
        (Path.unlink, ["model.safetensors"]),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_traced(
    damage: Callable[[Path], None], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    damage(safetensors(tmp_path / "model.safetensors", CHECKPOINT))
    refused(["compile", tmp_path, "-o", tmp_path / "out"], words, capsys)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("where", ["store", "artifact"])
def test_a_full_disk_leaves_nothing_and_touches_nothing(
    where: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "artifact", tmp_path / "out")
    before = digest(tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "store":
        import onnx_ir as ir

        monkeypatch.setattr(ir.Tensor, "tofile", full)
    else:
        monkeypatch.setattr("qc.backends.ort.emit._write", full)
    refused(
        ["compile", place / "model.onnx", "-o", tmp_path / "out", "--force", "--recipe", "w8"],
        ["No space left on device", "Free some"], capsys,
    )  # fmt: skip
    assert digest(tmp_path / "out") == before
    assert hidden(tmp_path) == []


def test_too_little_space_is_known_before_the_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    refused(["compile", place / "model.onnx", "-o", tmp_path / "out"], ["disk space", "found 1 MiB"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_bug_of_ours_says_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("nobody expected this")

    monkeypatch.setattr("qc.compiler.make_plan", broken)
    code, said = outcome(["compile", place / "model.onnx", "-o", tmp_path / "out"], capsys)
    assert code == 1
    assert "Traceback" in said
    assert "nobody expected this" in said
    assert "this is a bug of qc, please report" in said
    assert list(tmp_path.iterdir()) == []


def start(arguments: list[str | Path], directory: Path) -> subprocess.Popen[str]:
    """Starts the command line in a process of its own."""
    command = [Path(sys.executable).parent / "qc", *arguments]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], word: str) -> str:
    """Reads standard error up to a line that starts with `word`."""
    assert process.stderr is not None
    said = ""
    while not said.splitlines()[-1:] or not said.splitlines()[-1].startswith(word):
        line = process.stderr.readline()
        assert line, f"ended before {word!r}:\n{said}"
        said += line
    return said


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is measured in no time."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TOKENIZER_TEXT)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["import", "recipe", "lower", "measure"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compile_leaves_what_was_there(
    moment: str, number: signal.Signals, place: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "artifact", tmp_path / "out")
    before = digest(tmp_path / "out")
    process = start(["compile", "builtin:tiny-llama", "-o", "out", "--force", "--calib", text], tmp_path)
    wait_for(process, moment)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert hidden(tmp_path) == []
    assert digest(tmp_path / "out") == before


@pytest.mark.slow
def test_what_a_killed_compile_left_is_removed_by_the_next(place: Path, text: Path, tmp_path: Path) -> None:
    process = start(["compile", "builtin:tiny-llama", "-o", "out", "--calib", text], tmp_path)
    wait_for(process, "measure")
    process.kill()
    process.communicate()
    left = hidden(tmp_path)
    assert any(name.startswith(".out.work-") for name in left)
    assert any(name.startswith(".out.tmp-") for name in left)
    for name in left:
        os.utime(tmp_path / name, (time.time() - 60,) * 2)
    assert main(["compile", str(place / "model.onnx"), "-o", str(tmp_path / "out"), "--recipe", "float", "--json"]) == 0
    assert hidden(tmp_path) == []


def test_a_reader_that_goes_away_is_no_error(place: Path, tmp_path: Path) -> None:
    process = start(["passes"], tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=60) == 0


def test_a_model_that_the_runtime_refuses_is_unsupported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "their.own" : 1]>
    g (float[n,4] x) => (float[n,4] y) { y = their.own.Magic(x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    refused(["compile", tmp_path / "model.onnx", "-o", tmp_path / "out"], ["their.own", "Magic"], capsys, code=3)


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Wide enough that no message is wrapped within a word."""
    held = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "400"
    yield
    if held is None:
        del os.environ["COLUMNS"]
    else:
        os.environ["COLUMNS"] = held
