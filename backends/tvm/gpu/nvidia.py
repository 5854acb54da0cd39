"""CUDA kernels as code for NVIDIA's devices, by the compiler of their toolkit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qc.backends.tvm.toolchain import run_tool

__all__ = ["ARCHITECTURES", "COMPILER", "compile_image"]

COMPILER = "nvcc"
ARCHITECTURES = ("sm_80", "sm_90")
_VIRTUAL = "compute_80"
_QUIET = ("-diag-suppress", "177,1046")  # unused variables, and constants that are rounded to float


def compile_image(sources: Sequence[Path], directory: Path) -> bytes:
    """Compiles kernels for each architecture, and to PTX for those to come; returns all of it as one image.

    Args:
        sources: A kernel each.
        directory: Where ``kernels.sm_80.cubin`` and so on go, and ``kernels.ptx``.
    """
    with tempfile.TemporaryDirectory() as work:
        file, image = Path(work) / "kernels.cu", Path(work) / "kernels.fatbin"
        with file.open("wb") as stream:
            for source in sources:
                with source.open("rb") as one:
                    shutil.copyfileobj(one, stream)
        base = [COMPILER, *_QUIET, "-o"]
        for arch in ARCHITECTURES:
            target = str(directory.resolve() / f"kernels.{arch}.cubin")
            run_tool([*base, target, f"-arch={arch}", "--cubin", str(file)], directory, COMPILER)
        run_tool(
            [*base, str(directory.resolve() / "kernels.ptx"), f"-arch={_VIRTUAL}", "--ptx", str(file)],
            directory,
            COMPILER,
        )
        kinds = [f"arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
        kinds.append(f"arch={_VIRTUAL},code={_VIRTUAL}")
        run_tool([*base, str(image), "--fatbin", *(f"-gencode={k}" for k in kinds), str(file)], directory, COMPILER)
        return image.read_bytes()
