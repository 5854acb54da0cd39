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
    MEAN_ABS = "mean magnitude"
    """``E|x_k|``, likewise."""
    ABS_MAX = "largest magnitude"
    """``max |x_k|``, likewise."""


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
    probes = {r: _Probe(r, f"qc.statistic.{i}", opset) for i, r in enumerate(dict.fromkeys(requests))}
    graph, own = model.graph, list(model.graph.outputs)
    graph.outputs.clear()  # a batch of logits and of the cache may weigh as much as the largest weight
    for probe in probes.values():
        graph.register_initializer(probe.axes)
        graph.extend(probe.nodes)
        graph.outputs.extend(probe.outputs)
    try:
        session = Session(model)
    finally:
        graph.outputs.clear()
        graph.outputs.extend(own)
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


@dataclasses.dataclass(frozen=True)
class _Method:
    """How a statistic is computed.

    Attributes:
        each: What is done to each element, as an operator and how often it reads the element.
        reduce: The reduction over all axes but the last.
        fused: Whether the reduction does to each element what `each` does.
        join: Joins the results of two batches.
        mean: Whether the joined result is divided by the number of elements of a channel.
    """

    each: tuple[str, int]
    reduce: str
    fused: bool
    join: np.ufunc
    mean: bool


_METHODS = {
    Statistic.SECOND_MOMENT: _Method(("Mul", 2), "ReduceSumSquare", fused=True, join=np.add, mean=True),
    Statistic.MEAN_ABS: _Method(("Abs", 1), "ReduceL1", fused=True, join=np.add, mean=True),
    Statistic.ABS_MAX: _Method(("Abs", 1), "ReduceMax", fused=False, join=np.maximum, mean=False),
}


class _Probe:
    """Nodes that compute one statistic of a batch: its reduction over all axes but the last, and its size."""

    def __init__(self, request: Request, name: str, opset: int) -> None:
        value, self._method = request.value, _METHODS[request.statistic]
        rank = value.shape.rank() if value.shape is not None else 0
        if rank < 1:
            raise ValueError(f"Pass developer: a statistic of {value.name!r} needs its rank; infer shapes first.")
        axes = ir.tensor(np.arange(rank - 1), dtype=ir.DataType.INT64, name=f"{name}.axes")
        self.axes = ir.Value(
            name=axes.name, const_value=axes, shape=ir.Shape([rank - 1]), type=ir.TensorType(ir.DataType.INT64)
        )
        self.nodes = [*self._reduction(value, rank, opset), ir.node("Size", [value])]
        self.outputs = [node.outputs[0] for node in self.nodes[-2:]]
        self._names = [f"{name}.reduced", f"{name}.size"]
        types = (ir.DataType.FLOAT, ir.DataType.INT64)
        for output, label, dtype in zip(self.outputs, self._names, types, strict=True):
            output.name, output.type = label, ir.TensorType(dtype)
        self._joined: np.ndarray | None = None
        self._size = 0

    def _reduction(self, value: ir.Value, rank: int, opset: int) -> list[ir.Node]:
        operator, times = self._method.each
        nodes = []
        if rank == 1 or not self._method.fused:
            nodes = [ir.node(operator, [value] * times)]
        if rank == 1:  # without axes to reduce, the operator would reduce all
            return nodes
        source = nodes[0].outputs[0] if nodes else value
        if opset >= _AXES_ARE_INPUTS:
            return [*nodes, ir.node(self._method.reduce, [source, self.axes], {"keepdims": 0})]
        return [*nodes, ir.node(self._method.reduce, [source], {"keepdims": 0, "axes": list(range(rank - 1))})]

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        """Adds a batch."""
        reduced, size = (results[name] for name in self._names)
        reduced = reduced.astype(np.float64)
        self._joined = reduced if self._joined is None else self._method.join(self._joined, reduced)
        self._size += int(size)

    def result(self) -> np.ndarray:
        """The statistic over all batches, ``[K]``."""
        channels = np.asarray(self._joined)
        return channels * channels.size / max(self._size, 1) if self._method.mean else channels
