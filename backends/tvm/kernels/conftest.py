"""Kernels under test: compiled for a level of this machine, or of arm64 in an emulator, and called from numpy."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qc.backends.tvm.backend import ANDROID
from qc.backends.tvm.isa import LEVELS, Isa, best_for_host
from qc.backends.tvm.toolchain import compile_kernels

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

_HOST = best_for_host()
HOST_LEVELS = [name for name, isa in LEVELS.items() if isa.arch == _HOST.arch]
HOST_LEVELS = HOST_LEVELS[HOST_LEVELS.index(_HOST.name) :]

_CROSS, _EMULATOR = ANDROID.cc["aarch64"], ANDROID.emulator
_emulated = pytest.mark.skipif(
    _HOST.arch == "aarch64" or shutil.which(_CROSS) is None or shutil.which(_EMULATOR[0]) is None,
    reason=f"needs {_CROSS} and {_EMULATOR[0]}, on a machine that is not arm64 itself",
)


@pytest.fixture(params=[*HOST_LEVELS, pytest.param("neon-dotprod", marks=_emulated)])
def isa(request: pytest.FixtureRequest) -> Any:
    """Every level that this machine can run, and the usual one of phones."""
    return LEVELS[request.param]


@pytest.fixture(params=[pytest.param(name, marks=_emulated) for name in ("neon", "neon-i8mm")])
def other_arm(request: pytest.FixtureRequest) -> Any:
    """The other levels of arm64."""
    return LEVELS[request.param]


@pytest.fixture
def call(tmp_path) -> Callable[..., None]:
    """``call(isa, generator, options, arrays, integers, units)`` compiles a kernel and runs it on arrays, in place.

    It is called twice, on parts of the units: a kernel must not touch what is outside of its part.
    """

    def run(isa, generator, options, arrays, integers, units):
        triple = f"{isa.arch}-linux-gnu"
        (content,) = compile_kernels({"kernel": (generator, tuple(options))}, isa, triple).values()
        (tmp_path / "kernel.o").write_bytes(content)
        middle = units // 2
        parts = [[*map(int, integers), begin, end] for begin, end in ((0, middle), (middle, units))]
        (_run_here if isa.arch == _HOST.arch else _run_emulated)(tmp_path, isa, arrays, parts)

    return run


def _run_here(directory: Path, _isa: Isa, arrays: Sequence[np.ndarray], parts: Sequence[Sequence[int]]) -> None:
    library = directory / f"{len(list(directory.iterdir()))}.so"  # a name that is loaded already is not loaded again
    subprocess.run(["cc", "-shared", "-o", library, directory / "kernel.o"], check=True)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    function = ctypes.CDLL(str(library))["kernel"]
    for part in parts:
        function(*pointers, *map(ctypes.c_int32, part))


def _run_emulated(directory: Path, isa: Isa, arrays: Sequence[np.ndarray], parts: Sequence[Sequence[int]]) -> None:
    """A program with the kernel reads the arrays from a file and writes them back."""
    types = ", ".join(["void *"] * len(arrays) + ["int"] * len(parts[0]))
    pointers = [f"p[{i}]" for i in range(len(arrays))]
    sizes = ", ".join(str(a.nbytes) for a in arrays)
    calls = "\n".join(f"  kernel({', '.join([*pointers, *map(str, part)])});" for part in parts)
    (directory / "main.c").write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n"
        f"void kernel({types});\nint main(void) {{\n  static const size_t n[] = {{{sizes}}};\n"
        f'  void *p[{len(arrays)}];\n  FILE *f = fopen("arrays", "r+b");\n'
        f"  for (int i = 0; i < {len(arrays)}; i++) {{\n"
        "    p[i] = aligned_alloc(64, (n[i] + 63) / 64 * 64);\n    if (fread(p[i], 1, n[i], f) != n[i]) return 1;\n"
        f"  }}\n{calls}\n  rewind(f);\n  for (int i = 0; i < {len(arrays)}; i++) fwrite(p[i], 1, n[i], f);\n"
        "  return fclose(f);\n}\n"
    )
    with (directory / "arrays").open("wb") as stream:
        for array in arrays:
            array.tofile(stream)
    subprocess.run([_CROSS, "-static", "-o", "main", "main.c", "kernel.o", "-lm"], cwd=directory, check=True)
    subprocess.run([*_EMULATOR, "./main"], cwd=directory, check=True)
    with (directory / "arrays").open("rb") as stream:
        for array in arrays:
            array[...] = np.fromfile(stream, array.dtype, array.size).reshape(array.shape)


@pytest.fixture
def tiles() -> int:
    """What kernels of a level with tiles take, on a processor that has them and a system that lets this process."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not _HOST.tiles or "amx_int8" not in flags or ctypes.CDLL(None).syscall(158, 0x1023, 18) != 0:
        pytest.skip("needs a processor with AMX")
    return 1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
