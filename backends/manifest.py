"""The manifest of an artifact: what was compiled, how, and the digest of every file. Validated when it is read."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir

from qc.backends.target import Target
from qc.ir.errors import InputError
from qc.ir.model import ROLES, Model, Port, Signature
from qc.passes.pipeline import Step, format_pipeline

__all__ = ["FORMAT_VERSION", "MANIFEST", "FileEntry", "Manifest", "digest", "digest_tree", "dump_json", "source_files"]

MANIFEST = "manifest.json"
"""Name of the manifest in an artifact."""

FORMAT_VERSION = 1
"""Raised when the meaning of a key changes; an artifact of another version is refused."""

_CHUNK = 1 << 20
_MAX_MANIFEST_BYTES = 64 << 20  # real ones are below a megabyte; a hostile one must not fill the memory


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Digest and size of one file.

    Attributes:
        sha256: Lower-case hexadecimal SHA-256.
        bytes: Size.
    """

    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact says about itself. Holds no time, no speed and no absolute path: equal compiles, equal bytes.

    Attributes:
        target: Name of the target.
        runtime: Package and lowest version that runs the files: ``("onnxruntime", "1.26")``.
        inputs: The inputs, in order.
        outputs: The outputs, in order.
        recipe: Name of the recipe.
        pipeline: The recipe's passes as a string that the command line accepts.
        passes: Every pass that ran, lowering included: ``{"name", "options", "optional"}``.
        seed: Seed of everything random.
        provenance: Facts about the source that the frontend recorded.
        source: The files that were compiled, by name.
        accuracy: What was measured on the artifact in its own runtime.
        calibration: What statistics were collected on: ``source``, ``batches``, ``sha256`` of their content; empty if
            on inputs made up.
        sizes: Sizes in bytes, by what they count; ``artifact`` is all files but the manifest.
        files: All files but the manifest, by path relative to the artifact, with ``/``.
        qc: Version of qc that wrote it.
        format_version: `FORMAT_VERSION` of that time.
    """

    target: str
    runtime: tuple[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    recipe: str = ""
    pipeline: str = ""
    passes: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: Mapping[str, FileEntry] = dataclasses.field(default_factory=dict)
    accuracy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    files: Mapping[str, FileEntry] = dataclasses.field(default_factory=dict)
    qc: str = ""
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        model: Model,
        target: Target,
        *,
        recipe: str = "",
        steps: Sequence[Step] = (),
        lowering: Sequence[Step] = (),
        seed: int = 0,
        source: Mapping[str, FileEntry] | None = None,
        accuracy: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> Manifest:
        """Describes a compile; the artifact's writer adds the files.

        Args:
            model: The lowered model.
            target: What it was lowered for.
            recipe: Name of the recipe.
            steps: The recipe's passes.
            lowering: The passes around them, in the order in which they ran.
            seed: The compile's seed.
            source: From `source_files`.
            accuracy: From `qc.backends.evaluate`.
            calibration: What it was calibrated on.
            sizes: Further sizes in bytes, for example of the float weights.
        """
        signature = model.signature
        return cls(
            target=target.name,
            runtime=target.runtime,
            inputs=signature.inputs,
            outputs=signature.outputs,
            recipe=recipe,
            pipeline=format_pipeline(steps),
            passes=tuple(_describe(s) for s in (*steps, *lowering)),
            seed=seed,
            provenance=model.provenance,
            source=dict(source or {}),
            accuracy=dict(accuracy or {}),
            calibration=dict(calibration or {}),
            sizes=dict(sizes or {}),
            qc=importlib.metadata.version("qc-compiler"),
        )

    @property
    def signature(self) -> Signature:
        """The inputs and outputs with their roles."""
        return Signature(self.inputs, self.outputs)

    def to_json(self) -> str:
        """Writes the manifest; equal manifests give equal text."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["runtime"] = {"package": self.runtime[0], "minimum": self.runtime[1]}
        for key in ("inputs", "outputs"):
            data[key] = [dataclasses.asdict(p) | {"dtype": p.dtype.name} for p in data[key]]
        for key in ("source", "files"):
            data[key] = {name: dataclasses.asdict(entry) for name, entry in data[key].items()}
        return dump_json(data)

    @classmethod
    def load(cls, file: Path) -> Manifest:
        """Reads and validates a manifest.

        Raises:
            InputError: If the file is missing, is not a manifest, or has another format version.
        """
        try:
            if file.stat().st_size > _MAX_MANIFEST_BYTES:
                raise InputError(f"{file} is larger than any manifest. This is not an artifact of qc.")
            data = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"Expected an artifact at {file.parent}, found no {file.name} there. Give the directory that "
                "`qc compile -o` wrote."
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not a readable manifest ({error}). Compile the model again.") from error
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"Expected an artifact of format version {FORMAT_VERSION}, found {version!r} in {file}. Use the "
                "version of qc that wrote it, or compile the model again."
            )
        try:
            return _parse(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file} is not a valid manifest ({type(error).__name__}: {error}). Compile the model again."
            ) from error


