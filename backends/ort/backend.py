"""The target ``ort-cpu``: ONNX Runtime on a CPU, with its own fused kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from qc.backends.parts import PartRunner
from qc.backends.target import Coverage, Runner, Target
from qc.ir.model import Model
from qc.ir.quant import named_formats
from qc.passes._activations import Shelf
from qc.passes.pipeline import Step

__all__ = ["OrtCpu"]

_KEPT = 16 << 20
"""Bytes of activations and results between parts that stay in memory."""


def _formats(accuracy_level: int) -> tuple[str, ...]:
    """Formats with a kernel that is fast at that accuracy level, without those that are cut into shorter blocks."""
    from qc.backends.ort.capability import MATMUL_BLOCKS, matmul_limit
    from qc.backends.ort.packed import has_kernel

    found = []
    for name, format in named_formats().items():
        if not has_kernel(format):
            continue
        bits = format.values.bits
        groups = [b for b in MATMUL_BLOCKS if matmul_limit(bits, b, accuracy_level) is None]
        if groups:
            found += [name, *(f"{name}:g{b}" for b in groups)]
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class OrtCpu:
    """Lowers to ONNX Runtime's CPU kernels, and runs the result there.

    Attributes:
        accuracy_level: How products with quantized weights take their activations: 4 as int8 per block, 0 as float.
    """

    accuracy_level: int = 4
    kits: ClassVar[tuple[str, ...]] = ("python",)

    @property
    def target(self) -> Target:
        """What ONNX Runtime can run on a CPU."""
        about = "ONNX Runtime on a CPU; decoders also load in onnxruntime-genai"
        return Target("ort-cpu", about, ("onnxruntime", "1.26"), _formats(self.accuracy_level))

    def check(self, model: Model) -> None:
        """Nothing: the runtime has run the model already."""

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to ONNX Runtime's operators."""
        from qc.backends.ort.convolutions import LowerFloatConvolution
        from qc.backends.ort.fuse.activations import FuseSwish
        from qc.backends.ort.fuse.inline import InlineDialect
        from qc.backends.ort.fuse.require import RequireKernels
        from qc.backends.ort.fuse.residuals import FuseResiduals, KeepResiduals
        from qc.backends.ort.integers import LowerIntegerLinear, LowerIntegerMatMul
        from qc.backends.ort.kernels import LowerFloatLinear, LowerQuantizedWeights
        from qc.backends.ort.order import OrderInputs
        from qc.backends.ort.widen import WidenWeights
        from qc.passes.fuse.attention import MergeHeads
        from qc.passes.fuse.gqa import FuseGroupQueryAttention
        from qc.passes.fuse.pack_projections import PackProjections

        passes = (
            OrderInputs(),
            WidenWeights(accuracy_level=self.accuracy_level),
            PackProjections(everywhere=False),
            FuseGroupQueryAttention(),  # after packing: the kernel takes the packed projection unsplit
            MergeHeads(),
            LowerIntegerLinear(),
            LowerIntegerMatMul(),
            LowerQuantizedWeights(accuracy_level=self.accuracy_level),
            LowerFloatLinear(),  # last of the three: it takes what is left
            LowerFloatConvolution(),
            FuseSwish(),
            KeepResiduals(),
            FuseResiduals(),
            InlineDialect(),
            RequireKernels(),
        )
        return [Step(p, optional=True) for p in passes]

    def coverage(self, model: Model) -> Coverage:
        """Says of each node of a lowered model whether it runs on a fast kernel, and why not."""
        from qc.backends.ort.coverage import coverage

        return coverage(model)

    def emit(self, model: Model, directory: Path) -> None:
        """Writes the files that the runtime loads, and the kits of apps."""
        from qc.backends.kits.write import write_kits

        self.write(model, directory)
        write_kits(self.kits, model, self.target, directory)

    def write(self, model: Model, directory: Path) -> None:
        """Writes the files that the runtime loads."""
        from qc.backends.ort.emit import emit, emit_genai

        emit(model, directory)
        emit_genai(model, directory)

    def streamed_bytes(self, directory: Path) -> int:
        """Bytes of weights that are read to yield one token."""
        from qc.backends.traffic import streamed_bytes

        return streamed_bytes(Model.load(directory))

    def open(self, directory: Path, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads an emitted directory."""
        from qc.backends.ort.runner import open_runner

        return open_runner(directory, threads=threads, spinning=spinning)

    def open_in_parts(self, directory: Path, work: Path) -> PartRunner:
        """Loads an emitted directory, a part of it at a time."""
        from qc.ir.runtime import Session

        model = Model.load(directory)
        return PartRunner(model, lambda part: Session(part, optimize=True).run, Shelf(work, _KEPT))
