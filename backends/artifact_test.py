from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
from pathlib import Path

import pytest

from qc.backends import artifact as module
from qc.backends.artifact import Artifact, ArtifactWriter
from qc.backends.manifest import MANIFEST, Manifest, digest_tree, dump_json, source_files
from qc.backends.ort.emit import emit
from qc.backends.target import Target
from qc.ir.errors import InputError, InternalError, UnsupportedError

TARGET = Target("ort-cpu", "a test", ("onnxruntime", "1.0"), ())


@pytest.fixture
def describe(build):
    model = build("appending")
    return lambda **facts: Manifest.of(model, TARGET, **facts)


@pytest.fixture
def write(describe):
    def write_artifact(out: Path, content: str = "weights", *, force: bool = False, **facts) -> None:
        with ArtifactWriter(out, force=force) as writer:
            (writer.directory / "model.onnx").write_text(content)
            (writer.directory / "sub").mkdir()
            (writer.directory / "sub" / "extra.bin").write_bytes(b"12")
            writer.describe(describe(**facts))

    return write_artifact


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_an_artifact_appears_complete_and_proves_itself(write, tmp_path):
    out = tmp_path / "new" / "parent" / "out"
    write(out, recipe="w4", seed=7, accuracy={"kl": 0.25})
    found = Artifact.open(out)
    found.verify()
    assert sorted(found.manifest.files) == ["model.onnx", "sub/extra.bin"]
    assert found.manifest.sizes["artifact"] == len("weights") + 2
    assert (found.manifest.recipe, found.manifest.seed, found.manifest.accuracy) == ("w4", 7, {"kl": 0.25})
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_the_signature_survives_the_manifest(write, build, tmp_path):
    write(tmp_path / "out")
    assert Artifact.open(tmp_path / "out").signature == build("appending").signature


def test_equal_compiles_give_equal_bytes(write, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, accuracy={"ppl": 1.5, "kl": 0.1})
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_an_empty_directory_is_filled(write, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out)
    Artifact.open(out).verify()


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("old", [False, True])
def test_a_compile_that_stops_leaves_everything_as_it_was(write, tmp_path, error, old):
    out = tmp_path / "deep" / "out"
    if old:
        write(out, "old")
    before = snapshot(tmp_path)
    with pytest.raises(type(error)), ArtifactWriter(out, force=True) as writer:  # noqa: PT012
        (writer.directory / "model.onnx").write_text("half")
        raise error
    assert snapshot(tmp_path) == before
    assert old or not out.parent.exists()
    assert not old or [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_interrupt_during_the_swap_puts_the_old_artifact_back(write, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "old")
    before = snapshot(tmp_path)
    rename = os.rename
    calls = []

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, "new", force=True)
    assert snapshot(tmp_path) == before


