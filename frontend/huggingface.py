"""Hugging Face directories. The export runs in a process of its own, so that this one never imports torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import onnx_ir as ir

from qc.frontend.external import external_tensors, rebase
from qc.frontend.safetensors_file import open_checkpoint
from qc.ir import errors
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import ASSET_NAMES, Model
from qc.ir.store import FILE

__all__ = [
    "LEFTOVERS",
    "export_huggingface",
    "is_huggingface",
    "load_huggingface",
    "read_export",
    "transformer_directory",
]

LEFTOVERS = "leftovers.safetensors"
"""Name of the file, in the work directory, with tensors that the checkpoint does not hold as they are."""

_WRITTEN = (LEFTOVERS, FILE)
"""Files in the work directory; the second one has weights that the checkpoint holds quantized."""


def is_huggingface(directory: Path) -> bool:
    """Whether a directory looks like a model of the Hugging Face hub: a configuration, or modules with one."""
    return (directory / "config.json").is_file() or (directory / "modules.json").is_file()


def transformer_directory(directory: Path) -> Path:
    """Returns the directory of the transformer itself: a sentence encoder may keep it in a sub-directory."""
    if (directory / "config.json").is_file():
        return directory
    inner = sorted(p.parent for p in directory.glob("*/config.json") if (p.parent / "model.safetensors").is_file())
    if len(inner) != 1:
        raise InputError(
            f"Expected config.json in {directory}, or one sub-directory with a transformer, found {len(inner)}. "
            "Give the directory that holds config.json and the safetensors weights."
        )
    return inner[0]


def load_huggingface(directory: Path, work: Path | None = None) -> Model:
    """Imports a Hugging Face directory as a float32 graph over its own safetensors files, which stay where they are.

    Args:
        directory: Holds ``config.json`` and safetensors weights, single or sharded.
        work: Where the graph and the few tensors that are not in the checkpoint are written; it must outlive the
            model. By default a temporary directory that lives as long as the model.

    Raises:
        InputError: If files are missing or damaged, or PyTorch is not installed.
        UnsupportedError: If the architecture cannot be exported.
    """
    directory = transformer_directory(directory.absolute())
    temporary = _TemporaryDirectory() if work is None else None
    work = work if temporary is None else temporary.path
    export_huggingface(directory, work)
    model = read_export(directory, work)
    for tensor, _ in external_tensors(model):
        if Path(tensor.path).name in _WRITTEN:
            tensor.meta["qc.work"] = temporary  # the file lives as long as the tensors in it, also in copies
    return model


def read_export(directory: Path, work: Path) -> Model:
    """Reads what `export_huggingface` wrote: the graph in `work` over the weights in `directory`."""
    directory, work = directory.absolute(), work.absolute()
    model = Model.of(
        ir.load(work / "model.onnx"),
        assets={name: directory / name for name in ASSET_NAMES if (directory / name).is_file()},
    )
    rebase(model, lambda location: (work if location in _WRITTEN else directory) / location)
    return model


def export_huggingface(directory: Path, work: Path) -> None:
    """Writes ``work/model.onnx``, a graph whose external data name the safetensors files of `directory`.

    Tensors that the checkpoint does not hold as they are, if any, go to ``work/leftovers.safetensors``.

    Raises:
        InputError: If files are missing or damaged, or PyTorch is not installed.
        UnsupportedError: If the architecture cannot be exported.
    """
    directory, work = directory.absolute(), work.absolute()
    open_checkpoint(directory)  # a damaged checkpoint is reported now, not after half a minute of tracing
    work.mkdir(parents=True, exist_ok=True)
    log, outcome_file = work / "export.log", work / "outcome.json"
    outcome_file.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    with log.open("wb") as stream:
        # The work directory is ours: `-m` puts the current directory first on the module path.
        code = subprocess.run(  # noqa: S603  our own module, no shell
            [sys.executable, "-m", "qc.frontend.hf_worker", str(directory), str(work)],
            stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=work, env=environment, check=False,
        ).returncode  # fmt: skip
    outcome = json.loads(outcome_file.read_text("utf-8")) if outcome_file.is_file() else None
    if outcome == {} and code == 0:
        return
    if outcome:
        raise getattr(errors, outcome["error"])(outcome["message"])
    last = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()][-1:]
    if code < 0:
        raise InputError(
            f"The export of {directory} was killed by signal {-code}; most often the machine is out of memory. "
            "Close other programs, or export on a larger machine and give the .onnx file."
        )
    raise UnsupportedError(
        f"The export of {directory} failed: {last[0] if last else f'exit code {code}'}. "
        "Export it by other means and give the .onnx file."
    )


class _TemporaryDirectory:
    """A directory that is removed with this object, without the warning of the standard library's."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="qc-import-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
