"""The verifying executor: ONNX Runtime over a model whose weights stay on disk.

This is how every stage is checked: independent of our own executor, with optimizations off, so that what runs is what
the graph says. Weights are mapped, never copied: a decode node runs when its consumer does, so memory is that of the
largest decoded weight.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import InputError, InternalError
from qc.ir.schedule import order_for_memory
from qc.ir.store import SMALL, Store

__all__ = ["Session", "describe", "flatten", "serialize"]

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of malloc.h."""

_LARGE = 1 << 27
"""Of decoded weights, in bytes; what a smaller model leaves in the heap costs less than mapping it again and again."""


class Session:
    """Runs a model.

    Attributes:
        outputs: Names of the values that `run` returns, in order.
    """

    def __init__(self, model: ir.Model, *, optimize: bool = False, fold: bool = False, threads: int = 0) -> None:
        """Loads `model`; its weights must stay where they are while this object lives.

        Args:
            model: Any valid model. Weights that lie in memory are written to a temporary file first if large.
            optimize: Whether the runtime may rewrite the graph (then it also copies weights).
            fold: Whether what depends on weights alone is computed once, and stays in memory in the layout that kernels
                like. For many runs; sums come in another order.
            threads: Threads within an operator; 0 for one per core.

        Raises:
            InternalError: If the runtime refuses the model: every stage must be executable.
        """
        import onnxruntime as ort

        if _decoded_bytes(model) > _LARGE:
            _return_freed_blocks()
        self._spill = Store()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False
        levels = ort.GraphOptimizationLevel
        basic = levels.ORT_ENABLE_BASIC if fold else levels.ORT_DISABLE_ALL
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else basic
        # Weights come from several directories; a common root lets one model refer to them all without copies.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if fold:
            options.add_session_config_entry("session.disable_quant_qdq", "1")  # else decode nodes are not folded
        elif not optimize:
            # Kernels that repack their weights copy them, and MatMulNBits then takes scales that a node makes for zero.
            options.add_session_config_entry("session.disable_prepacking", "1")
        message = serialize(model, self._spill)
        try:
            self._session = ort.InferenceSession(message, options, ["CPUExecutionProvider"])
        except Exception as error:
            raise InternalError(f"ONNX Runtime refuses the model at this stage: {describe(error)}") from error
        self.outputs = [o.name for o in self._session.get_outputs()]
        self._inputs = {i.name for i in self._session.get_inputs()}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the model; inputs that it does not have are ignored.

        Returns:
            Arrays by output name; see `flatten` for sequences.

        Raises:
            InputError: If the runtime fails on these inputs.
        """
        given = {k: v for k, v in inputs.items() if k in self._inputs}
        try:
            return flatten(self.outputs, self._session.run(None, given))
        except Exception as error:
            raise InputError(f"{describe(error)}. Check the values and shapes of the inputs.") from error


def _decoded_bytes(model: ir.Model) -> int:
    """Bytes of the weights in float; at most two codes lie in a byte."""
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    return sum(t.nbytes if t.dtype.is_floating_point() else 8 * t.nbytes for t in tensors if t is not None)


@functools.cache
def _return_freed_blocks() -> None:
    """Makes glibc give freed blocks of at least 1 MiB back to the system.

    By default that limit grows to 32 MiB with what a program frees, and decoded weights below it then stay in the heap:
    0.9 GiB after a model of 1.2 billion parameters.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, 1 << 20)


def flatten(names: Sequence[str], values: Sequence[object]) -> dict[str, np.ndarray]:
    """Names what a runtime returned, as arrays only.

    A sequence counts as its items, ``name[0]``, ``name[1]``..., a map as its keys and values, and an empty optional as
    nothing.
    """
    found: dict[str, np.ndarray] = {}
    for name, value in zip(names, values, strict=True):
        if isinstance(value, list):
            found |= flatten([f"{name}[{i}]" for i in range(len(value))], value)
        elif isinstance(value, dict):
            found |= {f"{name}.keys": np.array(list(value)), f"{name}.values": np.array(list(value.values()))}
        elif value is not None:
            found[name] = np.asarray(value)
    return found


def describe(error: Exception) -> str:
    """What ONNX Runtime says, on one line, without its own prefixes and source lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else repr(error)
    return re.sub(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )+", "", text).rstrip(". ")


def _drop_unused(graph: ir.Graph) -> None:
    """Removes what nothing reads, but no single output of a node: some kernels ask for all of theirs."""
    for node in reversed(tuple(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in tuple(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]


def serialize(model: ir.Model, spill: Store) -> bytes:
    """Serializes the graph with every large weight as a reference into the file that holds it.

    Nodes are written in the order that takes least memory to run, without those that lead nowhere, which the runtime
    would run too; for that, operators of the dialect are replaced by their bodies here.

    Args:
        model: The model; unchanged on return.
        spill: Takes large weights that lie in memory.
    """
    from onnx_ir.passes import common

    written = model.clone()
    common.InlinePass(lambda function: function.domain == dialect.DOMAIN)(written)
    _drop_unused(written.graph)
    order_for_memory(written.graph)
    for graph in written.graphs():
        for value in graph.initializers.values():
            value.const_value = _reference(value.const_value, spill)
    return ir.to_proto(written).SerializeToString()


def _reference(tensor: ir.TensorProtocol | None, spill: Store) -> ir.TensorProtocol | None:
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return tensor
    if not isinstance(tensor, ir.ExternalTensor):
        if tensor.nbytes <= SMALL:
            return tensor
        # A store keeps the element type, so sub-byte codes are packed as they were.
        tensor = spill.put(tensor.name or "weight", tensor.numpy(), tensor.dtype)
    assert isinstance(tensor, ir.ExternalTensor)
    path = Path(tensor.path).resolve()
    return ir.ExternalTensor(
        str(path.relative_to("/")),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir="/",
    )
