"""Canonical tiny models of every architecture, exported once and kept in pytest's cache until what makes them changes."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from pathlib import Path

from qc.ir.model import Model

__all__ = ["canonical"]

_ROOT = Path(__file__).resolve().parent.parent


def canonical(name: str, cache: Path) -> Model:
    """The canonical model of an architecture of `tiny_models`, its weights in a directory below `cache`."""
    from tiny_models import ARCHITECTURES

    from qc.frontend import load
    from qc.passes.canonicalize import canonicalize_passes

    kept = cache / f"{name}-{_fingerprint()}"
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            ARCHITECTURES[name](Path(work) / "hf")
            model = load(Path(work) / "hf", work=Path(work) / "work")
            for rewrite in canonicalize_passes():
                model = Model.of(rewrite(model).model)
            model.save(Path(work) / "model")
            shutil.move(Path(work) / "model", kept)
    return Model.load(kept)


@functools.cache
def _fingerprint() -> str:
    """Of the sources and packages that an export depends on."""
    import torch
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    folders = ("frontend", "passes/canonicalize")
    sources = [p for f in folders for p in (_ROOT / f).glob("*.py") if not p.name.endswith("_test.py")]
    for path in sorted([*sources, _ROOT / "tests/tiny_models.py", _ROOT / "ir/dialect.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
