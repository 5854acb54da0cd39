"""Objects and libraries for iOS, read by LLVM's tools: what a linker on a Mac would read."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.apple import FRAMEWORK, TRIPLE, for_simulator
from qc.backends.tvm.backend import IOS, TvmIos
from qc.backends.tvm.isa import level
from qc.backends.tvm.kernels.rows import softmax
from qc.backends.tvm.toolchain import compile_kernels
from qc.ir.model import Model
from qc.ir.runtime import Session

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

FUNCTIONS = {"_memcpy", "_memset", "_expf", "_erff", "_tanhf", "_powf", "_logf", "_sqrtf", "_bzero"}
"""Of libc and libm, and nothing else."""

SYSCTL = "int sysctlbyname(const char *, void *, unsigned long *, void *, unsigned long);\n"

needs_cross = pytest.mark.skipif(
    not all(shutil.which(t) for t in (IOS.cc["aarch64"], IOS.emulator[0])), reason=f"needs {IOS.package}"
)
needs_llvm = pytest.mark.skipif(shutil.which("llvm-nm") is None, reason="needs llvm")


def read(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def test_objects_for_the_simulator_are_those_that_llvm_makes_for_it() -> None:
    made = [
        compile_kernels({"qck_softmax": (softmax, ())}, level("neon"), triple)["qck_softmax"]
        for triple in (TRIPLE, f"{TRIPLE}-simulator")
    ]
    assert made[0] != made[1]
    assert for_simulator(made[0]) == made[1]


@pytest.fixture
def artifact(linear: Callable[[str], tuple[Model, np.ndarray]], tmp_path: Path) -> tuple[Path, Model, np.ndarray]:
    """One linear layer for iOS, with an input."""
    model, x = linear("quantize-weights{format=int4,group=32}")
    TvmIos().emit(model, tmp_path)
    return tmp_path, model, x


@needs_cross
@needs_llvm
def test_a_library_is_read_by_llvm_and_needs_libc_only(artifact: tuple[Path, Model, np.ndarray]) -> None:
    directory = artifact[0]
    declared = set(re.findall(r"^extern void (\w+)\(", (directory / "model.c").read_text(), re.MULTILINE))
    held = plistlib.loads((directory / FRAMEWORK / "Info.plist").read_bytes())["AvailableLibraries"]
    assert {(h["SupportedPlatform"], h.get("SupportedPlatformVariant")) for h in held} == {
        ("ios", None),
        ("ios", "simulator"),
    }
    for entry in held:
        library = directory / FRAMEWORK / entry["LibraryIdentifier"] / entry["LibraryPath"]
        members = read("llvm-ar", "t", library).split()
        assert members == [f"{name}.o" for name in sorted(declared)]
        table = read("llvm-nm", "--print-armap", library).partition("\n\n")[0]
        indexed = dict(line.split(" in ") for line in table.splitlines() if " in " in line)
        assert {f"_{name}": f"{name}.o" for name in declared}.items() <= indexed.items()
        weak = {line.split()[-1] for line in read("llvm-nm", "-m", library).splitlines() if "weak external" in line}
        assert set(indexed) - {f"_{name}" for name in declared} <= weak, "what several kernels bring along"
        listed = read("llvm-nm", "-u", library).splitlines()
        assert {line.split()[-1] for line in listed if line and not line.endswith(":")} - set(indexed) <= FUNCTIONS
        headers = read("llvm-objdump", "--macho", "--private-headers", library)
        platform = "iossimulator" if "SupportedPlatformVariant" in entry else "ios"
        assert set(re.findall(r"platform (\w+)", headers)) == {platform}
        assert set(re.findall(r"MH_MAGIC_64\s+(\w+)", headers)) == {"ARM64"}


@needs_cross
def test_the_source_compiles_where_apple_is(artifact: tuple[Path, Model, np.ndarray], tmp_path: Path) -> None:
    """With one header of Apple's written here: what says which instructions a processor has."""
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys/sysctl.h").write_text(SYSCTL)
    command = [IOS.cc["aarch64"], "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-U__linux__", "-D__APPLE__"]
    read(*command, "-I", tmp_path, "-c", artifact[0] / "model.c", "-o", tmp_path / "model.o")
    assert "sysctlbyname" in read("nm", "-u", tmp_path / "model.o")


@needs_cross
def test_swift_sees_the_functions_that_it_calls(artifact: tuple[Path, Model, np.ndarray], tmp_path: Path) -> None:
    """The module's source compiles, and its header declares for C what the Swift code reads of it."""
    package = artifact[0] / "ios"
    module = package / "Sources/CQcModel"
    header = re.search(r'header "(.*)"', (module / "include/module.modulemap").read_text())
    assert header is not None
    called = set(re.findall(r"\b(?:qc|QC)_\w+", (package / "Sources/QcModel/Model.swift").read_text()))
    assert {"qc_open", "qc_create", "qc_run", "QC_OK", "qc_options"} <= called
    uses = "".join(f"  (void)sizeof({name});\n" for name in sorted(called))
    (tmp_path / "use.c").write_text(f'#include "{header[1]}"\nvoid use(void) {{\n{uses}}}\n')
    command = [IOS.cc["aarch64"], "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-pointer-arith"]
    read(*command, "-I", module / "include", "-c", tmp_path / "use.c", "-o", tmp_path / "use.o")
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys/sysctl.h").write_text(SYSCTL)
    apple = ["-Wno-unknown-pragmas", "-U__linux__", "-D__APPLE__", "-I", tmp_path]
    read(*command, *apple, "-c", module / "qc_model.c", "-o", tmp_path / "model.o")
    defined = set(read("nm", "--defined-only", tmp_path / "model.o").split())
    assert {name for name in called if name.startswith("qc_")} - {"qc_options"} <= defined
    manifest = (package / "Package.swift").read_text()
    assert 'path: "QCKernels.xcframework"' in manifest
    assert (package / "QCKernels.xcframework" / "Info.plist").is_file()


@needs_cross
def test_the_same_kernels_run_in_an_emulator(artifact: tuple[Path, Model, np.ndarray]) -> None:
    directory, model, x = artifact
    found = TvmIos().open(directory, threads=1).run({"x": x})["y"]
    expected = Session(model).run({"x": x})["y"]
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
    assert not (directory / "libmodel.so").exists()
