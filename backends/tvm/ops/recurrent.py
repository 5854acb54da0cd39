"""Recurrent layers: a product of all inputs, then a loop over time: a product of the state, and a kernel of gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.kernels.recurrent import ACTIVATIONS, Cell, recurrent_cell
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.loops import copy
from qc.backends.tvm.ops.products import Tail, multiply
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, Size, dim
from qc.ir.quant import Weight
from qc.ir.recurrent import GATES, STACKS, direction_weights

__all__ = ["recurrent"]

_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_REVERSED = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
_TIME = "qc_t"


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What all directions share.

    Attributes:
        node: The layer.
        x: Its input: time, batch, channels.
        hidden: Elements of a state.
        lengths: How many steps each row has, if they differ.
        outputs: Every state, the last one, and the last one of cells; those that are wanted.
    """

    node: ir.Node
    x: Tensor
    hidden: int
    lengths: Tensor | None
    outputs: Sequence[Tensor | None]

    @property
    def batch(self) -> Dim:
        """Rows that each state has."""
        return self.x.shape[1]


@operator("LSTM", "GRU", "RNN")
def recurrent(at: Lowering, node: ir.Node) -> None:
    """All directions, one after the other: they share nothing but the input.

    The state lies in the output of last states, where that is wanted.
    """
    inputs, states = (direction_weights(node.inputs[slot]) for slot in STACKS)
    x, lengths = at.input(node, 0), at.input(node, 4)
    assert x is not None
    if inputs is None or states is None:
        raise at.refuse(node, "its weights are computed")
    if x.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, f"it is computed in {x.dtype.name}")
    if at.attribute(node, "layout", 0):
        raise at.refuse(node, "its batch comes before its time")
    reversed_ = _REVERSED[str(at.attribute(node, "direction", "forward"))]
    hidden, count, (seq, batch, _) = states[0].shape[1], len(reversed_), x.shape
    rows, one = GATES[node.op_type] * hidden, (count, batch, hidden)
    outputs = [
        at.result(value, shape) if value.uses() or value.is_graph_output() else None
        for value, shape in zip(node.outputs, ((seq, *one), one, one), strict=False)
    ]
    for weights, columns in ((inputs, x.shape[-1]), (states, dim(hidden))):
        _require(
            at, [dim(len(weights)), *(dim(s) for w in weights for s in w.shape)], (count, *(rows, columns) * count)
        )
    for slot, shape in enumerate([(count, 2 * rows), (batch,), one, one, (count, 3 * hidden)], 3):
        held = at.input(node, slot)
        if held is not None:
            _require(at, held.shape, shape)
    lengths = None if lengths is None else at.contiguous(lengths)
    layer = _Layer(node, x, hidden, lengths, [*outputs, *[None] * (3 - len(outputs))])
    functions = _activations(at, node, count)
    for direction, pair in enumerate(zip(inputs, states, strict=True)):
        _direction(at, layer, direction, reversed_[direction], pair, functions[direction])


def _require(at: Lowering, sizes: Sequence[Dim], wanted: Sequence[Size]) -> None:
    for size, other in zip(sizes, wanted, strict=True):
        at.program.require_equal(size, other)


def _direction(
    at: Lowering, layer: _Layer, direction: int, backward: bool, weights: tuple[Weight, Weight],
    functions: tuple[tuple[str, tuple[float, ...]], ...],
) -> None:  # fmt: skip
    node, n, (w, r) = layer.node, layer.hidden, weights
    rows = GATES[node.op_type] * n
    sums = at.program.tensor((*layer.x.shape[:2], rows))
    _product(at, layer, layer.x, w, _part(at, node, 3, direction, slice(0, rows)), sums)
    every, last, last_cell = layer.outputs
    h = _state(at, layer, 5, last, direction)
    c = _state(at, layer, 6, last_cell, direction) if node.op_type == "LSTM" else None
    bias = _part(at, node, 3, direction, slice(rows, 2 * rows))
    peepholes = _part(at, node, 7, direction, slice(0, 3 * n))
    clip = at.attribute(node, "clip")
    cell = Cell(
        node.op_type,
        functions,
        clip=None if clip is None else float(clip),  # type: ignore[arg-type]
        coupled=bool(at.attribute(node, "input_forget", 0)),
        peepholes=peepholes is not None,
        resets=bool(at.attribute(node, "linear_before_reset", 0)),
        lengths=layer.lengths is not None,
        whole=every is not None,
    )
    product, now = at.program.tensor((layer.batch, rows)), dim(_TIME)
    x = sums.view((layer.batch, rows), (rows, 1), sums.strides[0] * now)
    held = {"x": x, "p": product, "h": h, "c": c, "peepholes": peepholes, "lengths": layer.lengths}
    if every is not None:
        held["y"] = _part_of(every.view(every.shape[1:], every.strides[1:], every.strides[0] * now), direction)
    with at.repeated(_loop(layer, backward)):
        _product(at, layer, h, r, bias, product)
        if node.op_type == "GRU" and not cell.resets:
            scaled, held["q"] = at.program.tensor((layer.batch, n)), at.program.tensor((layer.batch, rows))
            _step(at, layer, dataclasses.replace(cell, op="reset", lengths=False, whole=True), held | {"y": scaled})
            _product(at, layer, scaled, r, bias, held["q"])
        _step(at, layer, cell, held)


