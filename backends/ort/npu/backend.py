"""The target ``ort-npu``: ONNX Runtime in front of a neural processing unit, at fixed shapes, in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from qc.backends.ort.npu.device import PACKAGE, is_simulator
from qc.backends.target import Coverage, PreparedRunner, Runner, Target
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.passes.pipeline import Step

__all__ = ["OrtNpu"]

SOCS = {"8gen2": 43, "8gen3": 57, "8elite": 69, "xelite": 60}
"""Qualcomm's number of each chip, by its name in the options of the target. Without one, the simulator stands for a
chip of 2020, which has neither floats nor look-ups."""

_NUMBERS = ("length", "prefill", "cache")


@dataclasses.dataclass(frozen=True)
class OrtNpu:
    """Lowers to integers at fixed shapes, and runs the result on an NPU or in its simulator.

    Attributes:
        soc: The chip, a key of `SOCS`.
        length: Tokens that an encoder takes.
        prefill: Tokens that a decoder takes at once.
        cache: Tokens that its cache holds, and with it the longest text.
        bits: Of the grids of activations.
        context: Whether the artifact also holds what the graphs are compiled to.
        sizes: Sizes of further symbolic dimensions, by name.
    """

    soc: str = "8gen2"
    length: int = 128
    prefill: int = 64
    cache: int = 256
    bits: int = 16
    context: bool = False
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, options: str) -> OrtNpu:
        """Reads what stands behind the colon of a target: ``qnn``, then options with commas: ``qnn,8gen3,cache=512``.

        Raises:
            InputError: If there is no such NPU or option.
        """
        kind, *words = options.split(",") if options else ["qnn"]
        if kind != "qnn":
            raise InputError(f"Expected the NPU qnn, as in ort-npu:qnn, found {kind!r}.")
        chosen: dict[str, object] = {}
        sizes: dict[str, int] = {}
        for word in words:
            name, _, number = word.partition("=")
            if word in SOCS:
                chosen["soc"] = word
            elif word in ("u8", "u16"):
                chosen["bits"] = int(word[1:])
            elif word == "context":
                chosen["context"] = True
            elif number.isascii() and number.isdigit() and int(number) > 0:
                (chosen if name in _NUMBERS else sizes)[name] = int(number)
            else:
                raise InputError(
                    f"Expected an option of ort-npu:qnn among {', '.join(SOCS)}, u8, u16, context, "
                    f"{', '.join(f'{n}=N' for n in _NUMBERS)} and NAME=N for another open size; found {word!r}."
                )
        return cls(**chosen, sizes=sizes)  # type: ignore[arg-type]

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
            QuantizeValues(bits=self.bits),
        )
        return [Step(p, optional=True) for p in passes]

    def coverage(self, model: Model) -> Coverage:
        """Says of each node whether the NPU computes it with integers, and what other accelerators would take.

        The latter of the first graph at its fixed shapes, by the rules that come with ONNX Runtime.
        """
        from qc.backends.ort.accelerators import accelerators
        from qc.backends.ort.npu.coverage import coverage
        from qc.backends.ort.npu.shapes import Dimensions, graph_sizes
        from qc.backends.ort.npu.split import inside

        graphs = graph_sizes(model.signature, length=self.length, prefill=self.prefill, cache=self.cache)
        fixed = inside(model, Dimensions(model.signature, self.sizes).sizes(graphs[0]))
        return dataclasses.replace(coverage(model), accelerators=accelerators(fixed))

    def emit(self, model: Model, directory: Path) -> None:
        """Writes the graphs and their weights."""
        from qc.backends.ort.npu.emit import emit

        emit(
            model,
            directory,
            soc=SOCS[self.soc],
            length=self.length,
            prefill=self.prefill,
            cache=self.cache,
            context=self.context,
            sizes=self.sizes,
        )

    def streamed_bytes(self, directory: Path) -> int:
        """Bytes of weights that are read to yield one token."""
        from qc.backends.ort.npu.runner import read_facts
        from qc.backends.traffic import streamed_bytes

        graphs = read_facts(directory)["graphs"]
        return streamed_bytes(Model.load(directory / graphs[-1]["file"]))

    def open(self, directory: Path, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads an emitted directory."""
        from qc.backends.ort.npu.runner import NpuRunner

        return NpuRunner(directory, threads=threads)

    def open_in_parts(self, directory: Path, work: Path) -> PreparedRunner:
        """Loads an emitted directory as a whole: what an NPU compiles is one piece."""
        from qc.backends.ort.npu.runner import NpuRunner

        return NpuRunner(directory)
