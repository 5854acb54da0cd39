"""The target ``ort-mobile``: ONNX Runtime in an app on an arm64 phone."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from pathlib import Path
from typing import ClassVar

from qc.backends.ort.backend import OrtCpu
from qc.backends.target import Coverage, Runner, Target
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model

__all__ = ["CONFIG", "MODEL", "OrtMobile"]

MODEL = "model.ort"
CONFIG = "required_operators.config"

_LARGEST = (1 << 31) - (64 << 20)
"""Bytes of weights in one file of ORT's format, whose offsets have 32 bits, with room for the graph."""

_SLOW_BITS = ("int2", "uint2")


@dataclasses.dataclass(frozen=True)
class OrtMobile(OrtCpu):
    """Lowers to the kernels of ONNX Runtime that are fast on arm64, and writes ``.onnx`` and ``.ort``.

    4 and 8-bit weights have integer kernels there, 2-bit ones none. A build of the runtime that holds only what the
    model needs loads ``model.ort``, and is made with ``required_operators.config``.
    """

    kits: ClassVar[tuple[str, ...]] = ("android-ort", "ios-ort")

    @property
    def target(self) -> Target:
        """What ONNX Runtime can run on a phone."""
        held = super().target
        formats = tuple(f for f in held.formats if not f.startswith(_SLOW_BITS))
        return dataclasses.replace(
            held, name="ort-mobile", about="ONNX Runtime in an app on Android or iOS", formats=formats
        )

    def coverage(self, model: Model) -> Coverage:
        """Says of each node of a lowered model whether it runs on a fast kernel, and what accelerators would take."""
        from qc.backends.ort.accelerators import accelerators
        from qc.backends.ort.capability import ARM_LIMITS
        from qc.backends.ort.coverage import coverage

        return dataclasses.replace(coverage(model, ARM_LIMITS), accelerators=accelerators(model))

    def write(self, model: Model, directory: Path) -> None:
        """Writes the model in both forms, and the list of its operators."""
        super().write(model, directory)
        weights = sum(f.stat().st_size for f in directory.glob("model.onnx*"))
        if weights > _LARGEST:
            raise UnsupportedError(
                f"Expected a model of less than 2 GiB for {MODEL}, found {weights} bytes. Choose fewer bits."
            )
        _convert(directory)

    def open(self, directory: Path, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads what an app loads."""
        from qc.backends.ort.runner import open_runner

        return open_runner(directory, threads=threads, spinning=spinning, file=MODEL)


def _convert(directory: Path) -> None:
    """Writes ``model.ort`` and ``required_operators.config`` beside ``model.onnx``."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    from qc.backends.ort.repeatable import make_repeatable

    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # the tool announces every file
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # and leaves closing to the interpreter
            convert_onnx_models_to_ort(
                directory / "model.onnx", optimization_styles=[OptimizationStyle.Fixed], target_platform="arm"
            )
    finally:
        logging.disable(disabled)
    make_repeatable(directory / MODEL)
    written = directory / f"model.{CONFIG}"
    lines = [line for line in written.read_text("utf-8").splitlines() if not line.startswith("#")]
    (directory / CONFIG).write_text("\n".join(lines) + "\n", "utf-8", newline="\n")  # without paths of this machine
    written.unlink()
