"""From a kernel to an object file, and from C to a library: TVM and the system's compilers, behind a cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.ir.errors import InputError, InternalError, UnsupportedError

__all__ = [
    "PAIR",
    "Platform",
    "cache_directory",
    "check_versions",
    "compile_c",
    "compile_kernels",
    "digest_of",
    "require_header",
    "require_tools",
    "run_tool",
    "write_whole",
]

PAIR = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""The versions that work together. The wheel of the first allows 0.1.15 of the second, with which it crashes."""


@dataclasses.dataclass(frozen=True)
class Platform:
    """An operating system and its C tools.

    Attributes:
        triples: LLVM's name by architecture.
        cc: The C compiler by architecture.
        ar: The archiver by architecture.
        package: What to install where a tool is missing.
        emulator: The command that runs a program of it elsewhere; empty if none does.
        apple: LLVM's name of a system of Apple whose objects are what is delivered; then the libraries are those of
            the emulator, and stand aside.
    """

    triples: Mapping[str, str]
    cc: Mapping[str, str]
    ar: Mapping[str, str]
    package: str
    emulator: tuple[str, ...] = ()
    apple: str = ""


def check_versions() -> None:
    """Refuses a pair of packages that is not known to work, before TVM is imported: a wrong one crashes the process.

    Raises:
        UnsupportedError: With what is installed, why it is refused and what to install.
    """
    found: dict[str, str | None] = {}
    for package in PAIR:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if found == PAIR:
        return
    wanted = " ".join(f"{p}=={v}" for p, v in PAIR.items())
    have = ", ".join(f"{p} {v or 'missing'}" for p, v in found.items())
    raise UnsupportedError(
        f"Expected {wanted}, found {have}. Other pairs crash while they compile: apache-tvm-ffi 0.1.15 does, "
        f"although apache-tvm allows it. Run `pip install {wanted}`."
    )


def compile_kernels(kernels: Mapping[str, tuple[Any, tuple[Any, ...]]], isa: Isa, triple: str) -> dict[str, bytes]:
    """Compiles kernels, each to an object file of its own; those compiled before come from the cache.

    Args:
        kernels: By name: a generator and its arguments; ``generator(isa, name, *arguments)`` yields the function.
        isa: The level.
        triple: LLVM's name of the platform.

    Returns:
        The object file of each.
    """
    check_versions()
    found, cache = {}, cache_directory()
    for name, (generator, arguments) in sorted(kernels.items()):
        key = (
            f"{_sources()}\n{PAIR}\n{isa}\n{triple}\n{name}\n{generator.__module__}.{generator.__qualname__}{arguments}"
        )
        kept = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.o"
        if not kept.is_file():
            write_whole(kept, _compile(generator(isa, name, *arguments), name, isa, triple))
        found[name] = kept.read_bytes()
    return found


def _compile(function: Any, name: str, isa: Isa, triple: str) -> bytes:
    import tvm
    from tvm.target import Target

    options: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": isa.cpu}
    if isa.features:
        options["mattr"] = [f"+{f}" for f in isa.features]
    module = tvm.IRModule({name: function})
    try:
        built = tvm.compile(module, target=Target(options), tir_pipeline=_register_pipeline())
    except Exception as error:
        raise InternalError(f"TVM does not compile the kernel {name}: {error}") from error
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.o"
        (built.mod if hasattr(built, "mod") else built).write_to_file(str(file))
        return file.read_bytes()


