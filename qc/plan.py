"""What a compile is going to need, estimated before it starts: artifact size, disk, memory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import Format
from qc.passes.pipeline import Step

__all__ = ["Plan", "make_plan", "parse_bytes"]

_BASE_MEMORY = 220 << 20
"""Interpreter, numpy, ONNX Runtime and the graph itself; measured on a 20-layer decoder."""

_DECODED_COPIES = 3
"""Float32 copies of the largest weight alive at once while a stage is verified: decoded, transposed, one to spare."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimates, in bytes where not said otherwise.

    Attributes:
        parameters: Number of elements of all floating point weights.
        source_bytes: Size of the weights as they are stored now.
        artifact_bytes: Expected size of the artifact's weights.
        memory_bytes: Expected peak of anonymous memory (weights are memory-mapped and do not count).
        disk_bytes: Space needed beside the artifact's place while working, the artifact included.
        steps: The pipeline.
    """

    parameters: int
    source_bytes: int
    artifact_bytes: int
    memory_bytes: int
    disk_bytes: int
    steps: Sequence[Step]

    def check(self, directory: Path, memory: int | None) -> None:
        """Refuses a compile that cannot end well.

        Raises:
            InputError: If the estimate exceeds `memory`, or the free space where the artifact will stand.
        """
        if memory is not None and self.memory_bytes > memory:
            raise InputError(
                f"This compile needs about {_mib(self.memory_bytes)} of memory, more than --memory allows "
                f"({_mib(memory)}). Raise the limit; the largest weight decides, not the size of the model."
            )
        free = shutil.disk_usage(_existing(directory)).free
        if self.disk_bytes > free:
            raise InputError(
                f"This compile needs about {_mib(self.disk_bytes)} of disk space at {directory}, found {_mib(free)}. "
                "Free some, or choose another output directory."
            )


def make_plan(model: Model, steps: Sequence[Step]) -> Plan:
    """Estimates what compiling `model` through `steps` needs. Reads no weight.

    Matrices count at the format that a ``quantize-weights`` step gives them, everything else at 32 bits.
    """
    format = next((f for f in map(_format, steps) if f is not None), None)
    parameters = source = artifact = largest = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        source += tensor.nbytes
        if not tensor.dtype.is_floating_point():
            artifact += tensor.nbytes
            continue
        shape = tuple(int(d) for d in tensor.shape)
        parameters += tensor.size
        largest = max(largest, 4 * tensor.size)
        is_matrix = len(shape) == 2 and tensor.size >= 4096
        artifact += format.stored_bits(shape) // 8 if format is not None and is_matrix else 4 * tensor.size  # type: ignore[arg-type]
    memory = _BASE_MEMORY + max(_DECODED_COPIES * largest, artifact)
    return Plan(parameters, source, artifact, memory, 2 * artifact + (64 << 20), steps)


def parse_bytes(text: str) -> int:
    """Reads a size such as ``8G``, ``512M`` or ``1073741824``.

    Raises:
        InputError: If it is not one.
    """
    number, unit = text.rstrip("iBb"), ""
    if number and number[-1].upper() in _UNITS:
        number, unit = number[:-1], number[-1].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError) as error:
        raise InputError(f"Expected a size such as 8G or 512M, found {text!r}.") from error
    if size <= 0:
        raise InputError(f"Expected a size above zero, such as 8G or 512M, found {text!r}.")
    return size


def _format(step: Step) -> Format | None:
    from qc.passes.quantize.weights import QuantizeWeights

    return step.action.main_format if isinstance(step.action, QuantizeWeights) else None


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
