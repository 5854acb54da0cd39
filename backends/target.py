"""What a target is: data about what it can run, and a backend that lowers a model to it and runs the result there."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qc.backends.sampling import GREEDY, Sampling
from qc.ir.errors import InputError
from qc.ir.model import Model, Signature
from qc.passes.pipeline import Step

__all__ = [
    "Backend",
    "Coverage",
    "PreparedRunner",
    "Runner",
    "Target",
    "backend_for",
    "split_targets",
    "target_names",
]


@dataclasses.dataclass(frozen=True)
class Target:
    """What a target can run.

    Attributes:
        name: As in ``--target``.
        about: One line for the listing.
        runtime: The runtime's package and the lowest version that loads what we emit: ``("onnxruntime", "1.26")``.
        formats: Spellings of weight formats that run on a fused kernel: ``int4:g32`` ...
        stage: The stage (`qc.ir.verify.STAGES`) of a model that is lowered for it.
        recipe: The recipe that a compile for it takes unless told otherwise.
        longest: Tokens that a decoder, and another model, takes at most where shapes are fixed; None if they are not.
        simulated: Whether it runs in a simulator here, thousands of times slower than the hardware.
        compilers: Bytes of memory that compilers of kernels take, which keep it until the artifact is measured.
    """

    name: str
    about: str
    runtime: tuple[str, str]
    formats: tuple[str, ...]
    stage: str = "lowered"
    recipe: str = "w4"
    longest: tuple[int, int] | None = None
    simulated: bool = False
    compilers: int = 0


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which nodes of a lowered model run on a kernel made for the job, and which do not.

    Attributes:
        on_target: Number of nodes on the target's own kernels.
        off_target: Number of nodes that run, but slowly or by decoding weights on each call.
        nodes: One entry per kind of node: ``{"op", "count", "on_target", "reason"}``; a reason for each that is off.
        accelerators: What accelerators beside the target would take; see `qc.backends.ort.accelerators`.
    """

    on_target: int
    off_target: int
    nodes: Sequence[Mapping[str, object]]
    accelerators: Sequence[Mapping[str, object]] = ()

    @classmethod
    def counted(cls, nodes: Iterable[tuple[ir.Node, str]], on_target: str = "") -> Coverage:
        """Counts nodes by operator and reason.

        Args:
            nodes: Each node with the reason why it is off the target; empty if it is on it.
            on_target: What to say of those.
        """
        counts = Counter((f"{n.domain}::{n.op_type}" if n.domain else n.op_type, reason) for n, reason in nodes)
        kinds = [
            {"op": op, "count": count, "on_target": not reason, "reason": reason or on_target}
            for (op, reason), count in sorted(counts.items())
        ]
        on = sum(count for (_, reason), count in counts.items() if not reason)
        return cls(on, counts.total() - on, kinds)


class Runner(Protocol):
    """An emitted artifact, loaded in its own runtime.

    Attributes:
        signature: Its inputs and outputs with their roles.
        provenance: Facts about its source, as `Model.provenance`.
    """

    signature: Signature
    provenance: Mapping[str, str]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once. Inputs that the artifact does not have are ignored; a missing one is an `InputError`."""
        ...

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Yields tokens after `tokens`, chosen by `sampling`, until one is in `stop`, which is not yielded."""
        ...


