"""The target ``ort-npu:qnn``: ONNX Runtime in front of a Hexagon NPU, at fixed shapes, in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qc.backends.ort.npu.device import PACKAGE, is_simulator
from qc.backends.ort.npu.fixed import FixedShapes
from qc.backends.target import Backend, Coverage, Target
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.passes.pipeline import Step

__all__ = ["OrtNpu", "parse"]

SOCS = {"8gen2": 43, "8gen3": 57, "8elite": 69, "xelite": 60}
"""Qualcomm's number of each chip, by its name in the options of the target. Without one, the simulator stands for a
chip of 2020, which has neither floats nor look-ups."""


@dataclasses.dataclass(frozen=True)
class OrtNpu(FixedShapes):
    """Lowers to integers at fixed shapes, and runs the result on an NPU or in its simulator.

    Attributes:
        soc: The chip, a key of `SOCS`.
        bits: Of the grids of activations.
        narrow: Decibels that keys and values keep on grids of 8 bits, or they have `bits`; 0: they have.
        context: Whether the artifact also holds what the graphs are compiled to.
    """

    kind: ClassVar[str] = "qnn"
    kits: ClassVar[tuple[str, ...]] = ("python-fixed", "android-fixed")
    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{name: {"soc": name} for name in SOCS},
        "u8": {"bits": 8},
        "u16": {"bits": 16},
        "context": {"context": True},
    }

    numbers: ClassVar[tuple[str, ...]] = (*FixedShapes.numbers, "narrow")

    soc: str = "8gen2"
    bits: int = 16
    narrow: int = 30
    context: bool = False

    @property
    def target(self) -> Target:
        """What the NPU multiplies."""
        about = "an NPU of Qualcomm (QNN, HTP) through ONNX Runtime; its simulator on x86-64 Linux"
        formats, longest = ("int8", "int4"), (self.cache, self.length)
        return Target(
            "ort-npu:qnn", about, PACKAGE, formats, recipe="npu-w8", longest=longest, simulated=is_simulator()
        )

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to integers."""
        from qc.backends.ort.fuse.inline import InlineDialect
        from qc.backends.ort.npu.activations import WriteOutActivations
        from qc.backends.ort.npu.attention import WriteOutAttention
        from qc.backends.ort.npu.grids import QuantizeValues
        from qc.backends.ort.npu.rotary import WriteOutRotary
        from qc.backends.ort.npu.weights import LowerWeights
        from qc.backends.ort.order import OrderInputs

        passes = (
            OrderInputs(),
            WriteOutRotary(),
            WriteOutAttention(),
            WriteOutActivations(),
            LowerWeights(),
            InlineDialect(),
            QuantizeValues(bits=self.bits, narrow=self.narrow),
        )
        return [Step(p, optional=True) for p in passes]

    def coverage(self, model: Model) -> Coverage:
        """Says of each node whether the NPU computes it with integers, and what other accelerators would take.

        The latter of the first graph at its fixed shapes, by the rules that come with ONNX Runtime.
        """
        from qc.backends.ort.accelerators import accelerators
        from qc.backends.ort.npu.coverage import coverage

        return dataclasses.replace(coverage(model), accelerators=accelerators(self.first_graph(model)))

    def emit(self, model: Model, directory: Path) -> None:
        """Writes the graphs, their weights, and the kits of apps."""
        from qc.backends.ort.npu.device import write_context
        from qc.backends.ort.npu.emit import emit, emit_kits

        soc = SOCS[self.soc]
        files = emit(model, directory, self, {"soc": soc, "context": self.context})
        for file in files if self.context else ():
            write_context(file, soc)
        emit_kits(model, directory, self)


def parse(options: str) -> Backend:
    """Reads what stands behind the colon of a target: a kind, then options with commas: ``qnn,8gen3,cache=512``.

    Raises:
        InputError: If there is no such NPU or option.
    """
    from qc.backends.ort.npu.phone import OrtCoreMl, OrtNnapi

    kinds = {c.kind: c for c in (OrtNpu, OrtCoreMl, OrtNnapi)}
    kind, *words = options.split(",") if options else ["qnn"]
    if kind not in kinds:
        raise InputError(f"Expected an NPU among {', '.join(kinds)}, as in ort-npu:qnn, found {kind!r}.")
    return kinds[kind].parse(words)
