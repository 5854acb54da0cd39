"""A device for OpenCL; without one, tests skip."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.gpu.backend import TvmGpu
from qc.backends.tvm.gpu.languages import OPENCL
from qc.ir.model import Model
from qc.passes.manager import PassManager

pytest.importorskip("tvm", reason="kernels are compiled by TVM")


def _devices() -> int:
    try:
        library = ctypes.CDLL("libOpenCL.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    return count.value if library.clGetPlatformIDs(0, None, ctypes.byref(count)) == 0 else 0


@pytest.fixture(scope="session")
def on_device() -> Callable[..., dict[str, np.ndarray]]:
    """``on_device(model, directory, inputs)`` compiles for OpenCL into the directory and runs once."""
    header = ["cc", "-E", "-include", "CL/cl.h", "-x", "c", "/dev/null"]
    if shutil.which("cc") is None or subprocess.run(header, capture_output=True, check=False).returncode:
        pytest.skip(f"needs {OPENCL.package}")
    if not _devices():
        pytest.skip("needs an OpenCL device, such as pocl-opencl-icd")

    def run(model: Model, directory: Path, inputs: dict[str, np.ndarray], kv: str = "float32") -> dict[str, np.ndarray]:
        backend = TvmGpu(OPENCL, kv)
        lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(model.clone())
        backend.emit(Model.of(lowered), directory)
        return backend.open(directory).run(inputs)

    return run