class PreparedRunner(Runner, Protocol):
    """A runner that does better when it knows what it will be asked."""

    def prepare(self, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Says what will be run."""
        ...


class Backend(Protocol):
    """Turns a `Model` into a runtime's files, and loads them."""

    target: Target

    def check(self, model: Model) -> None:
        """Refuses a canonical model for what no recipe changes: called before passes take their time.

        Raises:
            UnsupportedError: If an operator of it does not run on the target, or a tool is missing.
        """
        ...

    def lowering(self) -> Sequence[Step]:
        """The passes that bring a canonical, perhaps quantized model to the target; run by the pass manager."""
        ...

    def coverage(self, model: Model) -> Coverage:
        """Says of each node of a lowered model whether it runs on a fused kernel."""
        ...

    def emit(self, model: Model, directory: Path) -> None:
        """Writes the runtime's files of a lowered model into an empty directory. Deterministic to the byte."""
        ...

    def streamed_bytes(self, directory: Path) -> int:
        """Bytes of weights that an emitted model reads to yield one token; of tables that are only indexed, none."""
        ...

    def open(self, directory: Path, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads an emitted directory in the target's own runtime.

        Args:
            directory: The artifact.
            threads: Threads within an operator; 0 for one per core.
            spinning: Whether idle threads may wait actively; off where two artifacts are compared in one process.
        """
        ...

    def open_in_parts(self, directory: Path, work: Path) -> PreparedRunner:
        """Loads an emitted directory in the target's own runtime, a part of it at a time, to save memory.

        Args:
            directory: The artifact.
            work: Where activations are written.
        """
        ...


def _without_options(name: str, options: str) -> None:
    if options:
        raise InputError(f"Expected the target {name} without options, found {options!r}.")


def _ort_cpu(options: str) -> Backend:
    from qc.backends.ort.backend import OrtCpu

    _without_options("ort-cpu", options)
    return OrtCpu()


def _ort_mobile(options: str) -> Backend:
    from qc.backends.ort.mobile import OrtMobile

    _without_options("ort-mobile", options)
    return OrtMobile()


def _ort_web(options: str) -> Backend:
    from qc.backends.ort.web import OrtWeb

    return OrtWeb.parse(options)


def _ort_npu(options: str) -> Backend:
    from qc.backends.ort.npu.backend import parse

    return parse(options)


def _tvm_cpu(options: str) -> Backend:
    from qc.backends.tvm.backend import TvmCpu

    return TvmCpu.parse(options)


def _tvm_android(options: str) -> Backend:
    from qc.backends.tvm.backend import TvmAndroid

    return TvmAndroid.parse(options)


def _tvm_ios(options: str) -> Backend:
    from qc.backends.tvm.backend import TvmIos

    return TvmIos.parse(options)


def _tvm_gpu(name: str, options: str) -> Backend:
    from qc.backends.tvm.gpu.backend import TvmGpu
    from qc.backends.tvm.gpu.languages import LANGUAGES

    return TvmGpu.parse(LANGUAGES[name], options)


_TARGETS: dict[str, Callable[[str], Backend]] = {
    "ort-cpu": _ort_cpu,
    "ort-mobile": _ort_mobile,
    "ort-npu": _ort_npu,
    "ort-web": _ort_web,
    "tvm-android": _tvm_android,
    "tvm-cpu": _tvm_cpu,
    "tvm-ios": _tvm_ios,
    **{f"tvm-{name}": functools.partial(_tvm_gpu, name) for name in ("cuda", "metal", "opencl", "webgpu")},
}


def target_names() -> list[str]:
    """Names of all targets."""
    return sorted(_TARGETS)


def split_targets(text: str) -> list[str]:
    """Splits a list with commas; a word that names no target is an option of the one before it.

    >>> split_targets("ort-cpu,tvm-cpu:avx2,float,ort-npu:qnn")
    ['ort-cpu', 'tvm-cpu:avx2,float', 'ort-npu:qnn']
    """
    found: list[str] = []
    for word in text.split(","):
        if found and word.partition(":")[0] not in _TARGETS:
            found[-1] += f",{word}"
        else:
            found.append(word)
    return found


def backend_for(target: str) -> Backend:
    """Returns the backend of a target by name, perhaps with options behind a colon: ``tvm-cpu:avx2``.

    Raises:
        InputError: If there is no such target.
    """
    name, _, options = target.partition(":")
    if name not in _TARGETS:
        raise InputError(
            f"Expected a target among {', '.join(target_names())}; found {target!r}. `qc targets` lists them."
        )
    return _TARGETS[name](options)
