"""The targets ``ort-npu:coreml`` and ``ort-npu:nnapi``: ONNX Runtime with the accelerators that phones' systems offer.

Neither provider exists for Linux. What each takes is known by rules (`provider_rules`); graphs are written to satisfy
them, and run on the processor here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qc.backends.ort.npu.fixed import FixedShapes
from qc.backends.target import Coverage, Target
from qc.ir.model import Model
from qc.passes.base import Pass
from qc.passes.pipeline import Step

__all__ = ["OrtCoreMl", "OrtNnapi"]

_RUNTIME = ("onnxruntime", "1.26")


@dataclasses.dataclass(frozen=True)
class _ByRules(FixedShapes):
    """An accelerator of which only the rules are known here."""

    @property
    def whole(self) -> bool:
        """Whether graphs hold their weights: these providers do not read them from other files."""
        return True

    def coverage(self, model: Model) -> Coverage:
        """Says of each node of the first graph where it runs and why, by the provider's rules and not by a run.

        Beside it, what ONNX Runtime's own checker says, which knows operators but not what they are given.
        """
        from qc.backends.ort.accelerators import accelerators
        from qc.backends.ort.npu.provider_rules import PROVIDERS
        from qc.backends.ort.npu.rules import coverage

        fixed = self.first_graph(model)
        return dataclasses.replace(coverage(fixed, PROVIDERS[self.kind]), accelerators=accelerators(fixed))

    def emit(self, model: Model, directory: Path) -> None:
        """Writes the graphs, their weights, and the kits of apps."""
        from qc.backends.ort.npu.emit import emit, emit_kits

        emit(model, directory, self, {}, whole=self.whole)
        emit_kits(model, directory, self)


@dataclasses.dataclass(frozen=True)
class OrtCoreMl(_ByRules):
    """Lowers to what Core ML's programs compute in floats; weights are stored in any format, and decoded at load.

    Attributes:
        half: Whether activations are of float16, which Apple's neural engine computes in.
    """

    kind: ClassVar[str] = "coreml"
    kits: ClassVar[tuple[str, ...]] = ("python-fixed", "ios-fixed")
    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {"f16": {"half": True}, "f32": {"half": False}}

    half: bool = True

    @property
    def whole(self) -> bool:
        """Whether graphs hold their weights; where the runtime converts each, it holds them itself anyway."""
        return not self.half

    @property
    def target(self) -> Target:
        """What the runtime decodes at load; products are of floats."""
        about = "Core ML through ONNX Runtime; by its rules, run on the processor here"
        formats, longest = ("int8", "int4", "uint8", "uint4"), (self.cache, self.length)
        return Target("ort-npu:coreml", about, _RUNTIME, formats, recipe="w8", longest=longest)

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to operators that Core ML has."""
        from qc.backends.ort.decoding import DecodeWhenLoaded
        from qc.backends.ort.fuse.inline import InlineDialect
        from qc.backends.ort.kernels import LowerQuantizedWeights
        from qc.backends.ort.npu.activations import WriteOutActivations
        from qc.backends.ort.npu.attention import WriteOutAttention
        from qc.backends.ort.npu.halves import ComputeInHalf
        from qc.backends.ort.npu.norms import CenterByHalves
        from qc.backends.ort.npu.products import LowerToMatMul
        from qc.backends.ort.npu.rotary import WriteOutRotary
        from qc.backends.ort.order import OrderInputs

        passes: list[Pass] = [
            OrderInputs(),
            WriteOutRotary(),
            WriteOutAttention(),
            WriteOutActivations(),
            CenterByHalves(),
            DecodeWhenLoaded(),
            LowerToMatMul(),
            LowerQuantizedWeights(),  # of tables, which the processor looks up
            InlineDialect(),
        ]
        return [Step(p, optional=True) for p in (*passes, *([ComputeInHalf()] if self.half else []))]


@dataclasses.dataclass(frozen=True)
class OrtNnapi(_ByRules):
    """Lowers to products of 8-bit integers between floats."""

    kind: ClassVar[str] = "nnapi"
    kits: ClassVar[tuple[str, ...]] = ("python-fixed", "android-fixed")

    @property
    def target(self) -> Target:
        """What NNAPI multiplies."""
        about = "Android's NNAPI through ONNX Runtime; by its rules, run on the processor here"
        longest = (self.cache, self.length)
        return Target("ort-npu:nnapi", about, _RUNTIME, ("int8",), recipe="npu-w8", longest=longest)

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to operators that NNAPI has."""
        from qc.backends.ort.fuse.inline import InlineDialect
        from qc.backends.ort.kernels import LowerQuantizedWeights
        from qc.backends.ort.npu.activations import WriteOutActivations
        from qc.backends.ort.npu.attention import WriteOutAttention
        from qc.backends.ort.npu.grids import QuantizeValues
        from qc.backends.ort.npu.norms import WriteOutNormalizations
        from qc.backends.ort.npu.products import LowerToConvolution
        from qc.backends.ort.npu.rotary import WriteOutRotary
        from qc.backends.ort.order import OrderInputs

        passes: list[Pass] = [
            OrderInputs(),
            WriteOutRotary(),
            WriteOutAttention(),
            WriteOutActivations(gelu=True),
            WriteOutNormalizations(),
            LowerToConvolution(),
            LowerQuantizedWeights(),  # of tables, which the processor looks up
            InlineDialect(),
            QuantizeValues(bits=8, products=True),
        ]
        return [Step(p, optional=True) for p in passes]
