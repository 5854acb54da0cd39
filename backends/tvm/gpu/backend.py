"""The targets of GPUs: kernels in their languages, and a C library that launches them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qc.backends.target import Coverage, PreparedRunner, Runner, Target
from qc.backends.tvm.gpu.languages import Language
from qc.backends.tvm.kernels.caches import cells
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import read_weight
from qc.passes.pipeline import Step

__all__ = ["TvmGpu"]

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMATS = (
    *(
        f"{sign}int{bits}{group}"
        for bits in (2, 3, 4, 8)
        for sign in ("", "u")
        for group in ("", ":g32", ":g64", ":g128")
    ),
    *("nf4:g32", "nf4:g64", "mxfp4", "nvfp4", "ternary"),
)

_COMPILERS = 330 << 20
"""Bytes that TVM takes for the kernels of a decoder, and PoCL when the artifact is measured."""


@dataclasses.dataclass(frozen=True)
class TvmGpu:
    """Compiles a model to kernels in a language of GPUs.

    Attributes:
        language: Of the kernels.
        kv: What caches of keys and values are stored in.
    """

    language: Language
    kv: str = "float32"

    @classmethod
    def parse(cls, language: Language, options: str) -> Self:
        """Reads what stands behind the colon of a target: nothing, or ``kv=...``."""
        name, _, kv = options.partition("=")
        if name not in ("", "kv"):
            raise InputError(f"Expected no option of tvm-{language.name} but kv=..., found {options!r}.")
        return cls(language, cells(kv).name) if name else cls(language)

    @property
    def target(self) -> Target:
        """What it can run."""
        name, about = f"tvm-{self.language.name}", self.language.about
        return Target(name, about, ("qc-compiler", "0.1"), _FORMATS, stage="compiled", compilers=_COMPILERS)

    def check(self, model: Model) -> None:
        """Refuses what has no kernel, and asks for the tools."""
        from qc.backends.tvm.backend import fused
        from qc.backends.tvm.gpu.emit import require_tools_of_gpu
        from qc.backends.tvm.gpu.ops import lower_for_gpu

        require_tools_of_gpu()
        lower_for_gpu(fused(model), cells(self.kv))

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to what the kernels compute."""
        from qc.backends.tvm.backend import TvmCpu

        return TvmCpu().lowering()

    def coverage(self, model: Model) -> Coverage:
        """Every node runs on a kernel, or the model is refused.

        But some formats of weights become float weights, and activations are rounded in float.
        """
        from qc.backends.integers import rounded_source
        from qc.backends.tvm.gpu.weights import why_decoded

        def why(node: ir.Node) -> str:
            weight = read_weight(node.outputs[0])
            reason = why_decoded(weight.format) if weight is not None and weight.format is not None else ""
            if weight is None and rounded_source(node.outputs[0]) is not None:
                return "rounded in float: no kernel multiplies codes"
            return f"stored in float: {reason}" if reason else ""

        return Coverage.counted((node, why(node)) for node in model.graph)

    def emit(self, model: Model, directory: Path) -> None:
        """Writes kernels, launch table, weights and library."""
        from qc.backends.tvm.gpu.emit import emit_for_gpu

        emit_for_gpu(model, directory, self.language, cells(self.kv))

    def streamed_bytes(self, directory: Path) -> int:
        """Bytes of weights that are read to yield one token."""
        from qc.backends.tvm.runner import read_facts

        return int(read_facts(directory)["streamed_bytes"])

    def open(self, directory: Path, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads an emitted directory on the first GPU, or else on any device."""
        from qc.backends.tvm.runner import open_gpu_runner

        return open_gpu_runner(directory)

    def open_in_parts(self, directory: Path, work: Path) -> PreparedRunner:
        """Loads an emitted directory; the device holds its weights."""
        from qc.backends.tvm.runner import open_gpu_runner

        return open_gpu_runner(directory)
