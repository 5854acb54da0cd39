"""Tiny models of every architecture, exported once for all tests and workers, until what makes them changes.

An export takes longer than everything that a test does with it, so exports lie in pytest's cache.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from qc.ir.model import Model

__all__ = ["canonical", "exported", "imported"]

_ROOT = Path(__file__).resolve().parent.parent
_EXPORT = ("frontend", "ir/model.py", "ir/simplify.py", "tests/tiny_models.py")
_CANONICAL = (*_EXPORT, "passes/canonicalize", "ir/dialect.py")


def imported(directory: Path, work: Path) -> Model:
    """The model of a Hugging Face directory, as `qc.frontend.load` reads it.

    The export runs in this process: other tests show that a worker process yields the same, and importing torch anew
    would cost as much again.
    """
    from qc.frontend.hf_worker import export
    from qc.frontend.huggingface import read_export

    work.mkdir(parents=True, exist_ok=True)
    export(directory, work)
    return read_export(directory, work)


def exported(name: str, cache: Path) -> tuple[Path, Model]:
    """The Hugging Face directory of an architecture of `tiny_models`, and the model imported from it.

    Args:
        name: One of ``ARCHITECTURES``.
        cache: Where exports are kept; one directory for all workers.
    """
    from qc.frontend.huggingface import read_export

    def make(directory: Path) -> None:
        from tiny_models import ARCHITECTURES

        ARCHITECTURES[name](directory / "hf")
        imported(directory / "hf", directory / "work")

    kept = _once(cache, f"{name}.export", _fingerprint(_EXPORT), make)
    return kept / "hf", read_export(kept / "hf", kept / "work")


def canonical(name: str, cache: Path) -> Model:
    """The canonical model of an architecture of `tiny_models`, its weights in a directory below `cache`."""
    from qc.passes.canonicalize import canonicalize_passes

    def make(directory: Path) -> None:
        _, model = exported(name, cache)
        for rewrite in canonicalize_passes():
            model = Model.of(rewrite(model).model)
        model.save(directory)

    return Model.load(_once(cache, f"{name}.canonical", _fingerprint(_CANONICAL), make))


def _once(cache: Path, key: str, version: str, make: Callable[[Path], None]) -> Path:
    """The directory that `make` fills, made if this version of it is not there; older versions are removed."""
    from filelock import FileLock  # comes with torch

    kept = cache / f"{key}-{version}"
    with FileLock(cache / f"{key}.lock"):
        if not kept.is_dir():
            for old in cache.glob(f"{key}-*"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=cache) as work:
                make(Path(work) / "made")
                (Path(work) / "made").rename(kept)
    return kept


@functools.cache
def _fingerprint(paths: tuple[str, ...]) -> str:
    """Of sources, and of the packages that an export depends on."""
    import torch
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for root in (_ROOT / path for path in paths):
        for file in sorted(root.glob("*.py")) if root.is_dir() else [root]:
            if not file.name.endswith("_test.py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
