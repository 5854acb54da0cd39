"""Rewrites weights: the edits of one fold are collected, then each weight is read, changed in float64 and cast once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import Use
from qc.ir.errors import InternalError, UnsupportedError
from qc.ir.quant import read_weight
from qc.ir.store import Store

__all__ = ["Edits", "on_channels", "positions", "read", "require_float"]

Change = Callable[[np.ndarray], np.ndarray]

_AT_ONCE = 1 << 22
"""Elements of a weight that are changed at a time: in float64, with the copies that a change makes, 0.2 GiB."""


class Edits:
    """Changes of weights by the place where they are read. Nothing happens before `commit`."""

    def __init__(self, dtype: type[np.floating] = np.float32) -> None:
        """Starts empty.

        Args:
            dtype: Element type of the new weights.
        """
        self._dtype = dtype
        self._changes: dict[tuple[ir.Node, int], list[tuple[object, Change, Use | None]]] = {}
        self._last: list[Callable[[], None]] = []

    def add(self, node: ir.Node, slot: int, key: object, change: Change) -> None:
        """Applies `change` to the weight that `node` reads at `slot`, after what was added before.

        Args:
            node: The reader.
            slot: Which of its inputs; zeros ``[rows of the weight]`` are made if it is an absent bias.
            key: Equal keys mean equal changes, so that readers of one weight go on sharing it.
            change: Gets a float64 array that it may write into, returns the new one.
        """
        self._changes.setdefault((node, slot), []).append((key, change, None))

    def rows(self, use: Use, key: object, change: Change) -> None:
        """Applies `change` to the channels of a weight, ``[positions, any part of the rest]``, as `on_channels` does.

        The number of positions stays. A large weight is changed in parts.

        Args:
            use: The weight.
            key: As in `add`.
            change: As in `add`.
        """
        self._changes.setdefault((use.node, use.slot), []).append((key, change, use))

    def finally_(self, change: Callable[[], None]) -> None:
        """Calls `change` after the weights were changed."""
        self._last.append(change)

    def commit(self, store: Store) -> list[str]:
        """Carries out all changes; returns the names of the weights. Weights that nobody reads any more are dropped."""
        made: dict[tuple, ir.Value] = {}
        replaced: list[ir.Value] = []
        for (node, slot), changes in self._changes.items():
            value = node.inputs[slot] if slot < len(node.inputs) else None
            key = (value if value is not None else node, slot if value is None else 0, *(k for k, _, _ in changes))
            if key not in made:
                array = self._changed(node, value, [(change, use) for _, change, use in changes])
                name = _stem(value) if value is not None else f"{_stem(node.inputs[1])}.bias"
                made[key] = _store(node, name, array, store)
            _read_instead(node, slot, made[key])
            if value is not None:
                replaced.append(value)
        for change in self._last:
            change()
        _drop(replaced, made.values())
        return [str(v.name) for v in made.values()]

    def _changed(
        self, node: ir.Node, value: ir.Value | None, changes: Sequence[tuple[Change, Use | None]]
    ) -> np.ndarray:
        weight = read_weight(value)
        axis = _free_axis(weight.shape, [use for _, use in changes]) if weight is not None else None
        if weight is None or axis is None:
            array = read(value) if value is not None else np.zeros(bias_shape(node))
            for change, use in changes:
                array = change(array) if use is None else on_channels(array, use, change)
            return array.astype(self._dtype)
        raw, array = weight.raw(), np.empty(weight.shape, self._dtype)
        step = max(1, _AT_ONCE * weight.shape[axis] // math.prod(weight.shape))
        for start in range(0, weight.shape[axis], step):
            here = (*[slice(None)] * axis, slice(start, start + step))
            part = np.array(raw[here], np.float64)
            for change, use in changes:
                assert use is not None
                part = on_channels(part, dataclasses.replace(use, shape=part.shape), change)
            array[here] = part
        del raw  # a view of the file
        weight.release()
        return array


def _free_axis(shape: tuple[int, ...], uses: Sequence[Use | None]) -> int | None:
    """The longest axis of a large weight that carries no channels of any use; None if it must be changed as a whole."""
    if math.prod(shape) <= _AT_ONCE or any(use is None or use.shape != shape for use in uses):
        return None
    free = [a for a in range(len(shape)) if not any(a in use.axes for use in uses if use is not None)]
    return max(free, key=lambda a: shape[a], default=None)


def require_float(uses: tuple[Use, ...]) -> None:
    """Refuses weights that are already quantized: rounding again would not be exact.

    Raises:
        UnsupportedError: If one of the weights is quantized.
    """
    for use in uses:
        weight = read_weight(use.value)
        if weight is not None and weight.format is not None:
            raise UnsupportedError(
                f"{use.name} is quantized ({weight.format}), and changing it would round it a second time. "
                "Put transforms in front of quantization."
            )


def read(value: ir.Value) -> np.ndarray:
    """A weight in float64, writable."""
    weight = read_weight(value)
    if weight is not None:
        return np.array(weight.raw() if weight.format is None else weight.numpy(), dtype=np.float64)
    node = value.producer()
    if node is not None and node.op_type == "Constant":
        held = next(iter(node.attributes.values()))
        return np.array(held.as_tensor().numpy() if held.type == ir.AttributeType.TENSOR else held.value, np.float64)
    raise InternalError(f"{value.name!r} is a member of a channel group and no weight")


def on_channels(array: np.ndarray, use: Use, change: Change) -> np.ndarray:
    """Applies `change` to ``[channel positions of the use, everything else]`` and puts the result back in place.

    The number of positions may change where the channels lie on one axis.
    """
    viewed = array.reshape(use.shape)
    front = tuple(range(len(use.axes)))
    moved = np.moveaxis(viewed, use.axes, front)
    kept = moved.shape[len(use.axes) :]
    rows = change(np.ascontiguousarray(moved.reshape(len(use.index), -1)))
    if len(rows) == len(use.index):
        return np.moveaxis(rows.reshape(moved.shape), front, use.axes).reshape(array.shape)
    if len(use.axes) != 1 or use.shape != array.shape:
        raise InternalError(f"the number of channels of {use.name} cannot change, they lie on axes {use.axes}")
    return np.moveaxis(rows.reshape(-1, *kept), front, use.axes)


def positions(use: Use, width: int) -> np.ndarray:
    """Positions of each channel, ``[width, repetitions]``, repetitions in order.

    Raises:
        UnsupportedError: If some channels occur more often than others.
    """
    inside = np.flatnonzero(use.index >= 0)
    order = inside[np.argsort(use.index[inside], kind="stable")]
    counts = np.bincount(use.index[inside], minlength=width)
    if np.any(counts != counts[0]):
        raise UnsupportedError(
            f"{use.name} holds some channels of the group more often than others; leave it as it is."
        )
    return order.reshape(width, counts[0])


def bias_shape(node: ir.Node) -> tuple[int, ...]:
    """The shape of the bias that a node may have."""
    return (int(node.inputs[1].shape[0]),)


def _stem(value: ir.Value) -> str:
    weight = read_weight(value)
    return weight.name if weight is not None else str(value.name)


def _store(node: ir.Node, name: str, array: np.ndarray, store: Store) -> ir.Value:
    graph = node.graph
    number, free = 0, name
    while free in graph.initializers:
        number += 1
        free = f"{name}.{number}"
    tensor = store.put(free, array)
    value = ir.Value(name=free, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _read_instead(node: ir.Node, slot: int, value: ir.Value) -> None:
    if slot >= len(node.inputs):
        node.resize_inputs(slot + 1)
    if dialect.is_op(node, "Linear") and slot == 2:
        node.overload = "bias"
    node.replace_input_with(slot, value)


def _drop(replaced: list[ir.Value], made: object) -> None:
    """Removes what nobody reads any more; a new weight takes over the name of the one that it alone replaces."""
    for value in dict.fromkeys(replaced):
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        sources = [value] if node is None else [v for v in node.inputs if v is not None]
        if node is not None:
            node.graph.remove(node, safe=True)
        for source in sources:
            if not source.uses() and source.graph is not None and source.name in source.graph.initializers:
                del source.graph.initializers[source.name]
    for value in made:  # type: ignore[attr-defined]
        stem = str(value.name).rpartition(".")
        if value.graph is not None and stem[2].isdigit() and stem[0] not in value.graph.initializers:
            value.name = stem[0]
