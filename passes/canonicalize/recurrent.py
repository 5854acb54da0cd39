"""The stacked weights of recurrent layers become matrices, one for each direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.recurrent import GATES, direction_weights
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    drop_unused,
    lazily,
    made_by,
    main_nodes,
    stored,
    too_old,
)

__all__ = ["RecogniseRecurrent"]

_Read = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RecogniseRecurrent(Pass):
    """Brings the weights of ``LSTM``, ``GRU`` and ``RNN`` to the form of `qc.ir.recurrent`.

    ``W [D, N, K]`` becomes ``Concat(Unsqueeze(W_0), Unsqueeze(W_1))`` of matrices ``[N, K]``, and so does R; biases and
    peepholes become one constant each. Exporters put them together by ``Slice``, ``Concat``, ``Unsqueeze``, ... from
    parameters, whose order of gates is another; what they do is done each time a matrix is read, and nothing is copied.
    A matrix has the name of the parameter that it is made of, if it is one. Exact up to the order of
    summation in the runtime's kernels.

    Left alone: layers with a weight that is computed in another way, and weights in canonical form.
    """

    contract: ClassVar[Contract] = Exact()

    def call(self, model: ir.Model, context: object = None) -> Result:
        nodes, obstacle = list(main_nodes(model, *GATES)), too_old(model)
        if not nodes or obstacle is not None:
            return Result(model, False, [Site(site_name(n), Outcome.SKIPPED, obstacle or "") for n in nodes])
        made: dict[ir.Value, ir.Value] = {}
        matrices: dict[ir.Value, str] = {}
        result = Result.of(model, [_site(node, made, matrices) for node in nodes])
        if result.modified:
            drop_unused(model)
            for matrix, name in matrices.items():
                if name not in model.graph.initializers:
                    matrix.name = name
        return result


def _site(node: ir.Node, made: dict[ir.Value, ir.Value], matrices: dict[ir.Value, str]) -> Site:
    """Rewrites the weights of a node.

    Args:
        node: A recurrent layer.
        made: What became of the weights that are done.
        matrices: Those of them that are matrices, and what they shall be called.
    """
    try:
        wanted = {slot: _tensor(node.inputs[slot]) for slot in _open_slots(node)}
    except Decline as reason:
        return Site(site_name(node), Outcome.SKIPPED, str(reason))
    for slot, tensor in wanted.items():
        value = node.inputs[slot]
        assert value is not None
        if value not in made:
            made[value] = (
                _stack(node, value, tensor, matrices)
                if slot in _MATRICES
                else add_constant(node.graph, value.name or "bias", tensor)
            )
        node.replace_input_with(slot, made[value])
    return Site(site_name(node), Outcome.CHANGED if wanted else Outcome.MATCHED)


_MATRICES = (1, 2)
_VECTORS = (3, 7)
"""Inputs that hold biases and the peepholes of an LSTM."""


def _open_slots(node: ir.Node) -> Iterator[int]:
    """The inputs that are not in canonical form."""
    yield from (slot for slot in _MATRICES if direction_weights(node.inputs[slot]) is None)
    for slot in _VECTORS:
        value = node.inputs[slot] if slot < len(node.inputs) else None
        if value is not None and stored(value) is None:
            yield slot


def _stack(node: ir.Node, value: ir.Value, whole: ir.TensorProtocol, matrices: dict[ir.Value, str]) -> ir.Value:
    """``Unsqueeze`` of the matrix of each direction, one behind the other."""
    graph, (count, *shape) = node.graph, whole.shape.numpy()
    names = _names(value, count)
    axis = add_constant(graph, f"{names[0]}.axis", ir.tensor(np.array([0], np.int64)))
    nodes = []
    for direction, name in enumerate(names):
        matrix = add_constant(graph, name, lazily(whole, lambda x, direction=direction: x[direction], shape))
        matrices[matrix] = name
        nodes.append(ir.node("Unsqueeze", [matrix, axis]))
    if count > 1:
        nodes.append(ir.node("Concat", [n.outputs[0] for n in nodes], {"axis": 0}))
    for made in nodes:
        made.outputs[0].dtype, made.outputs[0].shape = whole.dtype, ir.Shape([1, *shape])
    nodes[-1].outputs[0].shape = ir.Shape([count, *shape])
    graph.insert_before(node, nodes)
    return nodes[-1].outputs[0]


def _names(value: ir.Value, count: int) -> list[str]:
    """What the matrices of a stack are called: as the parameter that each is made of, if it is one."""
    node = made_by(value, "Concat")
    parts = [value] if node is None else [v for v in node.inputs if v is not None]
    sources = [{v.name for v in _parameters(part)} for part in parts]
    if len(parts) == count and all(len(found) == 1 for found in sources):
        return [str(found.pop()) for found in sources]
    return [f"{value.name}.{direction}" for direction in range(count)]


def _parameters(value: ir.Value) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None:
        yield value
        return
    for slot, operand in enumerate(node.inputs):
        if operand is not None and (slot == 0 or node.op_type == "Concat"):
            yield from _parameters(operand)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    """A constant that is made from its parts each time it is read."""
    held = stored(value)
    if held is not None:
        return held
    read = _reader(value)
    first = ir.tensor(read())
    return ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(read())), dtype=first.dtype, shape=first.shape)


def _reader(value: ir.Value | None) -> _Read:
    """What reads a constant, or computes what constants are put together to.

    Raises:
        Decline: If it depends on anything else.
    """
    tensor, node = stored(value), made_by(value, *_REARRANGED)
    if tensor is not None:
        return tensor.numpy
    if value is None or node is None:
        raise Decline(f"its weight {value.name if value is not None else ''!r} is computed")
    operands = [None if v is None else _reader(v) for v in node.inputs]
    compute, attributes = _REARRANGED[node.op_type], {n: a.value for n, a in node.attributes.items()}
    return lambda: compute(attributes, *(None if f is None else f() for f in operands))


def _slice(_: object, x: np.ndarray, starts, ends, axes=None, steps=None) -> np.ndarray:
    places = range(len(starts)) if axes is None else axes.tolist()
    where = [slice(None)] * x.ndim
    for i, axis in enumerate(places):
        step = 1 if steps is None else int(steps[i])
        end = int(ends[i])
        where[axis] = slice(int(starts[i]), None if step < 0 and end < -x.shape[axis] else end, step)
    return x[tuple(where)]


_REARRANGED: dict[str, Callable[..., np.ndarray]] = {
    "Slice": _slice,
    "Concat": lambda held, *parts: np.concatenate(parts, held["axis"]),
    "Unsqueeze": lambda _, x, axes: np.expand_dims(x, tuple(axes.tolist())),
    "Squeeze": lambda _, x, axes=None: np.squeeze(x, None if axes is None else tuple(axes.tolist())),
    "Transpose": lambda held, x: np.transpose(x, held.get("perm")),
    "Identity": lambda _, x: x,
}
"""How numpy does what puts weights together, from attributes and operands."""
