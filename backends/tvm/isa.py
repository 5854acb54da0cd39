"""Instruction sets: what a kernel generator asks about the processor that its kernel will run on."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qc.ir.errors import InputError

__all__ = ["LEVELS", "Isa", "best_for_host", "level"]

Dot = Literal["vnni512", "maddubs", "sdot", "usdot", "plain"]


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction-set level.

    Attributes:
        name: As in ``--target tvm-cpu:avx2``.
        arch: ``x86_64`` or ``aarch64``.
        lanes: 32-bit numbers in a vector register.
        dot: How four byte products per lane are summed; see `qc.backends.tvm.kernels.vectors`.
        fma: Whether a product and a sum round once; without, a kernel multiplies and adds.
        tile: Rows and vectors of columns of a float product that are held in registers.
        int_tile: The same for a product of integers.
        cpu: LLVM's name of the processor.
        features: LLVM's features beyond it.
        tiles: Whether products of bytes are held in tiles (AMX) where the host finds that the processor has them.
        flags: Processor flags that a machine must report (``/proc/cpuinfo`` of Linux) to run it.
    """

    name: str
    arch: Literal["x86_64", "aarch64"]
    lanes: int
    dot: Dot
    fma: bool
    tile: tuple[int, int]
    int_tile: tuple[int, int]
    cpu: str
    features: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    tiles: bool = False

    @property
    def signed(self) -> bool:
        """Whether the bytes of a weight are signed: NEON multiplies signed by signed, x86 unsigned by signed."""
        return self.dot == "sdot"

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector register."""
        return 4 * self.lanes


_V4 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")

LEVELS = {
    isa.name: isa
    for isa in (
        Isa("avx512vnni", "x86_64", 16, "vnni512", True, (8, 3), (4, 2), "cascadelake",
            ("amx-tile", "amx-int8", "fast-dpwssd"), (*_V4, "avx512_vnni"), tiles=True),
        Isa("avx2", "x86_64", 8, "maddubs", True, (4, 2), (2, 2), "haswell", (), ("avx2", "fma", "bmi2", "f16c")),
        Isa("x86-64", "x86_64", 4, "plain", False, (4, 2), (2, 2), "x86-64-v2", (), ("sse4_2", "popcnt")),
        Isa("neon-i8mm", "aarch64", 4, "usdot", True, (8, 2), (4, 4), "generic", ("dotprod", "i8mm", "fullfp16"),
            ("asimddp", "i8mm", "asimdhp")),
        Isa("neon-dotprod", "aarch64", 4, "sdot", True, (8, 2), (4, 4), "generic", ("dotprod",), ("asimddp",)),
        Isa("neon", "aarch64", 4, "plain", True, (8, 2), (2, 2), "generic", (), ("asimd",)),
    )
}  # fmt: skip
"""Every level by name, of each architecture the best first."""


def level(name: str) -> Isa:
    """Returns a level by name.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in LEVELS:
        raise InputError(f"Expected an instruction-set level among {', '.join(LEVELS)}; found {name!r}.")
    return LEVELS[name]


def best_for_host() -> Isa:
    """The best level that this machine reports to have."""
    import platform

    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    levels = [isa for isa in LEVELS.values() if isa.arch == machine]
    if not levels:
        raise InputError(f"Expected an x86_64 or aarch64 processor, found {machine}. Name a level: tvm-cpu:avx2.")
    reported = _reported_flags()
    return next((isa for isa in levels if set(isa.flags) <= reported), levels[-1])


def _reported_flags() -> set[str]:
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return set()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(found.partition(":")[2].split())
