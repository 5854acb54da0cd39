"""Writes the artifact of a lowered model: C sources, libraries, weights, and what the runner must know."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qc.backends.manifest import dump_json
from qc.backends.tvm.apple import write_framework
from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.caches import Cells
from qc.backends.tvm.library import Sources, feeds_text, sources
from qc.backends.tvm.lower import Lowering, lower_to_program
from qc.backends.tvm.program import Program
from qc.backends.tvm.toolchain import Platform, compile_c, compile_kernels, run_tool
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model, Port

__all__ = [
    "EMULATED",
    "FACTS",
    "build_library",
    "emit",
    "identity",
    "library_directory",
    "write_c",
    "write_facts",
    "write_weights",
]

FACTS, LIBRARY, WEIGHTS = "model.json", "libmodel.so", "model.weights"

EMULATED = "emulated"
"""Where libraries lie that are no part of an app, but run here in its place."""

_HEADER = 64
_LANES = 1024
_MAGIC = b"QCTVMW1\0"
_LARGEST = (1 << 31) - 1
_STEP = 1 << 21
"""Bytes that are written at a time: what Linux holds of a file in pieces of a large page, it may map in such pages."""


def emit(model: Model, directory: Path, isa: Isa, platform: Platform, *, exact: bool, cells: Cells) -> None:
    """Writes everything into an existing directory.

    Args:
        model: A lowered model; unchanged.
        directory: Where to.
        isa: The level of the kernels.
        platform: For which system.
        exact: Whether products with quantized weights keep activations in float.
        cells: What caches of keys and values are stored in.
    """
    program, lowering = lower_to_program(model, isa, exact=exact, cells=cells)
    kernels = {n: k[:2] for n, k in program.kernels.items()}
    objects = compile_kernels(kernels, isa, platform.triples[isa.arch])
    made = sources(model, lowering)
    write_c(directory, made, write_weights(directory, program, made.model_id))
    _build(directory, objects, isa, platform)
    if platform.apple:
        write_framework(compile_kernels(kernels, isa, platform.apple), directory)
    write_facts(directory, model, lowering, made.model_id, level=isa.name, march=_MARCH[isa.name])


def write_weights(directory: Path, program: Program, model_id: int) -> int:
    """Writes the weights of a model, and returns their hash."""
    too_large = next((b for b in program.blobs if b.bytes > _LARGEST), None)
    if too_large is not None:
        raise UnsupportedError(
            f"Expected weights of at most 2 GiB each, found one of {too_large.bytes} bytes once packed. Quantize it."
        )
    return _write_weights(program, directory / WEIGHTS, model_id)


def write_c(directory: Path, made: Sources, digest: int) -> None:
    """Writes the C files for weights of that hash."""
    (directory / "model.h").write_text(made.header, "utf-8", newline="\n")
    (directory / "model.c").write_text(made.with_hash(digest), "utf-8", newline="\n")


def identity(weights: Path) -> str:
    """What tells that a weights file belongs to a library, as its facts spell it."""
    with weights.open("rb") as stream:
        return stream.read(24)[16:][::-1].hex()


def write_facts(directory: Path, model: Model, lowering: Lowering, model_id: int, **more: object) -> None:
    """Writes what the runner must know, and the files of the model that go along."""
    facts = {
        "model": f"{model_id:016x}",
        "inputs": [_port(p) for p in model.signature.inputs],
        "outputs": [_port(p) for p in model.signature.outputs],
        "provenance": model.provenance,
        "dimensions": list(lowering.program.dims),
        "caches": [v.name for v in lowering.cached],
        "cells": lowering.cells.name,
        "decoder": feeds_text(model, lowering),
        "streamed_bytes": _streamed(lowering.program),
        **more,
    }
    (directory / FACTS).write_text(dump_json(facts), "utf-8", newline="\n")
    for name, source in sorted(model.assets.items()):
        shutil.copyfile(source, directory / name)


def library_directory(directory: Path, platform: Platform) -> Path:
    """Where the compiled libraries of an artifact lie."""
    return directory / EMULATED if platform.apple else directory


def _build(directory: Path, objects: Mapping[str, bytes], isa: Isa, platform: Platform) -> None:
    """Compiles the C source and links it with the kernels."""
    tools = (platform.cc[isa.arch], platform.ar[isa.arch], platform.package)
    flags = [f"-march={_MARCH[isa.name]}"]
    if isa.arch == "aarch64":
        flags.append("-mno-outline-atomics")  # else counting calls functions that are not of libc
    build_library(directory, library_directory(directory, platform), objects, tools, flags)


def build_library(
    directory: Path, place: Path, objects: Mapping[str, bytes], tools: tuple[str, str, str], flags: Sequence[str],
    links: Sequence[str] = (),
) -> None:  # fmt: skip
    """Compiles ``model.c``, and links it to a shared and a static library.

    Args:
        directory: Where it lies.
        place: Where the libraries go.
        objects: Object files of kernels by name.
        tools: The compiler, the archiver, and what to install where one is missing.
        flags: Of the compiler.
        links: Libraries beside those of C.
    """
    work, (cc, ar, package) = directory / "objects", tools
    work.mkdir()
    place.mkdir(exist_ok=True)
    try:
        names = []
        for name, content in objects.items():
            (work / f"{name}.o").write_bytes(content)
            names.append(f"objects/{name}.o")
        common = ["-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=off"]
        compile_c([cc, *common, *flags], directory, ["model.c", "model.h"], "objects/model.o", package)
        names.insert(0, "objects/model.o")
        link = ["-shared", "-s", "-Wl,-soname,libmodel.so", "-Wl,-z,noexecstack", "-Wl,-z,defs", "-Wl,--gc-sections"]
        exports = ["-Wl,--version-script=objects/exports"]
        (work / "exports").write_text("{ global: qc_*; local: *; };", "utf-8")
        shared, static = (str((place / n).relative_to(directory)) for n in (LIBRARY, "libmodel.a"))
        run_tool([cc, *link, *exports, "-o", shared, *names, *links, "-lm", "-lpthread"], directory, package)
        run_tool([ar, "rcsD", static, *names], directory, package)
    finally:
        shutil.rmtree(work)


_MARCH = {
    "avx512vnni": "cascadelake", "avx2": "haswell", "x86-64": "x86-64-v2", "neon-i8mm": "armv8.2-a+dotprod+i8mm+fp16",
    "neon-dotprod": "armv8.2-a+dotprod", "neon": "armv8-a",
}  # fmt: skip


def _write_weights(program: Program, file: Path, model_id: int) -> int:
    """Writes the weights, one at a time, behind a header of 64 bytes; returns their hash."""
    size = program.weight_bytes
    with file.open("w+b", buffering=_STEP) as stream:
        stream.write(bytes(_HEADER))
        for blob in program.blobs:
            _write(stream, memoryview(bytes(_HEADER + blob.offset - stream.tell())))
            content = np.ascontiguousarray(blob.make())
            if content.nbytes != blob.bytes:
                raise AssertionError(f"A weight has {content.nbytes} bytes, planned were {blob.bytes}.")
            _write(stream, memoryview(content.reshape(-1).view(np.uint8)))
            del content
        stream.flush()
        value = _hash(stream, size)
        stream.seek(0)
        stream.write(_MAGIC + struct.pack("<QQQ", size, model_id, value))
    return value


def _write(stream: BinaryIO, content: memoryview) -> None:
    """Writes to a stream that buffers steps, never beyond the end of one: so the system gets them whole."""
    while content.nbytes:
        size = _STEP - stream.tell() % _STEP
        stream.write(content[:size])
        content = content[size:]


def _hash(stream: BinaryIO, size: int) -> int:
    """The hash that ``runtime.c`` computes: lanes of 64 bits side by side, mixed in order at the end."""
    golden, wide, prime = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x9E3779B185EBCA87))
    with np.errstate(over="ignore"):
        lanes = np.arange(_LANES, dtype=np.uint64) * golden
        stream.seek(_HEADER)
        while chunk := stream.read(_LANES * 8 * 256):
            padded = np.frombuffer(chunk + bytes(-len(chunk) % (_LANES * 8)), np.uint64).reshape(-1, _LANES)
            for row in padded * wide:
                mixed = lanes + row
                lanes = ((mixed << np.uint64(31)) | (mixed >> np.uint64(33))) * prime
    total = _mix(size)
    for j, lane in enumerate(lanes.tolist()):
        total = (_mix(total ^ lane) + j) & 0xFFFFFFFFFFFFFFFF
    return total


def _mix(x: int) -> int:
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & 0xFFFFFFFFFFFFFFFF
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 33


def _streamed(program: Program) -> int:
    """Bytes of weights that one run reads whole: all that a kernel takes."""
    return sum({b.index: b.bytes.constant or 0 for b in program.streamed}.values())


def _port(port: Port) -> dict[str, Any]:
    return {**dataclasses.asdict(port), "dtype": port.dtype.name, "shape": list(port.shape)}
