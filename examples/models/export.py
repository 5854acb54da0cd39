"""Exports the built-in models: ``python examples/models/export.py [NAME ...]``.

Needs torch and transformers (``pip install 'qc-compiler[torch]'``).
Each model directory keeps ``model.onnx``, its graph over its own ``model.safetensors``, so that everybody else can
load it without torch. Running this again gives the same bytes as long as torch and transformers are the same.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from qc.frontend.huggingface import export_huggingface

HERE = Path(__file__).resolve().parent


def export(name: str) -> Path:
    """Writes ``model.onnx`` into the directory of one built-in model; returns the file."""
    directory = HERE / name
    with tempfile.TemporaryDirectory() as work:
        export_huggingface(directory, Path(work))
        leftovers = sorted(p.name for p in Path(work).glob("*.safetensors"))
        if leftovers:
            raise SystemExit(f"{name}: the graph also needs {leftovers}; a built-in model must not. Nothing written.")
        return Path(shutil.copyfile(Path(work) / "model.onnx", directory / "model.onnx"))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or sorted(p.parent.name for p in HERE.glob("*/config.json")):
        sys.stdout.write(f"{export(chosen)}\n")