@functools.cache
def _register_pipeline() -> str:
    """Registers the passes from a kernel to plain C functions; TVM takes a pipeline by its name only.

    It is the usual list without ``MakePackedAPI``: functions keep their parameters and need no runtime. What that pass
    also does, telling which device the body runs on, is done here.
    """
    import tvm
    from tvm import s_tir, tirx
    from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes
    from tvm.tirx import compilation_pipeline

    @tvm.tirx.transform.prim_func_pass(opt_level=0)
    def on_host(function: Any, module: Any, context: Any) -> Any:
        node = tvm.ir.StringImm("default")
        body = tirx.AttrStmt(node, "device_type", tirx.const(1, "int32"), function.body)
        return function.with_body(tirx.AttrStmt(node, "device_id", tirx.const(0, "int32"), body))

    s, x = s_tir.transform, tirx.transform
    # Without CompactBufferAllocation: buffers have their size, and its analysis of bounds overflows on some kernels.
    passes = [
        s.CanonicalizeLoop(), s.LowerInitBlock(), s.PlanAndUpdateBufferAllocationLocation(), s.ConvertBlocksToOpaque(),
        s.LowerMatchBuffer(), s.StmtSimplify(), s.LowerOpaqueBlock(), x.FlattenBuffer(),
        x.NarrowDataType(32), s.LoopPartition(), x.VectorizeLoop(True), x.PointerValueTypeRewrite(), x.UnrollLoop(),
        x.StmtSimplify(), x.RemoveNoOp(), x.CommonSubexprElim(), on_host,
    ]  # fmt: skip

    @tvm.transform.module_pass(opt_level=0)
    def lower(module: Any, _context: Any) -> Any:
        return tvm.ir.transform.Sequential(passes)(module)

    name = "qc_plain_c"
    compilation_pipeline.register_tir_pipeline(name, lambda: (lower, finalize_host_passes, finalize_device_passes))
    return name


def compile_c(compiler: Sequence[str], directory: Path, sources: Sequence[str], target: str, package: str) -> None:
    """Compiles the first of `sources`, which includes the others, to `target`; a result from before is taken again."""
    content = b"".join((directory / name).read_bytes() for name in sources)
    version = _version(compiler[0]) if shutil.which(compiler[0]) is not None else ""
    key = hashlib.sha256(f"{compiler}{version}".encode() + content).hexdigest()[:32]
    kept = cache_directory() / f"{key}.o"
    if not kept.is_file():
        run_tool([*compiler, "-c", sources[0], "-o", target], directory, package)
        write_whole(kept, (directory / target).read_bytes())
    (directory / target).write_bytes(kept.read_bytes())


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603


def require_header(compiler: str, header: str, package: str) -> None:
    """Refuses to compile what includes a header that is not installed.

    Raises:
        UnsupportedError: With what to install.
    """
    found = shutil.which(compiler) is not None
    if found:
        command = [compiler, "-E", "-include", header, "-x", "c", os.devnull]
        found = subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603
    if not found:
        raise UnsupportedError(f"Expected {compiler} to find {header}, it does not. Install {package}.")


def require_tools(tools: Sequence[str], package: str) -> None:
    """Refuses to go on without a tool.

    Raises:
        UnsupportedError: With what to install.
    """
    missing = next((tool for tool in tools if shutil.which(tool) is None), None)
    if missing is not None:
        raise UnsupportedError(f"Expected the tool {missing}, found none. Install it ({package}) and compile again.")


def run_tool(command: Sequence[str], directory: Path, package: str) -> None:
    """Runs a compiler or archiver.

    Raises:
        UnsupportedError: If it is not installed.
        InternalError: If it fails: what it reads is generated.
    """
    require_tools(command[:1], package)
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise InternalError(f"{command[0]} failed on generated files: {done.stderr.strip()[-2000:]}")


@functools.cache
def _sources() -> str:
    """A digest of everything that a kernel is generated from."""
    root = Path(__file__).parent
    return digest_of([*(root / "kernels").glob("*.py"), root / "isa.py", root / "toolchain.py"])


def digest_of(files: Sequence[Path]) -> str:
    """A digest of source files; tests among them do not count."""
    digest = hashlib.sha256()
    for file in sorted(files):
        if not file.name.endswith("_test.py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_directory() -> Path:
    """Where kernels are kept by content."""
    base = os.environ.get("QC_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "qc" / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_cache(directory, error) from error
    return directory


def _no_cache(directory: Path, error: OSError) -> InputError:
    return InputError(
        f"Cannot keep compiled kernels in {directory} ({error.strerror}). Free some space, or set QC_CACHE to another "
        "directory."
    )


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file that appears complete: other processes read the cache too."""
    try:
        handle, name = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            os.replace(name, file)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        raise _no_cache(file.parent, error) from error
