"""Sequences of tensors, which exporters use for ``split``, become plain tensors.

``SequenceAt(SplitToSequence(x, sizes), i) -> Split(x, sizes)[i]``, exactly, for constant sizes and indices.
A sequence that is used in any other way is left alone.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

__all__ = ["unpack_sequences"]


def unpack_sequences(graph: ir.Graph) -> None:
    """Replaces every split into a sequence whose items are taken one by one, in place."""
    for node in graph:
        if node.op_type == "SplitToSequence" and node.domain == "":
            _unpack(graph, node)


def _unpack(graph: ir.Graph, split: ir.Node) -> None:
    source, sequence = split.inputs[0], split.outputs[0]
    axis = split.attributes.get_int("axis", 0)
    sizes = _sizes(split, axis)
    takers = [user for user, _ in sequence.uses()]
    indices = [_constant(taker.inputs[1]) for taker in takers if taker.op_type == "SequenceAt"]
    kept = split.attributes.get_int("keepdims", 1) == 1 or split.inputs[1] is not None
    if source is None or sizes is None or not kept or sequence.is_graph_output() or not takers:
        return
    if len(indices) < len(takers) or any(index is None for index in indices):
        return
    lengths = ir.node("Constant", [], {"value": ir.tensor(np.asarray(sizes, np.int64))})
    lengths.outputs[0].shape, lengths.outputs[0].type = ir.Shape([len(sizes)]), ir.TensorType(ir.DataType.INT64)
    parts = ir.node("Split", [source, lengths.outputs[0]], {"axis": axis}, num_outputs=len(sizes))
    parts.metadata_props.update(split.metadata_props)
    lengths.metadata_props.update(split.metadata_props)
    for part, size in zip(parts.outputs, sizes, strict=True):
        part.type = source.type
        if source.shape is not None:
            dims = list(source.shape)
            dims[axis] = size
            part.shape = ir.Shape(dims)
    graph.insert_before(split, [lengths, parts])
    for taker, index in zip(takers, indices, strict=True):
        item = parts.outputs[int(index.item())]  # type: ignore[union-attr]  # checked above
        item.name = taker.outputs[0].name
        taker.outputs[0].replace_all_uses_with(item, replace_graph_outputs=True)
        graph.remove(taker, safe=True)
    graph.remove(split, safe=True)


def _sizes(split: ir.Node, axis: int) -> list[int] | None:
    """Lengths of the pieces; a scalar operand is the length of every piece but the last."""
    operand = _constant(split.inputs[1])
    if operand is None:
        return None
    if operand.ndim == 1:
        return [int(size) for size in operand]
    shape = split.inputs[0].shape if split.inputs[0] is not None else None
    total = shape[axis] if shape is not None else None
    if not isinstance(total, int):
        return None
    size = int(operand)
    count = math.ceil(total / size)
    return [min(size, total - i * size) for i in range(count)]


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
