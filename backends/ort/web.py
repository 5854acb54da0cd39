"""The target ``ort-web``: ONNX Runtime in WebAssembly, in a browser or in Node."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from qc.backends.ort.backend import OrtCpu
from qc.backends.target import Coverage, Target
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.passes.pipeline import Step

__all__ = ["OrtWeb"]

_SHARD = 24 << 20
"""Bytes of a file of weights: the hosts of static pages with the lowest limit take 25 MiB."""


@dataclasses.dataclass(frozen=True)
class OrtWeb(OrtCpu):
    """Lowers to the kernels that are fast in WebAssembly, with the files of a page and a module that loads them.

    Products of unsigned 8-bit activations and 8-bit weights per channel are twice as fast as float ones there, and
    ``MatMulNBits`` slower than these. So a weight in any other format is decoded when the model is loaded: the download
    stays small, and products run in float.

    Attributes:
        modules: A folder ``node_modules`` whose packages the page takes along; empty if the app installs them.
    """

    modules: str = ""
    kits: ClassVar[tuple[str, ...]] = ("web",)

    @classmethod
    def parse(cls, options: str) -> OrtWeb:
        """Reads what stands behind the colon of a target: ``modules=FOLDER``, or nothing."""
        key, _, folder = options.partition("=")
        if options and (key != "modules" or not folder):
            raise InputError(f"Expected the target ort-web, or ort-web:modules=FOLDER; found the option {options!r}.")
        return cls(modules=folder)

    @property
    def target(self) -> Target:
        """What ONNX Runtime runs fast in WebAssembly."""
        about = "ONNX Runtime in WebAssembly: a module for browsers and Node, and a page"
        return Target("ort-web", about, ("onnxruntime", "1.26"), ("int8", "uint8"), recipe="w8a8-dynamic")

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to operators that are fast there."""
        from qc.backends.ort.decoding import DecodeWhenLoaded
        from qc.backends.ort.integers import LowerIntegerMatMul
        from qc.backends.ort.widen import WidenWeights

        steps = []
        for step in super().lowering():
            if isinstance(step.action, WidenWeights):
                continue
            steps.append(step)
            if isinstance(step.action, LowerIntegerMatMul):
                steps.append(Step(DecodeWhenLoaded(), optional=True))
        return steps

    def coverage(self, model: Model) -> Coverage:
        """Says of each node of a lowered model whether it runs on a fast kernel, and why not."""
        from qc.backends.ort.capability import WEB_LIMITS
        from qc.backends.ort.coverage import coverage

        return coverage(model, WEB_LIMITS)

    def write(self, model: Model, directory: Path) -> None:
        """Writes the model, its weights in files of bounded size, and the packages of the page."""
        from qc.backends.kits.vendor import copy_packages
        from qc.backends.ort.emit import emit

        emit(model, directory, shard=_SHARD)
        if self.modules:
            copy_packages(Path(self.modules), directory)
