"""What passes want to know about activations, and how it is collected: in the graph, so that only results leave it."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.probe import find_inputs
from qc.ir.runtime import Session

__all__ = ["SYNTHETIC_SIZES", "Request", "Statistic", "collect", "synthetic"]

_AXES_ARE_INPUTS = 18
"""The opset from which reductions take their axes as an input."""

_MOST_SAMPLES = 1024

SYNTHETIC_SIZES = {"batch": 4, "seq": 64, "past": 0}
"""Sizes of the inputs that statistics are collected on when nobody gives any."""

_BINS = 1 << 14
"""Bins of a histogram: at least 16 for each step of an 8-bit grid that holds everything."""

_GRAM_ROWS, _TILE = 2048, 512
"""Rows that are multiplied at once, and columns: adding products up in float64 then costs little beside them."""

_SMALLEST_EXPONENT = -100
"""Of the power of two that a histogram reaches to; a value that is always zero has none."""


class Statistic(enum.Enum):
    """What can be collected."""

    SECOND_MOMENT = "second moment"
    """``E[x_k^2]`` of each channel k of the last axis, float64 ``[K]``."""
    MEAN_ABS = "mean magnitude"
    """``E|x_k|``, likewise."""
    ABS_MAX = "largest magnitude"
    """``max |x_k|``, likewise."""
    MIN = "minimum"
    """``min x_k``, likewise."""
    MAX = "maximum"
    """``max x_k``, likewise."""
    GRAM = "second moments"
    """``E[x_j x_k]`` of each pair of channels, float64 ``[K, K]``; its diagonal is `SECOND_MOMENT`."""
    HISTOGRAM = "histogram"
    """How many entries of x lie where, float64 ``[2, B]``: points in ascending order, and the number around each."""
    WEIGHTED_HISTOGRAM = "weighted histogram"
    """Likewise, with each entry of channel k counted ``Request.weights()[k]`` times."""
    SAMPLES = "samples"
    """Rows of x themselves, evenly spaced over all batches, float32 ``[S, K]`` with S between 512 and 1024 where there
    are as many."""


_OF_NUMBERS = frozenset({Statistic.SECOND_MOMENT, Statistic.MEAN_ABS, Statistic.GRAM, Statistic.SAMPLES})
"""Statistics that a single NaN spoils; ranges and histograms may be of values with infinities, such as masks."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A statistic of one value of the main graph.

    Attributes:
        statistic: What to collect.
        value: Of what.
        weights: Yields what each channel counts, for `Statistic.WEIGHTED_HISTOGRAM`. Two requests that differ in
            nothing else are the same.
    """

    statistic: Statistic
    value: ir.Value
    weights: Callable[[], np.ndarray] | None = dataclasses.field(default=None, compare=False)


def collect(
    model: Model,
    requests: Sequence[Request],
    batches: Iterable[Mapping[str, np.ndarray]] | None = None,
    seed: int = 0,
    *,
    fold: bool = False,
) -> dict[Request, np.ndarray]:
    """Runs `model` on `batches` in the verifying runtime and returns what was asked for.

    What operators can compute of a statistic is computed by nodes that are added to the graph for the while. The model
    is unchanged on return.

    Args:
        model: The model as it stands.
        requests: What to collect.
        batches: Inputs by name; None makes random tokens, or standard normal images. They say little about the mean of
            an activation but much about which channels are large.
        seed: Seed of what is made.
        fold: Whether memory holds all weights as floats: see `Session`.

    Returns:
        An array for each request; nothing if no inputs could be made that the model runs on.

    Raises:
        InputError: If a mean is asked for of what is no number.
    """
    batches = synthetic(model, seed) if batches is None else batches
    opset = model.opset_imports.get("", 1)
    probes = {r: _probe(r, f"qc.statistic.{i}", opset) for i, r in enumerate(dict.fromkeys(requests))}
    graph, own = model.graph, list(model.graph.outputs)
    graph.outputs.clear()  # a batch of logits and of the cache may weigh as much as the largest weight
    for probe in probes.values():
        for constant in probe.constants:
            graph.register_initializer(constant)
        graph.extend(probe.nodes)
        graph.outputs.extend(probe.outputs)
    try:
        session = Session(model, fold=fold)
    finally:
        graph.outputs.clear()
        graph.outputs.extend(own)
        for probe in probes.values():
            graph.remove(probe.nodes, safe=True)
            for constant in probe.constants:
                graph.initializers.pop(constant.name or "")
    seen = False
    for number, results in enumerate(map(session.run, batches)):
        seen = True
        for request, probe in probes.items():
            _require_numbers(request, [results[str(v.name)] for v in probe.outputs], number)
            probe.add(results)
    return {request: probe.result() for request, probe in probes.items()} if seen else {}


def synthetic(model: Model, seed: int) -> list[Mapping[str, np.ndarray]]:
    """One batch that the whole model runs on, made up; none if none was found."""
    return list(find_inputs(model, Session(model).run, seed, SYNTHETIC_SIZES).batches[:1])


def _require_numbers(request: Request, found: Sequence[np.ndarray], batch: int) -> None:
    if request.statistic not in _OF_NUMBERS or all(np.isfinite(np.sum(x, dtype=np.float64)) for x in found):
        return
    reader = next((n.metadata_props.get("qc.scope") or n.op_type for n, _ in request.value.uses()), "")
    raise InputError(
        f"Expected numbers in {request.value.name!r}, which {reader or 'nothing'} reads, found NaN, infinity or "
        f"what is too large to be squared on calibration batch {batch}. Leave it out, or check the weights before it."
    )


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
    Statistic.MIN: _Method(("Identity", 1), "ReduceMin", fused=True, join=np.minimum, mean=False),
    Statistic.MAX: _Method(("Identity", 1), "ReduceMax", fused=True, join=np.maximum, mean=False),
}
"""The statistics of single channels."""


class _Probe:
    """Nodes that compute one statistic of a batch.

    Attributes:
        constants: Initializers that the nodes read.
        nodes: What is added to the graph.
        outputs: What is returned by a run.
    """

    def __init__(self, nodes: Sequence[ir.Node], outputs: Mapping[str, ir.Value], constants: Sequence[ir.Value] = ()):
        self.constants, self.nodes, self.outputs = constants, nodes, tuple(outputs.values())
        self._names = tuple(outputs)
        for name, output in outputs.items():
            size = output.producer().op_type == "Size"
            output.name, output.type = name, ir.TensorType(ir.DataType.INT64 if size else ir.DataType.FLOAT)

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        """Adds a batch."""
        raise TypeError(f"Bug: {type(self).__name__} does not say what becomes of a batch")

    def result(self) -> np.ndarray:
        """The statistic over all batches."""
        raise TypeError(f"Bug: {type(self).__name__} has no result")


def _probe(request: Request, name: str, opset: int) -> _Probe:
    value = request.value
    rank = value.shape.rank() if value.shape is not None else 0
    if rank < 1:
        raise ValueError(f"Pass developer: a statistic of {value.name!r} needs its rank; infer shapes first.")
    match request.statistic:
        case Statistic.GRAM:
            return _GramProbe(value, rank, name)
        case Statistic.SAMPLES:
            return _SampleProbe(value, rank, name)
        case Statistic.HISTOGRAM | Statistic.WEIGHTED_HISTOGRAM:
            return _HistogramProbe(value, rank, name, request.weights)
        case statistic:
            return _ChannelProbe(value, rank, name, _METHODS[statistic], opset)


class _ChannelProbe(_Probe):
    """The reduction of a batch over all axes but the last, and its size."""

    def __init__(self, value: ir.Value, rank: int, name: str, method: _Method, opset: int) -> None:
        self._method = method
        tensor = ir.tensor(np.arange(rank - 1), dtype=ir.DataType.INT64, name=f"{name}.axes")
        kind = ir.TensorType(ir.DataType.INT64)
        axes = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape([rank - 1]), type=kind)
        reduction, size = self._reduction(value, axes, rank, opset), ir.node("Size", [value])
        outputs = {f"{name}.reduced": reduction[-1].outputs[0], f"{name}.size": size.outputs[0]}
        super().__init__([*reduction, size], outputs, [axes])
        self._joined: np.ndarray | None = None
        self._size = 0

    def _reduction(self, value: ir.Value, axes: ir.Value, rank: int, opset: int) -> list[ir.Node]:
        operator, times = self._method.each
        nodes = []
        if rank == 1 or not self._method.fused:
            nodes = [ir.node(operator, [value] * times)]
        if rank == 1:  # without axes to reduce, the operator would reduce all
            return nodes
        source = nodes[0].outputs[0] if nodes else value
        if opset >= _AXES_ARE_INPUTS:
            return [*nodes, ir.node(self._method.reduce, [source, axes], {"keepdims": 0})]
        return [*nodes, ir.node(self._method.reduce, [source], {"keepdims": 0, "axes": list(range(rank - 1))})]

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        reduced, size = (results[name] for name in self._names)
        reduced = reduced.astype(np.float64)
        self._joined = reduced if self._joined is None else self._method.join(self._joined, reduced)
        self._size += int(size)

    def result(self) -> np.ndarray:
        channels = np.asarray(self._joined)
        return channels * channels.size / max(self._size, 1) if self._method.mean else channels


class _GramProbe(_Probe):
    """The sum of products of rows with themselves, ``[K, K]``. Few rows wait for others; sums of them are in float64.

    Only tiles on and above the diagonal are computed.
    """

    def __init__(self, value: ir.Value, rank: int, name: str) -> None:
        flat = ir.node("Flatten", [value], {"axis": rank - 1})
        super().__init__([flat], {f"{name}.rows": flat.outputs[0]})
        self._sum: np.ndarray | None = None
        self._waiting: list[np.ndarray] = []
        self._rows = 0

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        rows = results[self._names[0]]
        self._waiting.append(rows.astype(np.float32, copy=False))
        self._rows += len(rows)
        if sum(map(len, self._waiting)) >= _GRAM_ROWS:
            self._multiply()

    def _multiply(self) -> None:
        rows = np.concatenate(self._waiting)
        self._waiting.clear()
        size = rows.shape[1]
        if self._sum is None:
            self._sum = np.zeros((size, size))
        for start in range(0, size, _TILE):
            tile = slice(start, start + _TILE)
            self._sum[tile, start:] += rows[:, tile].T @ rows[:, start:]

    def result(self) -> np.ndarray:
        if self._waiting:
            self._multiply()
        gram = np.asarray(self._sum)
        for start in range(0, len(gram), _TILE):
            stop = start + _TILE
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return gram / max(self._rows, 1)


class _HistogramProbe(_Probe):
    """Counts in bins of equal width that cover ``[-2^e, 2^e]``.

    The exponent e grows with what is seen; then neighbouring bins are joined, which needs no second look at earlier
    batches. So memory does not depend on the number of batches, nor the result on their order.
    """

    def __init__(self, value: ir.Value, rank: int, name: str, weights: Callable[[], np.ndarray] | None) -> None:
        flat = ir.node("Flatten", [value], {"axis": rank - 1})
        super().__init__([flat], {f"{name}.rows": flat.outputs[0]})
        self._weights = None if weights is None else weights()
        self._counts = np.zeros(_BINS)
        self._exponent: int | None = None

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        rows = results[self._names[0]]
        finite = np.isfinite(rows)
        largest = float(np.abs(rows, where=finite, out=np.zeros_like(rows)).max(initial=0.0))
        self._widen(max(math.frexp(largest)[1], _SMALLEST_EXPONENT))
        assert self._exponent is not None
        position = rows[finite] * (_BINS / 2 / 2.0**self._exponent) + _BINS / 2
        bins = np.clip(position.astype(np.int64), 0, _BINS - 1)
        counted = None if self._weights is None else np.broadcast_to(self._weights, rows.shape)[finite]
        self._counts += np.bincount(bins, counted, _BINS)

    def _widen(self, exponent: int) -> None:
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            joined = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.zeros(_BINS)
            self._counts[_BINS // 4 : -_BINS // 4] = joined
            self._exponent += 1

    def result(self) -> np.ndarray:
        width = 2.0 ** (1 + (self._exponent or 0)) / _BINS
        return np.stack([(np.arange(_BINS) - _BINS / 2 + 0.5) * width, self._counts])


class _SampleProbe(_Probe):
    """Every n-th row over all batches; n doubles whenever there are too many, so that they stay evenly spaced."""

    def __init__(self, value: ir.Value, rank: int, name: str) -> None:
        flat = ir.node("Flatten", [value], {"axis": rank - 1})
        super().__init__([flat], {f"{name}.rows": flat.outputs[0]})
        self._kept: list[np.ndarray] = []
        self._step, self._seen = 1, 0

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        rows = results[self._names[0]]
        self._kept.append(rows[-self._seen % self._step :: self._step].copy())
        self._seen += len(rows)
        while sum(map(len, self._kept)) > _MOST_SAMPLES:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._step *= 2

    def result(self) -> np.ndarray:
        return np.concatenate(self._kept)
