"""What passes want to know about activations, and how it is collected: in the graph, so that only results leave it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.model import Model
from qc.ir.probe import find_inputs
from qc.ir.runtime import Session

__all__ = ["Request", "Statistic", "collect"]

_AXES_ARE_INPUTS = 18
"""The opset from which reductions take their axes as an input."""

_SYNTHETIC_SIZES = {"batch": 4, "seq": 64, "past": 0}


class Statistic(enum.Enum):
    """What can be collected."""

    SECOND_MOMENT = "second moment"
    """``E[x_k^2]`` of each channel k of the last axis, float64 ``[K]``."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A statistic of one value of the main graph."""

    statistic: Statistic
    value: ir.Value


def collect(
    model: Model,
    requests: Sequence[Request],
    batches: Sequence[Mapping[str, np.ndarray]] | None = None,
    seed: int = 0,
) -> dict[Request, np.ndarray]:
    """Runs `model` on `batches` in the verifying runtime and returns what was asked for.

    Each statistic is computed by nodes that are added to the graph for the while, so activations never leave the
    runtime. The model is unchanged on return.

    Args:
        model: The model as it stands.
        requests: What to collect.
        batches: Inputs by name; None makes random tokens, or standard normal images. They say little about the mean of
            an activation but much about which channels are large.
        seed: Seed of what is made.

    Returns:
        An array for each request; nothing if no inputs could be made that the model runs on.
    """
    opset = model.opset_imports.get("", 1)
    probes = {r: _SecondMoment(r.value, f"qc.statistic.{i}", opset) for i, r in enumerate(dict.fromkeys(requests))}
    graph, count = model.graph, len(model.graph.outputs)
    for probe in probes.values():
        graph.register_initializer(probe.axes)
        graph.extend(probe.nodes)
        graph.outputs.extend(node.outputs[0] for node in probe.nodes)
    try:
        session = Session(model)
    finally:
        del graph.outputs[count:]
        for probe in probes.values():
            graph.remove(probe.nodes, safe=True)
            graph.initializers.pop(probe.axes.name or "")
    if batches is None:
        outputs = find_inputs(model, session.run, seed, _SYNTHETIC_SIZES).outputs[:1]
    else:
        outputs = map(session.run, batches)
    seen = False
    for results in outputs:
        seen = True
        for probe in probes.values():
            probe.add(results)
    return {request: probe.result() for request, probe in probes.items()} if seen else {}


class _SecondMoment:
    """Two nodes: the sum of squares over all axes but the last, and the number of elements."""

    def __init__(self, value: ir.Value, name: str, opset: int) -> None:
        rank = value.shape.rank() if value.shape is not None else 0
        if rank < 1:
            raise ValueError(f"Pass developer: a statistic of {value.name!r} needs its rank; infer shapes first.")
        axes = ir.tensor(np.arange(rank - 1), dtype=ir.DataType.INT64, name=f"{name}.axes")
        self.axes = ir.Value(
            name=axes.name, const_value=axes, shape=ir.Shape([rank - 1]), type=ir.TensorType(ir.DataType.INT64)
        )
        # Without axes to reduce, the operator would by default reduce all of them.
        if opset >= _AXES_ARE_INPUTS:
            attributes = {"keepdims": 0, "noop_with_empty_axes": 1}
            squares = ir.node("ReduceSumSquare", [value, self.axes], attributes)
        elif rank > 1:
            squares = ir.node("ReduceSumSquare", [value], {"keepdims": 0, "axes": list(range(rank - 1))})
        else:
            squares = ir.node("Mul", [value, value])
        self.nodes = [squares, ir.node("Size", [value])]
        self._names = [f"{name}.sum", f"{name}.size"]
        types = (ir.DataType.FLOAT, ir.DataType.INT64)
        for node, label, dtype in zip(self.nodes, self._names, types, strict=True):
            node.outputs[0].name, node.outputs[0].type = label, ir.TensorType(dtype)
        self._sum: np.ndarray | float = 0.0
        self._size = 0

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        """Adds a batch."""
        total, size = (results[name] for name in self._names)
        self._sum = self._sum + total.astype(np.float64)
        self._size += int(size)

    def result(self) -> np.ndarray:
        """The mean over all batches, ``[K]``."""
        channels = np.asarray(self._sum)
        return channels * channels.size / max(self._size, 1)