def _loop(layer: _Layer, backward: bool) -> str:
    steps = layer.x.shape[0].c
    if backward:
        return f"for (int64_t {_TIME} = {steps} - 1; {_TIME} >= 0; {_TIME}--)"
    return f"for (int64_t {_TIME} = 0; {_TIME} < {steps}; {_TIME}++)"


def _part_of(states: Tensor, direction: int) -> Tensor:
    """The rows of a direction of a tensor ``[directions, batch, hidden]``."""
    return states.view(states.shape[1:], states.strides[1:], states.strides[0] * direction)


def _product(at: Lowering, layer: _Layer, x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    multiply(at, x, weight, bias, Tail(layer.node.outputs[0], None, "none"), y, exact=at.exact)


def _step(at: Lowering, layer: _Layer, cell: Cell, held: Mapping[str, Tensor | None]) -> None:
    """Calls the kernel of gates on tensors by the names of its pointers."""
    tensors = {name: t for name in cell.pointers if (t := held.get(name)) is not None}
    name = at.program.kernel("recurrent", recurrent_cell, cell, pointers=len(tensors), integers=6)
    distances = [t.strides[0] if (t := held.get(n)) is not None else 0 for n in ("x", "h", "c", "y")]
    written = [t for n, t in tensors.items() if n in ("h", "c", "y")]
    at.program.call(name, list(tensors.values()), [layer.hidden, *distances, dim(_TIME)], layer.batch, writes=written)


def _state(at: Lowering, layer: _Layer, slot: int, result: Tensor | None, direction: int) -> Tensor:
    """Rows of a state, as they are before the first step."""
    initial = at.input(layer.node, slot)
    if initial is None:
        zero = at.program.array(np.zeros(1, np.float32))
        initial = zero.view((layer.batch, layer.hidden), (0, 0))
    else:
        initial = _part_of(at.stored(initial), direction)
    size = (layer.batch, layer.hidden)
    return copy(at, initial, at.program.tensor(size) if result is None else _part_of(result, direction))


def _part(at: Lowering, node: ir.Node, slot: int, direction: int, part: slice) -> Tensor | None:
    """Numbers of a direction of an input ``[directions, n]``."""
    held = at.input(node, slot)
    if held is None:
        return None
    held = at.contiguous(held)
    return held.view((part.stop - part.start,), (1,), held.strides[0] * direction + part.start)


def _activations(at: Lowering, node: ir.Node, directions: int) -> list[tuple[tuple[str, tuple[float, ...]], ...]]:
    """Of each direction, the functions with their parameters, which attributes list for those that have some."""
    defaults = _DEFAULTS[node.op_type]
    names: Sequence[str] = at.attribute(node, "activations") or defaults * directions  # type: ignore[assignment]
    if len(names) != len(defaults) * directions:
        raise at.refuse(node, f"it has {len(names)} activations")
    given = [iter(at.attribute(node, f"activation_{name}") or ()) for name in ("alpha", "beta")]  # type: ignore[call-overload]
    found = []
    for name in names:
        known = next((n for n in ACTIVATIONS if n.lower() == name.lower()), None)
        if known is None:
            raise at.refuse(node, f"its activation is {name}")
        parameters = [next(numbers, default) for numbers, default in zip(given, ACTIVATIONS[known][0], strict=False)]
        if None in parameters:
            raise at.refuse(node, f"its activation {name} has no parameters")
        found.append((known, tuple(map(float, parameters))))
    each = len(defaults)
    return [tuple(found[i : i + each]) for i in range(0, len(found), each)]
