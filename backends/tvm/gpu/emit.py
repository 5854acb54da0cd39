"""Writes the artifact of a model for a GPU: kernels as source text, a launch table, weights, and a C library."""

from __future__ import annotations

import shutil
from pathlib import Path

from qc.backends.manifest import dump_json
from qc.backends.tvm.emit import EMULATED, build_library, write_c, write_facts, write_weights
from qc.backends.tvm.gpu.build import build_kernels
from qc.backends.tvm.gpu.languages import CUDA, OPENCL, Language
from qc.backends.tvm.gpu.library import GpuWriter, launch_table
from qc.backends.tvm.gpu.nvidia import COMPILER, compile_image
from qc.backends.tvm.gpu.ops import lower_for_gpu
from qc.backends.tvm.host import template
from qc.backends.tvm.kernels.caches import Cells
from qc.backends.tvm.library import written
from qc.backends.tvm.toolchain import check_versions, require_header, require_tools
from qc.ir.model import Model

__all__ = ["LAUNCHES", "emit_for_gpu", "require_tools_of_gpu"]

LAUNCHES = "launches.json"

_TOOLS, _PACKAGES = ("cc", "ar"), f"gcc, {OPENCL.package}"


def require_tools_of_gpu() -> None:
    """Refuses to go on without the compilers, or without the headers that a library includes."""
    check_versions()
    require_tools(_TOOLS, _PACKAGES)
    require_header(_TOOLS[0], OPENCL.header, _PACKAGES)


def emit_for_gpu(model: Model, directory: Path, language: Language, cells: Cells) -> None:
    """Writes everything into an existing directory.

    The C library is that of the language. Where it is another one than OpenCL, that of OpenCL stands aside, which runs
    in its place where the device is missing. A library for CUDA needs kernels that are compiled already, so there is
    one if the compiler is here.

    Args:
        model: A lowered model; unchanged.
        directory: Where to.
        language: Of the kernels.
        cells: What caches of keys and values are stored in.
    """
    require_tools_of_gpu()
    program, lowering = lower_for_gpu(model, cells)
    kernels = {name: k[:2] for name, k in program.kernels.items()}
    built = build_kernels(kernels, language)
    (directory / "kernels").mkdir()
    for name, kernel in built.items():
        (directory / f"kernels/{name}.{language.suffix}").write_text(kernel.source, "utf-8", newline="\n")
    table = launch_table(program, lowering, model, built, language)
    (directory / LAUNCHES).write_text(dump_json(table), "utf-8", newline="\n")
    if language is OPENCL:
        writers = {directory: GpuWriter(model, lowering, built, OPENCL)}
    else:
        writers = {directory / EMULATED: GpuWriter(model, lowering, build_kernels(kernels, OPENCL), OPENCL)}
    if language is CUDA and shutil.which(COMPILER) is not None:
        image = compile_image(sorted((directory / "kernels").iterdir()), directory)
        writers[directory] = GpuWriter(model, lowering, built, CUDA, image)
    made, digest, model_id = {}, 0, None
    for place, writer in writers.items():
        made[place] = written(writer, model_id)
        if model_id is None:
            model_id = made[place].model_id
            digest = write_weights(directory, program, model_id)
    for place, writer in writers.items():
        place.mkdir(exist_ok=True)
        write_c(place, made[place], digest)
        build_library(place, place, {}, (*_TOOLS, _PACKAGES), [], writer.language.link)
    if language.module:
        (directory / language.module).write_text(template(language.module), "utf-8", newline="\n")
    assert model_id is not None
    write_facts(directory, model, lowering, model_id, level=language.name)
