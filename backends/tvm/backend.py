"""The targets of TVM: generated kernels in a C library that needs no runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qc.backends.target import Coverage, PreparedRunner, Runner, Target
from qc.backends.tvm.apple import TRIPLE
from qc.backends.tvm.isa import Isa, best_for_host, level
from qc.backends.tvm.kernels.caches import cells
from qc.backends.tvm.toolchain import Platform
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import read_weight
from qc.passes.pipeline import Step

__all__ = ["TvmAndroid", "TvmCpu", "TvmIos", "fused"]

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = Platform(
    {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"},
    {"x86_64": "cc", "aarch64": "cc"},
    {"x86_64": "ar", "aarch64": "ar"},
    "gcc",
)

ANDROID = Platform(
    {"aarch64": "aarch64-linux-android24"},
    {"aarch64": "aarch64-linux-gnu-gcc"},
    {"aarch64": "aarch64-linux-gnu-ar"},
    "gcc-aarch64-linux-gnu and qemu-user-static",
    ("qemu-aarch64-static", "-cpu", "max"),
)

IOS = dataclasses.replace(ANDROID, apple=TRIPLE)

_INTEGERS = (
    f"{sign}int{bits}{group}"
    for bits in (2, 3, 4, 8)
    for sign in ("", "u")
    for group in ("", ":g16", ":g32", ":g64", ":g128", ":g256")
    if (bits, group) != (3, ":g16")
)
_TABLES = (
    *("mxfp4", "nvfp4", "ternary", "bitmod3:g128", "bitmod4:g128", "mid2:g32", "mid3:g32", "mid4:g32"),
    *("nf3:g64", "nf4:g32", "nf4:g64", "nf4:g64:q8x256", "bnb4:g64", "lut3", "lut4", "lut3c16", "lut4c16", "zint4:g64"),
)
"""Tables of integers, which kernels read as they are stored, and of 16 values, which they look up."""

_FORMATS = (*_INTEGERS, *_TABLES)

_MATRIX = 2
"""Axes of a weight that is no convolution's."""

_LLVM = 230 << 20
"""Bytes that TVM and LLVM take for the kernels of a decoder, whatever its size."""


def fused(model: Model) -> Model:
    """A copy of a canonical model with the nodes that kernels compute; its weights are not read."""
    from qc.passes.manager import PassManager

    return PassManager(_fusing(), stage="lowering", verify=False).run(model.clone())[0]


def _fusing() -> list[Step]:
    from qc.backends.tvm.expand import ExpandFunctions
    from qc.passes.fuse.attention import MergeHeads
    from qc.passes.fuse.gqa import FuseGroupQueryAttention

    return [Step(p, optional=True) for p in (FuseGroupQueryAttention(), MergeHeads(), ExpandFunctions())]


