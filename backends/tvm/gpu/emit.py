"""Writes the artifact of a model for a GPU: kernels as source text, a launch table, weights, and a C library."""

from __future__ import annotations

from pathlib import Path

from qc.backends.manifest import dump_json
from qc.backends.tvm.emit import EMULATED, build_library, write_facts, write_sources
from qc.backends.tvm.gpu.build import build_kernels
from qc.backends.tvm.gpu.languages import OPENCL, Language
from qc.backends.tvm.gpu.library import GpuWriter, launch_table
from qc.backends.tvm.gpu.ops import lower_for_gpu
from qc.backends.tvm.library import written
from qc.backends.tvm.toolchain import require_header
from qc.ir.model import Model

__all__ = ["LAUNCHES", "emit_for_gpu"]

LAUNCHES = "launches.json"


def emit_for_gpu(model: Model, directory: Path, language: Language) -> None:
    """Writes everything into an existing directory.

    The C library is that of the language; where the language has none, it is the one of OpenCL, aside, and what runs
    here in its place.
    """
    runs = language if language.host else OPENCL
    require_header("cc", runs.header, f"gcc, {runs.package}")
    program, lowering = lower_for_gpu(model)
    kernels = {name: k[:2] for name, k in program.kernels.items()}
    built = build_kernels(kernels, language)
    (directory / "kernels").mkdir()
    for name, kernel in built.items():
        (directory / f"kernels/{name}.{language.suffix}").write_text(kernel.source, "utf-8", newline="\n")
    table = launch_table(program, lowering, model, built, language)
    (directory / LAUNCHES).write_text(dump_json(table), "utf-8", newline="\n")
    writer = GpuWriter(model, lowering, built if runs is language else build_kernels(kernels, runs), runs)
    write_sources(directory, program, written(writer))
    place = directory if runs is language else directory / EMULATED
    tools = ("cc", "ar", f"gcc, {runs.package}")
    build_library(directory, place, {}, tools, [], runs.link)
    if runs is not language:
        for name in ("model.c", "model.h"):
            (directory / name).rename(place / name)
    write_facts(directory, model, lowering, level=language.name)
