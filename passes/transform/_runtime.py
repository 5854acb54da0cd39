"""Carries out an action on activations: an operator in front of the consumers, for what no weight can take up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import ChannelGroup, Use
from qc.ir.errors import UnsupportedError
from qc.ir.store import Store
from qc.passes.transform._edits import Edits, on_channels, positions
from qc.passes.transform._shift import _subtract
from qc.passes.transform.actions import Action, Lift, Orthogonal, Permute, Scale, Shift

__all__ = ["insert", "lift_factors"]


def insert(
    group: ChannelGroup,
    action: Action,
    edits: Edits,
    store: Store,
    dtype: type[np.floating] = np.float32,
    *,
    scaled: bool = False,
) -> tuple[list[str], list[tuple[str, int]]]:
    """Inserts the operators once per activation that is read, and changes the consumers.

    Args:
        group: The channels.
        action: What to do to them.
        edits: Changes of weights that go first.
        store: Where new weights are written.
        dtype: Their type.
        scaled: Whether `edits` multiply the channels by the factors of a `Lift` already.

    Returns:
        The names of the changed weights; the operators with their arithmetic operations per token.

    Raises:
        UnsupportedError: If the consumers are not products over the last axis that read these channels alone.
    """
    uses = group.consumers
    for use in uses:
        whole = np.array_equal(np.sort(use.index), np.arange(group.width))
        if not dialect.is_op(use.node, "Linear") or not whole:
            raise UnsupportedError(
                f"Group {group.id} does not admit {action.name!r}, and {use.name} does not read its channels alone "
                "over the last axis, so no operator can be inserted in front of it."
            )
    added = []
    for value in dict.fromkeys(u.node.inputs[0] for u in uses):
        readers = [u for u in uses if u.node.inputs[0] is value]
        place = _Place(value, readers, group.width, edits, store, dtype)
        added += place.insert(action, scaled)
    return edits.commit(store), added


def lift_factors(action: Lift) -> np.ndarray:
    """What each channel is multiplied by before channels are copied and added up, ``[width]``.

    Raises:
        UnsupportedError: If copies of one channel would need different factors.
    """
    sources, clusters = action.sources, action.clusters()
    shares = 1.0 / (action.counts()[sources] * action.sizes[clusters])
    longest = action.sizes.max()
    first = np.unique(clusters, return_index=True)[1]
    joined = first[action.sizes > 1]
    shares[joined] /= longest - action.sizes[clusters[joined]] + 1  # it stands for the members that others lack
    factors = np.ones(len(action.counts()))
    factors[sources] = shares
    if np.any(factors[sources] != shares):
        raise UnsupportedError("A channel with copies cannot be merged with others by operators; leave it out.")
    return factors


@dataclasses.dataclass
class _Place:
    """An activation whose last axis holds the channels of a group, and those who read it.

    Attributes:
        value: The activation.
        uses: The weights of its readers.
        width: Number of channels.
        edits: Collects the changes of the weights.
        store: Where constants are written.
        dtype: Their type.
    """

    value: ir.Value
    uses: Sequence[Use]
    width: int
    edits: Edits
    store: Store
    dtype: type[np.floating]

    def insert(self, action: Action, scaled: bool) -> list[tuple[str, int]]:
        """Inserts the operators of `action`; returns them with their arithmetic operations per token."""
        where = positions(self.uses[0], self.width)[:, 0]  # where each channel lies
        channel = np.argsort(where)  # and the channel at each place
        match action:
            case Scale():
                factors = np.asarray(action.factors, np.float64)[channel]
                steps = [_Step.of("Mul", [self.value, self._constant("factors", factors)], (self.width,), self.width)]
                self._columns(("over", factors.tobytes()), lambda rows: rows / factors[:, None])
            case Shift():
                offsets = np.asarray(action.offsets, np.float64)
                steps = [
                    _Step.of(
                        "Add", [self.value, self._constant("offsets", offsets[channel])], (self.width,), self.width
                    )
                ]
                for use in self.uses:
                    _subtract(self.edits, use, offsets)
            case Permute():
                source = where[np.asarray(action.order)[channel]]
                steps = [_Step.of("Gather", [self.value, self._constant("order", source)], (self.width,), axis=-1)]
                self._columns(("order", source.tobytes()), lambda rows: rows[source])
            case Orthogonal():
                matrix = np.asarray(action.matrix, np.float64)[np.ix_(channel, channel)]
                rotation = dialect.linear(self.value, self._constant("rotation", matrix.T))
                steps = [_Step(rotation, (self.width,), self.width**2)]
                self._columns(("rotation", matrix.tobytes()), lambda rows: matrix.T @ rows)
            case Lift():
                steps = self._lift(action, where, scaled)
            case _:
                raise UnsupportedError(f"No operator carries out {action.name!r}.")
        for step in steps:
            step.out.dtype = self.value.dtype
            step.out.shape = ir.Shape([*self.value.shape.dims[:-1], *step.shape])
        graph, readers = self.uses[0].node.graph, {u.node for u in self.uses}
        graph.insert_before(next(node for node in graph if node in readers), [s.node for s in steps])
        for node in readers:
            node.replace_input_with(0, steps[-1].out)
        return [(s.node.op_type, s.cost) for s in steps]

    def _lift(self, action: Lift, where: np.ndarray, scaled: bool) -> list[_Step]:
        """Gathers single channels and copies; gathers clusters, padded with their first member, and adds them up."""
        factors, sizes, places = lift_factors(action), action.sizes, where[action.sources]
        members = np.split(np.argsort(action.clusters(), kind="stable"), np.cumsum(sizes)[:-1])
        single, joined = np.flatnonzero(sizes == 1), np.flatnonzero(sizes > 1)
        order, undone = np.concatenate([single, joined]), factors[:, None] if scaled else 1.0
        key = ("lift", action.counts().tobytes(), action.clusters().tobytes(), scaled)
        self._columns(key, lambda rows: action.read(rows[where] * undone)[order])
        steps, source = [], self.value
        if not scaled and np.any(factors != 1):
            shares = self._constant("shares", factors[np.argsort(where)])
            steps.append(_Step.of("Mul", [source, shares], (self.width,), self.width))
            source = steps[-1].out
        parts = []
        if len(single):
            index = np.array([places[members[c][0]] for c in single])
            steps.append(_Step.of("Gather", [source, self._constant("copies", index)], index.shape, axis=-1))
            parts.append(steps[-1].out)
        if len(joined):
            longest = int(sizes.max())
            index = np.array([places[np.pad(members[c], (longest - sizes[c], 0), "edge")] for c in joined])
            steps.append(_Step.of("Gather", [source, self._constant("members", index)], index.shape, axis=-1))
            inputs = [steps[-1].out, self._constant("last", np.array([-1]))]
            steps.append(_Step.of("ReduceSum", inputs, (len(joined),), index.size, keepdims=0))
            parts.append(steps[-1].out)
        if len(parts) > 1:
            steps.append(_Step.of("Concat", parts, (len(order),), axis=-1))
        return steps

    def _constant(self, suffix: str, array: np.ndarray) -> ir.Value:
        graph, number = self.uses[0].node.graph, 0
        name = f"{self.value.name}.{suffix}"
        while name in graph.initializers:
            number += 1
            name = f"{self.value.name}.{suffix}.{number}"
        tensor = self.store.put(name, array.astype(self.dtype if array.dtype.kind == "f" else np.int64))
        held = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(held)
        return held

    def _columns(self, key: object, change: Callable[[np.ndarray], np.ndarray]) -> None:
        for use in self.uses:
            self.edits.add(use.node, use.slot, key, lambda w, u=use: on_channels(w, u, change))


@dataclasses.dataclass
class _Step:
    """An operator to insert.

    Attributes:
        node: The operator.
        shape: The last axes of its output, which come in place of the channels.
        cost: Its arithmetic operations per token.
    """

    node: ir.Node
    shape: tuple[int, ...]
    cost: int

    @classmethod
    def of(cls, operator: str, inputs: Sequence[ir.Value], shape: tuple[int, ...], cost: int = 0, **attributes: int):
        """A step of an operator of the standard domain."""
        return cls(ir.node(operator, inputs, attributes), shape, cost)

    @property
    def out(self) -> ir.Value:
        """What it yields."""
        return self.node.outputs[0]