@dataclasses.dataclass(frozen=True)
class TvmCpu:
    """Compiles a model to a C library for this machine, or for a named instruction-set level.

    Attributes:
        level: The level; empty for the best that this machine has.
        exact: Whether products with quantized weights keep activations in float instead of rounding them to int8.
        kv: What caches of keys and values are stored in.
    """

    level: str = ""
    exact: bool = False
    kv: str = "float32"
    name: ClassVar[str] = "tvm-cpu"
    about: ClassVar[str] = "a C library for this machine: generated kernels, no runtime"
    platform: ClassVar[Platform] = HOST
    kits: ClassVar[tuple[str, ...]] = ("c",)

    @classmethod
    def parse(cls, options: str) -> Self:
        """Reads what stands behind the colon of a target: a level, ``float`` and ``kv=...``, with commas."""
        chosen = {}
        for word in filter(None, options.split(",")):
            if word == "float":
                chosen["exact"] = True
            elif word.startswith("kv="):
                chosen["kv"] = cells(word[3:]).name
            elif "level" in chosen:
                raise InputError(f"Expected one instruction-set level, found {chosen['level']!r} and {word!r}.")
            else:
                chosen["level"] = level(word).name
        return cls(**chosen)

    @property
    def target(self) -> Target:
        """What it can run."""
        return Target(self.name, self.about, ("qc-compiler", "0.1"), _FORMATS, stage="compiled", compilers=_LLVM)

    @property
    def isa(self) -> Isa:
        """The level of the kernels."""
        chosen = level(self.level) if self.level else self.default_level()
        if chosen.arch not in self.platform.triples:
            raise InputError(
                f"Expected a level of {', '.join(self.platform.triples)} for {self.name}, found {chosen.name}."
            )
        return chosen

    def default_level(self) -> Isa:
        """The level where none is named."""
        return best_for_host()

    def check(self, model: Model) -> None:
        """Refuses what has no kernel, and asks for the tools."""
        from qc.backends.tvm.lower import lower_to_program
        from qc.backends.tvm.toolchain import check_versions, require_tools

        check_versions()
        require_tools((self.platform.cc[self.isa.arch], self.platform.ar[self.isa.arch]), self.platform.package)
        lower_to_program(fused(model), self.isa, exact=self.exact, cells=cells(self.kv))

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to what the kernels compute."""
        from qc.passes.fuse.pack_projections import PackProjections

        return [Step(PackProjections(), optional=True), *_fusing()]

    def coverage(self, model: Model) -> Coverage:
        """Every node runs on a kernel, or the model is refused.

        But some formats of weights become float weights, and some grids of activations are rounded to in float.
        """
        from qc.backends.integers import rounded_source
        from qc.backends.tvm.ops.rounding import is_emulated
        from qc.backends.tvm.pack import why_decoded

        def why(node: ir.Node) -> str:
            weight = read_weight(node.outputs[0])
            reason = why_decoded(weight.format) if weight is not None and weight.format is not None else ""
            if weight is not None and weight.format is not None and len(weight.shape) > _MATRIX:
                reason = "convolutions multiply floats"
            rounds = weight is None and node.op_type in ("DequantizeLinear", "DynamicQuantize")
            if rounds and rounded_source(node.outputs[0]) is not None and is_emulated(node, exact=self.exact):
                return "rounded in float: no kernel multiplies codes of this grid with this weight"
            return f"stored in float: {reason}" if reason else ""

        return Coverage.counted((node, why(node)) for node in model.graph)

    def emit(self, model: Model, directory: Path) -> None:
        """Writes the library, its sources, its weights, and the kits of apps."""
        from qc.backends.kits.write import write_kits
        from qc.backends.tvm.emit import emit

        emit(model, directory, self.isa, self.platform, exact=self.exact, cells=cells(self.kv))
        write_kits(self.kits, model, self.target, directory)

    def streamed_bytes(self, directory: Path) -> int:
        """Bytes of weights that are read to yield one token."""
        from qc.backends.tvm.runner import read_facts

        return int(read_facts(directory)["streamed_bytes"])

    def open(self, directory: Path, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads an emitted directory."""
        from qc.backends.tvm.runner import open_runner

        return open_runner(directory, threads=threads, platform=self.platform)

    def open_in_parts(self, directory: Path, work: Path) -> PreparedRunner:
        """Loads an emitted directory: its weights are mapped, so they need no memory that others could use."""
        from qc.backends.tvm.runner import open_runner

        return open_runner(directory, platform=self.platform)


@dataclasses.dataclass(frozen=True)
class TvmAndroid(TvmCpu):
    """Compiles a model to a C library for arm64: shared, static, and in source.

    Off arm64 the result is measured in an emulator. The libraries are linked by the cross compiler of this system; on
    a phone, ``model.c`` and ``libmodel.a``'s kernels go through the NDK of the app.
    """

    name: ClassVar[str] = "tvm-android"
    about: ClassVar[str] = "a C library for arm64; run in an emulator elsewhere"
    platform: ClassVar[Platform] = ANDROID
    kits: ClassVar[tuple[str, ...]] = ("c", "android-tvm")

    def default_level(self) -> Isa:
        """Phones since 2018 have it."""
        return level("neon-dotprod")


@dataclasses.dataclass(frozen=True)
class TvmIos(TvmAndroid):
    """Compiles a model to kernels for iOS, in an XCFramework, and the C source that calls them.

    The result is measured with the same kernels compiled for Linux, in an emulator off arm64. Devices with dotprod are
    those with an A13 and later; `tvm-ios:neon` runs on all.
    """

    name: ClassVar[str] = "tvm-ios"
    about: ClassVar[str] = "C sources and kernels for iOS; run as arm64 Linux in an emulator"
    platform: ClassVar[Platform] = IOS
    kits: ClassVar[tuple[str, ...]] = ("ios-tvm",)
