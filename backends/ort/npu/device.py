"""ONNX Runtime with an NPU behind it, with the NPU's simulator, or alone where neither exists."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qc.ir.errors import UnsupportedError
from qc.ir.runtime import describe

__all__ = ["PACKAGE", "CpuSession", "FixedSession", "NpuSession", "is_simulator", "open_session", "write_context"]

PACKAGE = ("onnxruntime-qnn", "2.7")
"""The package with the plugin for Qualcomm's NPUs, and the lowest version that runs what we emit."""

_PROVIDER = "QNNExecutionProvider"

_MOST_NAMED = 8


class FixedSession(Protocol):
    """A loaded graph of fixed shapes.

    Attributes:
        inputs: The shape of each input.
    """

    inputs: Mapping[str, tuple[int, ...]]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once on arrays of the fixed shapes."""
        ...


def open_session(file: Path, facts: Mapping[str, Any], threads: int) -> FixedSession:
    """Loads one of the graphs of an artifact: on the NPU if it is for Qualcomm's, else on the processor.

    Raises:
        UnsupportedError: If the NPU does not take a node, or there is none.
    """
    if facts["unit"] != "qnn":
        return CpuSession(file, threads)
    return NpuSession(_context_file(file) if facts["context"] else file, facts["soc"])


class CpuSession:
    """A model on the processor.

    Attributes:
        inputs: The shape of each input.
    """

    def __init__(self, file: Path, threads: int) -> None:
        """Loads a model.

        Args:
            file: The model.
            threads: Threads within an operator; 0 for one per core.
        """
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        self.inputs = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once."""
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))


class NpuSession:
    """A model of which every node runs on the NPU: the processor takes nothing over.

    Attributes:
        inputs: The shape of each input.
        outputs: Names of the outputs.
    """

    def __init__(self, file: Path, soc: int) -> None:
        """Compiles a model for the NPU and loads it.

        Args:
            file: The model.
            soc: The number by which Qualcomm's tools call the chip.

        Raises:
            UnsupportedError: If a node does not run there, or there is no NPU.
        """
        try:
            self._session = _session(file, soc, {"session.disable_cpu_ep_fallback": "1"})
        except UnsupportedError:
            raise
        except Exception as error:
            left = _left(file, soc)
            raise UnsupportedError(
                f"Expected every node of {file.name} to run on the NPU, which refuses {left or describe(error)}. "
                "Compile for another target, or write these operators otherwise."
            ) from error
        self.inputs = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once on arrays of the fixed shapes."""
        return dict(zip(self.outputs, self._session.run(None, dict(inputs)), strict=True))


def _context_file(file: Path) -> Path:
    """The file that loads what a graph was compiled to; the compiled code lies beside it."""
    return file.with_name(f"{file.stem}_ctx.onnx")


def write_context(file: Path, soc: int) -> None:
    """Compiles a graph and writes the result beside it, so that loading takes no compiler.

    Not the same bytes each time: the plugin names the code after the directory that the graph lies in.

    Raises:
        UnsupportedError: If there is no NPU, nor its simulator.
    """
    entries = {"ep.context_enable": "1", "ep.context_embed_mode": "0", "ep.context_file_path": str(_context_file(file))}
    _session(file, soc, {"session.disable_cpu_ep_fallback": "1", **entries})


def is_simulator() -> bool:
    """Whether the plugin of this machine simulates the NPU: chips of Qualcomm have arm64 processors."""
    return platform.machine() not in ("aarch64", "arm64", "ARM64")


def _session(file: Path, soc: int, entries: Mapping[str, str]) -> Any:
    import onnxruntime as ort

    device, backend = _device()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices([device], {"backend_path": backend, "soc_model": str(soc)})
    with _without_chatter():
        return ort.InferenceSession(str(file), options)


def _left(file: Path, soc: int) -> str:
    """The nodes that the NPU does not take; empty if the runtime does not say."""
    try:
        session = _session(file, soc, {"session.record_ep_graph_assignment_info": "1"})
        parts = session.get_provider_graph_assignment_info()
    except Exception:  # noqa: BLE001  only an explanation is lost
        return ""
    nodes = [f"{n.op_type} at {n.name!r}" for part in parts if part.ep_name != _PROVIDER for n in part.get_nodes()]
    more = [f"and {len(nodes) - _MOST_NAMED} more"] if len(nodes) > _MOST_NAMED else []
    return ", ".join(nodes[:_MOST_NAMED] + more)


@functools.cache
def _device() -> tuple[Any, str]:
    """The device of the plugin, and the library of its backend."""
    import onnxruntime as ort

    try:
        import onnxruntime_qnn
    except ImportError:
        package, minimum = PACKAGE
        raise UnsupportedError(
            f"The target ort-npu:qnn runs in {package} >= {minimum}, which is not installed. Run "
            f"`pip install {package}`; on x86-64 Linux it brings a simulator of the NPU."
        ) from None
    ort.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    found = [d for d in ort.get_ep_devices() if d.ep_name == _PROVIDER]
    if not found:
        raise UnsupportedError("onnxruntime-qnn finds neither an NPU nor its simulator on this machine.")
    return found[0], onnxruntime_qnn.get_qnn_htp_path()


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps what the simulator prints about itself out of our standard output, which may be JSON."""
    flush = getattr(ctypes.CDLL(None), "fflush", None) if os.name == "posix" else None
    if flush is None:
        yield
        return
    flush(None)
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
