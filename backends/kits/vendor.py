"""The packages that a page loads, put beside it, so that it needs nothing from elsewhere."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from pathlib import Path

from qc.ir.errors import InputError

__all__ = ["VENDOR", "copy_packages"]

VENDOR = "web/vendor"
"""Where they lie in an artifact."""

_FILES = {
    "onnxruntime-web": ("README.md", "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    "@huggingface/tokenizers": ("LICENSE", "dist/tokenizers.min.mjs"),
}
"""What a browser needs of each package, and what says whose it is."""


def copy_packages(modules: Path, directory: Path) -> None:
    """Copies what a browser needs from a folder in which ``npm install`` was run.

    Args:
        modules: The folder ``node_modules``.
        directory: The artifact.

    Raises:
        InputError: If a package is missing or of another version than the kit is made for.
    """
    template = importlib.resources.files("qc.backends.kits") / "web" / "package.json"
    for package, version in json.loads(template.read_text("utf-8"))["dependencies"].items():
        described = modules / package / "package.json"
        found = json.loads(described.read_text("utf-8"))["version"] if described.is_file() else "none"
        if found != version:
            raise InputError(
                f"Expected {package} {version} in {modules}, found {found}. Run `npm install {package}@{version}`."
            )
        for name in _FILES[package]:
            out = directory / VENDOR / package / name
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(modules / package / name, out)