def test_force_replaces_an_artifact(write, tmp_path):
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "model.onnx").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_artifact_is_not_replaced_unasked(write, tmp_path):
    write(tmp_path / "out")
    with pytest.raises(InputError, match="--force"):
        ArtifactWriter(tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_directory_is_never_touched(tmp_path, force):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        ArtifactWriter(out, force=force)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_foreign_manifest_does_not_make_a_directory_ours(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text('{"name": "a browser extension", "manifest_version": 3}')
    with pytest.raises(InputError, match="format version"):
        ArtifactWriter(out, force=True)


def test_a_file_that_a_user_put_into_an_artifact_is_never_removed(write, tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out" / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"sub/notes\.txt"):
        ArtifactWriter(tmp_path / "out", force=True)


def test_what_appears_at_the_output_while_compiling_is_kept(describe, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="thesis"), ArtifactWriter(out) as writer:  # noqa: PT012
        writer.describe(describe())
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    assert snapshot(tmp_path) == {"out/thesis.tex": b"years of work"}


def test_a_file_at_the_output_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="found a file"):
        ArtifactWriter(tmp_path / "out", force=True)


def test_a_parent_that_is_a_file_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Choose another"), ArtifactWriter(tmp_path / "file" / "out"):
        pass


def test_an_output_through_a_link_replaces_what_the_link_names(write, tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.onnx").read_text() == "new"


class _FullDisk(io.BytesIO):
    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_writing_weights_is_an_input_error(build, tmp_path, monkeypatch):
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **k: _FullDisk() if "w" in mode else real(self, mode, *a, **k)
    )
    with pytest.raises(InputError, match="No space"), ArtifactWriter(tmp_path / "out") as writer:
        emit(build("appending"), writer.directory)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_very_end_keeps_the_old_artifact(write, tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    before = snapshot(tmp_path)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(InputError, match="No space"):
        write(tmp_path / "out", "new", force=True)
    assert snapshot(tmp_path) == before


def test_an_artifact_without_a_manifest_is_a_defect(tmp_path):
    with pytest.raises(InternalError, match="describe"), ArtifactWriter(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_every_damage_is_named(write, tmp_path):
    out = tmp_path / "out"
    write(out, "0123456789")
    found = Artifact.open(out)
    (out / "model.onnx").write_text("0123")
    (out / "sub" / "extra.bin").write_bytes(b"13")
    (out / "surplus.txt").write_text("")
    with pytest.raises(InputError) as caught:
        found.verify()
    message = str(caught.value)
    assert "model.onnx: expected 10 bytes, found 4" in message
    assert "sub/extra.bin: content differs" in message
    assert "surplus.txt: not in the manifest" in message
    (out / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx: missing"):
        found.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "format version 1, found 99"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("target"), "target"),
        (lambda m: m.update(seed="zero"), "seed"),
        (lambda m: m["inputs"][0].update(role="driver"), "driver"),
        (lambda m: m["files"].update({"../outside": {"sha256": "0" * 64, "bytes": 1}}), "outside"),
        (lambda m: m["files"].update({"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}), "passwd"),
        (lambda m: m["files"]["model.onnx"].update(bytes=-1), "size"),
        (lambda m: m["files"]["model.onnx"].update(sha256="short"), "digest"),
    ],
)
def test_a_manifest_that_lies_is_refused(write, tmp_path, change, message):
    write(tmp_path / "out")
    file = tmp_path / "out" / MANIFEST
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        Artifact.open(tmp_path / "out")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=r"manifest"):
        Artifact.open(tmp_path)


def test_a_directory_without_a_manifest_is_no_artifact(tmp_path):
    with pytest.raises(InputError, match="qc compile -o"):
        Artifact.open(tmp_path)
    with pytest.raises(InputError, match="found none"):
        Artifact.open(tmp_path / "missing")


@pytest.mark.parametrize(("package", "version"), [("onnxruntime", "99.0"), ("no-such-runtime", "1.0")])
def test_a_runtime_that_is_missing_or_too_old_is_named(write, tmp_path, package, version):
    write(tmp_path / "out")
    found = Artifact.open(tmp_path / "out")
    found = dataclasses.replace(found, manifest=dataclasses.replace(found.manifest, runtime=(package, version)))
    with pytest.raises(UnsupportedError, match=f"pip install.*{package}"):
        found.runner()


def test_sources_are_named_without_their_directories(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_text(name)
    (tmp_path / "a" / "config.json").write_text("{}")
    entries = source_files([tmp_path / "a", tmp_path / "b" / "model.onnx", tmp_path / "a" / "model.onnx"])
    assert list(entries) == ["config.json", "model.onnx", "model.onnx#2"]
    assert entries["config.json"].bytes == 2


def test_digests_are_those_of_the_algorithm(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest_tree(tmp_path)["abc"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_depends_on_the_data_alone():
    assert dump_json({"b": float("inf"), "a": (1, 2)}) == dump_json({"a": [1, 2], "b": float("nan")})
