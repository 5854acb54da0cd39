"""`load`: one door for everything that can be read from disk."""

from __future__ import annotations

import os
from pathlib import Path

from qc.frontend.builtin import builtin_directory
from qc.frontend.huggingface import is_huggingface, load_huggingface
from qc.frontend.onnx_file import load_onnx
from qc.ir.errors import InputError
from qc.ir.model import Model

__all__ = ["load"]

_BUILTIN = "builtin:"


def load(source: str | os.PathLike[str], *, work: Path | None = None) -> Model:
    """Reads a model from anything that `source` may name. No weight is read; all stay on disk, memory-mapped.

    Args:
        source: A Hugging Face directory; an ``.onnx`` file or a directory that holds ``model.onnx``; a ``.pt2``
            exported program; or ``builtin:NAME``.
        work: A directory for intermediate files, which must outlive the model. By default a temporary one that lives
            as long as the model.

    Raises:
        InputError: If the source does not exist, is damaged, or is none of these.
        UnsupportedError: If it is sound but cannot be expressed in ONNX.
    """
    name = os.fspath(source)
    if name.startswith(_BUILTIN):
        return load_onnx(builtin_directory(name.removeprefix(_BUILTIN)))
    path = Path(name)
    if not path.exists():
        raise InputError(
            f"Expected a model at {path}, found nothing there. Give a Hugging Face directory, an .onnx or .pt2 file, "
            "or builtin:NAME."
        )
    if path.is_dir():
        return _load_directory(path, work)
    if path.suffix == ".onnx":
        return load_onnx(path)
    if path.suffix == ".pt2":
        from qc.frontend.torch_module import load_pt2

        return load_pt2(path)
    raise InputError(
        f"{path} is not a model that qc reads: expected a directory, an .onnx or a .pt2 file, found {path.suffix!r}. "
        "A checkpoint file is given by its directory, with its config.json."
    )


def _load_directory(path: Path, work: Path | None) -> Model:
    graph = path / "model.onnx"
    # A directory may hold both a graph and its origin. The graph wins if we wrote it, or if there is nothing else.
    if graph.is_file() and (not is_huggingface(path) or not list(path.glob("*.safetensors")) or _is_ours(graph)):
        return load_onnx(path)
    if is_huggingface(path):
        return load_huggingface(path, work)
    raise InputError(
        f"Expected config.json or model.onnx in {path}, found "
        f"{sorted(p.name for p in path.iterdir())[:12]}. Give the directory of a model."
    )


def _is_ours(graph: Path) -> bool:
    try:
        return "source" in Model.load(graph).provenance
    except InputError:
        return False
