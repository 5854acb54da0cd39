"""Carries out an action on activations: an operator in front of the consumers, for what no weight can take up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import ChannelGroup, Use
from qc.ir.errors import UnsupportedError
from qc.ir.store import Store
from qc.passes.transform._edits import Edits, on_channels, positions
from qc.passes.transform._shift import _subtract
from qc.passes.transform.actions import Action, Merge, Orthogonal, Permute, Scale, Shift, Split

__all__ = ["insert"]


def insert(
    group: ChannelGroup, action: Action, store: Store, dtype: type[np.floating] = np.float32
) -> tuple[list[str], list[tuple[str, int]]]:
    """Inserts the operator once per activation that is read, and changes the consumers.

    Returns:
        The names of the changed weights; the operators with their multiplications per token.

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
    edits, added = Edits(dtype), []
    for value in dict.fromkeys(u.node.inputs[0] for u in uses):
        readers = [u for u in uses if u.node.inputs[0] is value]
        added += _insert(value, readers, group, action, edits, store, dtype)
    return edits.commit(store), added


def _insert(
    value: ir.Value,
    uses: list[Use],
    group: ChannelGroup,
    action: Action,
    edits: Edits,
    store: Store,
    dtype: type[np.floating],
) -> list[tuple[str, int]]:
    width = group.width
    where = positions(uses[0], width)[:, 0]  # where each channel lies
    channel = np.argsort(where)  # and the channel at each place
    graph = uses[0].node.graph

    def constant(suffix: str, array: np.ndarray) -> ir.Value:
        name = f"{value.name}.{suffix}"
        number = 0
        while name in graph.initializers:
            number += 1
            name = f"{value.name}.{suffix}.{number}"
        tensor = store.put(name, array)
        held = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(held)
        return held

    def columns(key: object, change) -> None:
        for use in uses:
            edits.add(use.node, use.slot, key, lambda w, u=use: on_channels(w, u, change))

    match action:
        case Scale():
            factors = np.asarray(action.factors, np.float64)[channel]
            nodes = [ir.node("Mul", [value, constant("factors", factors.astype(dtype))])]
            columns(("over", factors.tobytes()), lambda rows: rows / factors[:, None])
            cost = width
        case Shift():
            offsets = np.asarray(action.offsets, np.float64)
            nodes = [ir.node("Add", [value, constant("offsets", offsets[channel].astype(dtype))])]
            for use in uses:
                _subtract(edits, use, offsets)
            cost = width
        case Permute():
            source = where[np.asarray(action.order)[channel]]
            nodes = [ir.node("Gather", [value, constant("order", source.astype(np.int64))], {"axis": -1})]
            columns(("order", source.tobytes()), lambda rows: rows[source])
            cost = 0
        case Orthogonal():
            matrix = np.asarray(action.matrix, np.float64)[np.ix_(channel, channel)]
            nodes = [dialect.linear(value, constant("rotation", matrix.T.astype(dtype)))]
            columns(("rotation", matrix.tobytes()), lambda rows: matrix.T @ rows)
            cost = width * width
        case Split():
            sources = Split(np.asarray(action.copies)[channel]).sources
            shares = 1.0 / np.asarray(action.copies, np.float64)[channel][sources]
            gather = ir.node("Gather", [value, constant("copies", sources.astype(np.int64))], {"axis": -1})
            nodes = [gather, ir.node("Mul", [gather.outputs[0], constant("shares", shares.astype(dtype))])]
            columns(("copies", sources.tobytes()), lambda rows: rows[sources])
            cost = len(sources)
        case Merge():
            clusters = np.asarray(action.assignment)[channel]
            sums = np.zeros((int(clusters.max()) + 1, width))
            sums[clusters, np.arange(width)] = 1.0
            means = sums / sums.sum(axis=1, keepdims=True)
            nodes = [dialect.linear(value, constant("means", means.astype(dtype)))]
            columns(("means", clusters.tobytes()), lambda rows: sums @ rows)
            cost = means.size
        case _:
            raise UnsupportedError(f"No operator carries out {action.name!r}.")
    out = nodes[-1].outputs[0]
    size = int(nodes[-1].inputs[1].shape[0])
    for node in nodes:
        node.outputs[0].dtype = value.dtype
        node.outputs[0].shape = ir.Shape([*value.shape.dims[:-1], size])
    first = uses[0].node
    for candidate in graph:
        if any(candidate is u.node for u in uses):
            first = candidate
            break
    graph.insert_before(first, nodes)
    for use in uses:
        use.node.replace_input_with(0, out)
    return [(n.op_type, cost if n is nodes[-1] else 0) for n in nodes]
