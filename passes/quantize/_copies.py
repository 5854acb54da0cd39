"""Splits the codes of copied channels, so that the copies of an outlier round as finely as one channel would alone.

T copies of ``x / T`` round to the same code q, so their sum ``T q`` has steps of T. With offsets that cancel,

    q_j = round(x / (T s) + (j - (T - 1) / 2) / T),  j = 0 ... T-1        sum_j q_j = round(x / s)

which is Hermite's identity, ``sum_j floor((u + j) / T) = floor(u)`` with ``u = x / s + 1/2``: exact, and no code is
larger than before by more than one. Source: the integer form of QLLM's channel disassembly, arXiv 2310.08041, section
4.1; the distribution of the code is ours.

Only where it changes nothing but rounding: copies are channels that are computed alike, from one channel by a gather or
by equal rows of weights, and that every layer which reads them multiplies with equal numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import read_weight
from qc.passes.canonicalize._graph import attribute, constant

__all__ = ["copy_offsets", "spread"]

_FIRST = 16
"""Rows of a weight by which nearly all columns differ, so that the others need not be compared."""

_GATED = ("Mul", "Add")
"""Operators that make a channel from the same channel of each operand; those of one operand all do."""

_ACTIVATIONS = ("Relu", "Gelu", "Sigmoid", "Tanh", "HardSwish", "Mish", "Softplus", "Elu", "Identity")


def copy_offsets(x: ir.Value) -> np.ndarray | None:
    """Offsets in steps of the grid that split the codes of the copied channels of `x`, ``[K]``.

    Returns:
        None if no two channels are computed alike and read alike.
    """
    read = _read_alike(x)
    if read is None:
        return None
    labels = _numbered(zip(read.tolist(), _computed(x, len(read)), strict=True))
    return spread(labels) if _some_equal(labels) else None


def spread(labels: np.ndarray) -> np.ndarray:
    """``(j - (T - 1) / 2) / T`` for the j-th of the T channels that have a label, ``[K]``."""
    counts = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    places = np.empty(len(labels))
    places[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (places - (counts[labels] - 1) / 2) / counts[labels]


def _read_alike(x: ir.Value) -> np.ndarray | None:
    """Labels of the channels, ``[K]``: equal for equal columns in all that read `x`; None if it is not Linears alone.

    None also if no two are equal, as in most layers.
    """
    labels: np.ndarray | None = None
    for use in x.uses():
        weight = read_weight(use.node.inputs[1]) if dialect.is_op(use.node, "Linear") and use.idx == 0 else None
        if weight is None:
            return None
        rows = weight.numpy()
        weight.release()
        labels = np.zeros(rows.shape[1], int) if labels is None else labels
        for part in (rows[:_FIRST], rows[_FIRST:]):
            repeated = np.flatnonzero(np.bincount(labels)[labels] > 1)
            columns: list[Hashable] = [b""] * len(labels)
            for k, digest in zip(repeated, _digests(part[:, repeated].T), strict=True):
                columns[k] = digest
            labels = _numbered(zip(labels.tolist(), columns, strict=True))
            if not _some_equal(labels):
                return None
    return None if x.is_graph_output() else labels


def _computed(x: ir.Value | None, width: int) -> list[Hashable]:
    """What each channel of `x` is: equal for channels that hold the same number by the way they are computed."""
    node = x.producer() if x is not None else None
    apart: list[Hashable] = [(id(x), k) for k in range(width)]
    if node is None or _width(x) != width:
        return apart
    if node.op_type == "Concat" and _last(node, node.outputs[0]):
        parts = [(part, _width(part)) for part in node.inputs]
        known = all(w is not None for _, w in parts)
        return [name for part, w in parts for name in _computed(part, w or 0)] if known else apart
    if node.op_type == "Gather" and _last(node, node.inputs[0]):
        index, held = constant(node.inputs[1]), _width(node.inputs[0])
        if index is None or index.ndim != 1 or held is None:
            return apart
        names = _computed(node.inputs[0], held)
        return [names[i] for i in index]
    if dialect.is_op(node, "Linear"):
        return _rows(node) or apart
    alike = all(v is not None and _width(v) == width and v.shape == node.outputs[0].shape for v in node.inputs)
    gated = node.op_type in _GATED and node.domain == ""
    if alike and (gated or (len(node.inputs) == 1 and (node.op_type in _ACTIVATIONS or dialect.is_op(node, "Swish")))):
        operands = [_computed(v, width) for v in node.inputs]
        return [(id(node), *names) for names in zip(*operands, strict=True)]
    return apart


def _rows(node: ir.Node) -> list[Hashable]:
    """The rows of the weight and the bias of a Linear; none if one of them is not constant."""
    weights = [read_weight(v) for v in node.inputs[1:] if v is not None]
    held = []
    for weight in weights:
        if weight is None:
            return []
        held.append(_digests(weight.numpy()))
        weight.release()
    return [(id(node), *parts) for parts in zip(*held, strict=True)]


def _digests(rows: np.ndarray) -> list[bytes]:
    """Equal for equal rows."""
    return [hashlib.sha256(row).digest() for row in np.ascontiguousarray(rows)]


def _numbered(things: object) -> np.ndarray:
    """Numbers from 0 without gaps, the same for equal things."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(thing, len(known)) for thing in things])  # type: ignore[attr-defined]


def _some_equal(labels: np.ndarray) -> bool:
    return labels.max() + 1 < len(labels)


def _width(x: ir.Value | None) -> int | None:
    width = x.shape[-1] if x is not None and x.shape is not None and x.shape.rank() else None
    return width if isinstance(width, int) else None


def _last(node: ir.Node, value: ir.Value | None) -> bool:
    """Whether the axis of the node is the last one of `value`."""
    axis = attribute(node, "axis", 0)
    return axis == -1 or (value is not None and value.shape is not None and axis == value.shape.rank() - 1)