def digest(file: Path) -> FileEntry:
    """Reads a file once, in chunks."""
    sha = hashlib.sha256()
    size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
            size += len(chunk)
    return FileEntry(sha.hexdigest(), size)


def digest_tree(directory: Path) -> dict[str, FileEntry]:
    """Digests of all files under `directory` but its manifest, by relative path with ``/``, sorted."""
    files = (p for p in directory.rglob("*") if not p.is_dir())
    found = {p.relative_to(directory).as_posix(): p for p in files}
    return {name: digest(path) for name, path in sorted(found.items()) if name != MANIFEST}


def source_files(paths: Iterable[str | os.PathLike[str]]) -> dict[str, FileEntry]:
    """Digests of the files that are compiled, by file name; directories count with all files directly in them.

    Files of equal name are told apart by a running number, in the order given. Each file is read once.
    """
    entries: dict[str, FileEntry] = {}
    seen: dict[Path, FileEntry] = {}
    for path in map(Path, paths):
        for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
            real = file.resolve()
            if real in seen:
                continue
            seen[real] = digest(file)
            name, number = file.name, 2
            while name in entries:
                name, number = f"{file.name}#{number}", number + 1
            entries[name] = seen[real]
    return entries


def dump_json(data: Any) -> str:
    """Spells data as JSON that depends on nothing but the data. Numbers that JSON has not become null."""
    return json.dumps(_plain(data), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(k): _plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(v) for v in data]
    if hasattr(data, "item"):  # a numpy scalar
        data = data.item()
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if data is None or isinstance(data, str | int | float):
        return data
    return str(data)


def _describe(step: Step) -> dict[str, Any]:
    return {
        "name": step.action.spec_name(),
        "options": {k: _plain(v) for k, v in dataclasses.asdict(step.action).items()},
        "optional": step.optional,
    }


def _parse(data: dict[str, Any]) -> Manifest:
    unknown = set(data) - {f.name for f in dataclasses.fields(Manifest)}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    fields = dict(data)
    for key, kind in (("target", str), ("recipe", str), ("pipeline", str), ("qc", str), ("seed", int)):
        if not isinstance(fields[key], kind):
            raise TypeError(f"{key} is {fields[key]!r}")
    fields["runtime"] = (str(data["runtime"]["package"]), str(data["runtime"]["minimum"]))
    for key in ("inputs", "outputs"):
        fields[key] = tuple(_port(p) for p in data[key])
    for key in ("source", "files"):
        fields[key] = {name: _entry(name, entry) for name, entry in data[key].items()}
    for name in fields["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or name == MANIFEST or path.as_posix() != name:
            raise ValueError(f"file name {name!r} does not lie within the artifact")
    for key in ("provenance", "accuracy", "calibration", "sizes"):
        fields[key] = dict(data.get(key, {}) if key == "calibration" else data[key])
    fields["passes"] = tuple(dict(p) for p in data["passes"])
    return Manifest(**fields)


def _port(data: Mapping[str, Any]) -> Port:
    port = Port(
        data["name"], ir.DataType[data["dtype"]], tuple(data["shape"]), data["role"], data["index"], data["kind"]
    )
    legal = isinstance(port.name, str) and port.role in ROLES and isinstance(port.index, int | None)
    legal = legal and port.kind in ("tensor", "sequence", "optional")
    if not legal or not all(d is None or isinstance(d, int | str) for d in port.shape):
        raise ValueError(f"port {data!r}")
    return port


def _entry(name: str, data: Mapping[str, Any]) -> FileEntry:
    entry = FileEntry(**data)
    if not isinstance(entry.sha256, str) or len(entry.sha256) != 64 or not isinstance(entry.bytes, int):
        raise ValueError(f"digest of {name!r}")
    if entry.bytes < 0:
        raise ValueError(f"size of {name!r}")
    return entry
