"""Kernels under test: compiled for a level of this machine, called from numpy."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qc.backends.tvm.isa import LEVELS, best_for_host
from qc.backends.tvm.toolchain import compile_kernels

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

_HOST = best_for_host()
HOST_LEVELS = [name for name, isa in LEVELS.items() if isa.arch == _HOST.arch]
HOST_LEVELS = HOST_LEVELS[HOST_LEVELS.index(_HOST.name) :]


@pytest.fixture(params=HOST_LEVELS)
def isa(request: pytest.FixtureRequest) -> Any:
    """Every level that this machine can run."""
    return LEVELS[request.param]


@pytest.fixture
def call(tmp_path) -> Callable[..., None]:
    """``call(isa, generator, options, arrays, integers, units)`` compiles a kernel and runs it on arrays, in place."""

    def run(isa, generator, options, arrays, integers, units):
        triple = f"{isa.arch}-linux-gnu"
        (content,) = compile_kernels({"kernel": (generator, tuple(options))}, isa, triple).values()
        (tmp_path / "kernel.o").write_bytes(content)
        library = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"  # a name that is loaded already is not loaded again
        subprocess.run(["cc", "-shared", "-o", library, tmp_path / "kernel.o"], check=True)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
        # Two calls on parts of the units: a kernel must not touch what is outside of its part.
        middle = units // 2
        function = ctypes.CDLL(str(library))["kernel"]
        for begin, end in ((0, middle), (middle, units)):
            function(*pointers, *map(ctypes.c_int32, (*map(int, integers), begin, end)))

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
