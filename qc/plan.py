"""What a compile is going to need, estimated before it starts: artifact size, disk, memory."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qc.ir.blocks import Blocks, find_blocks
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import Format
from qc.passes.pipeline import Step
from qc.passes.sweep import FOLDED, wants_sweep

__all__ = ["Plan", "evaluation_windows", "make_plan", "parse_bytes"]

_BASE_MEMORY = 230 << 20
"""Interpreter, numpy, ONNX Runtime, and some copies of the graph: 200 to 230 MiB for 6 to 32 layers."""

_EXPORT_MEMORY, _EXPORT_NODE = 410 << 20, 84 << 10
"""The process that exports a model of the hub: torch and transformers, and what a node takes; 2 to 32 layers."""

_DECODED_COPIES = 2
"""Float32 copies of a weight that the verifying runtime holds at once: decoded, and transposed. It holds two weights:
now and then it decodes the largest early, which then waits while the others are used."""

_REPACKED = 1.2
"""Memory of weights that a runtime has repacked for its kernels, relative to their files: 4 bits in blocks of 32."""

_LOGITS_COPIES = 3
"""Float32 copies of the widest activation of a window of text: computed, returned, and those around them."""

_WHOLE = 512 << 20
"""Memory of repacked weights up to which an artifact is loaded whole to be measured; a larger one a part at a time."""

_WINDOW, _SHORT_WINDOW = 256, 64
_LARGE = 500_000_000
"""Parameters from which on short windows measure: the logits of a long one would be a tenth of all memory."""

_MEASURING_FLOPS = 2e12
"""Work that measuring an artifact may cost in float: bounds the number of windows for large models."""

_MOST_WINDOWS = 32

_AHEAD = 128 << 20
"""Bytes of weights up to which the float model runs on what is measured while passes work: a few seconds less."""

_STORED_COPIES = 3
"""What the work on quantized weights takes on disk: as quantized, as packed projections, and in the artifact."""

_SMALLEST_MATRIX = 4096
"""Elements; smaller ones stay in float."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimates, in bytes where not said otherwise.

    Attributes:
        parameters: Number of elements of all floating point weights.
        source_bytes: Size of the weights as they are stored now.
        artifact_bytes: Expected size of the artifact's weights.
        memory_bytes: Expected peak of anonymous memory of all processes (mapped weights do not count). Either the
            import decides, or the largest weight in float32 with what a sweep needs, or the artifact, which is loaded
            to be measured. What a pass needs that learns on the whole network comes on top, and activations.
        in_parts: Whether the artifact is so large that it is measured a part at a time, and its speed not at all.
        ahead: Whether the model is so small that the float model is measured while passes work.
        disk_bytes: Space needed beside the artifact's place while working, the artifact included.
        steps: The pipeline.
    """

    parameters: int
    source_bytes: int
    artifact_bytes: int
    memory_bytes: int
    disk_bytes: int
    in_parts: bool
    ahead: bool
    steps: Sequence[Step]

    def check(self, directory: Path, memory: int | None) -> None:
        """Refuses a compile that cannot end well.

        Raises:
            InputError: If the estimate exceeds `memory`, or the free space where the artifact will stand.
        """
        if memory is not None and self.memory_bytes > memory:
            raise InputError(
                f"This compile needs about {_mib(self.memory_bytes)} of memory, more than --memory allows "
                f"({_mib(memory)}). Raise the limit; what decides is the largest weight in float32, or the artifact."
            )
        free = shutil.disk_usage(_existing(directory)).free
        if self.disk_bytes > free:
            raise InputError(
                f"This compile needs about {_mib(self.disk_bytes)} of disk space at {directory}, found {_mib(free)}. "
                "Free some, or choose another output directory."
            )


def make_plan(model: Model, steps: Sequence[Step], *, exported: bool = False, compilers: int = 0) -> Plan:
    """Estimates what compiling `model` through `steps` needs. Reads no weight.

    Matrices count at the format that a ``quantize-weights`` step gives them, everything else as it is stored.

    Args:
        model: As imported.
        steps: The pipeline.
        exported: Whether the import ran an exporter in a process of its own.
        compilers: Bytes that the compilers of the target take.
    """
    format = next((f for f in map(_format, steps) if f is not None), None)
    shapes: Counter[tuple[int, ...]] = Counter()
    parameters = source = artifact = loaded = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        source += tensor.nbytes
        size = read = tensor.nbytes
        if tensor.dtype.is_floating_point():
            shape = tuple(int(d) for d in tensor.shape)
            parameters += tensor.size
            shapes[shape] += 1
            is_matrix = len(shape) == 2 and tensor.size >= _SMALLEST_MATRIX
            size = read = format.stored_bits(shape) // 8 if format is not None and is_matrix else tensor.nbytes
            if format is None or not is_matrix:
                read = 4 * tensor.size
        artifact += size
        loaded += read
    decoded = _decoded(shapes)
    widest = max((shape[0] * _together(shape, count) for shape, count in shapes.items() if len(shape) == 2), default=0)
    length, count = evaluation_windows(parameters)
    window = 4 * length * widest if model.signature.is_decoder else 0
    repacked = int(_REPACKED * loaded)
    blocks = find_blocks(model.graph)
    in_parts = repacked > _WHOLE and bool(blocks.runs)
    ahead = source <= _AHEAD
    working = _BASE_MEMORY + _LOGITS_COPIES * window
    measuring = _WHOLE if in_parts else repacked
    working += max(_DECODED_COPIES * decoded + _sweep_memory(blocks, steps), measuring + compilers)
    working += parameters * max((s.action.bytes_per_parameter for s in steps), default=0)
    working += _DECODED_COPIES * decoded if ahead else 0
    # The import is over by now, but counts for what the machine must have.
    export = _EXPORT_MEMORY + _EXPORT_NODE * sum(1 for _ in model.graph.all_nodes()) if exported else 0
    memory = max(working, export)
    disk = _STORED_COPIES * artifact + count * window + (64 << 20)
    return Plan(parameters, source, artifact, memory, disk, in_parts, ahead, steps)


def _decoded(shapes: Mapping[tuple[int, ...], int]) -> int:
    """Float32 bytes of the largest weight and of the largest of another shape; each may be two packed into one."""
    sizes = sorted(4 * math.prod(shape) * _together(shape, count) for shape, count in shapes.items())
    return sum(sizes[-2:])


def _sweep_memory(blocks: Blocks, steps: Sequence[Step]) -> int:
    """What a sweep takes beside activations: the decoded weights of a block, and what a pass needs for the widest."""
    if not wants_sweep(steps):
        return 0
    held, widest = 0, 0
    for segment in (s for s in blocks.segments if s.kind == "block"):
        tensors = [w.const_value for w in segment.weights if w.const_value is not None]
        size = sum(4 * t.size for t in tensors if t.dtype.is_floating_point())
        held = max(held, size if size <= FOLDED else 0)
        widest = max([widest, *(max(map(int, t.shape)) for t in tensors if len(t.shape) == 2)])
    return held + max(s.action.bytes_for(widest) for s in steps)


def evaluation_windows(parameters: int) -> tuple[int, int]:
    """Tokens of a window, and number of windows of text, that a decoder of that size is measured on."""
    window = _WINDOW if parameters < _LARGE else _SHORT_WINDOW
    affordable = int(_MEASURING_FLOPS / (2 * max(parameters, 1) * window))
    return window, max(1, min(_MOST_WINDOWS, affordable))


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


def _together(shape: tuple[int, ...], count: int) -> int:
    """How many weights of a shape may be packed into one: gate and up, which alone are alike in every layer."""
    return 2 if len(shape) == 2 and count > 2 else 1


def _format(step: Step) -> Format | None:
    from qc.passes.quantize.weights import QuantizeWeights

    return step.action.main_format if isinstance(step.action, QuantizeWeights) else None


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
