"""Splits the codes of copied channels, so that the copies of an outlier round as finely as one channel would alone.

T copies of ``x / T`` round to the same code q, so their sum ``T q`` has steps of T. With offsets that cancel,

    q_j = round(x / (T s) + (j - (T - 1) / 2) / T),  j = 0 ... T-1        sum_j q_j = round(x / s)

which is Hermite's identity, ``sum_j floor((u + j) / T) = floor(u)`` with ``u = x / s + 1/2``: exact, and no code is
larger than before by more than one. Source: the integer form of QLLM's channel disassembly, arXiv 2310.08041, section
4.1; the distribution of the code is ours.

Only where it changes nothing but rounding: the copies are gathered from one channel by one operator, and every layer
that reads them multiplies them with equal numbers.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import read_weight
from qc.passes.canonicalize._graph import attribute, constant, made_by

__all__ = ["copy_offsets"]


def copy_offsets(x: ir.Value) -> np.ndarray | None:
    """Offsets in steps of the grid that split the codes of the copied channels of `x`, ``[K]``.

    Returns:
        None if no channel has copies, or if the offsets would not cancel: a reader other than a Linear, or weights that
        differ between copies.
    """
    sources = _sources(x)
    if sources is None or len(set(sources)) == len(sources):
        return None
    counts, seen = Counter(sources), Counter()
    offsets, groups = np.zeros(len(sources)), {}
    for k, source in enumerate(sources):
        total = counts[source]
        offsets[k] = (seen[source] - (total - 1) / 2) / total
        seen[source] += 1
        groups.setdefault(source, []).append(k)
    if not _read_alike(x, [g for g in groups.values() if len(g) > 1]):
        return None
    return offsets


def _sources(x: ir.Value) -> list[tuple[int, int]] | None:
    """What each channel of `x` is a copy of; None if `x` is not gathered from channels."""
    joined = made_by(x, "Concat")
    if joined is not None and x.shape is not None and attribute(joined, "axis") in (-1, x.shape.rank() - 1):
        parts = list(joined.inputs)
    else:
        parts = [x]
    found: list[tuple[int, int]] = []
    for number, part in enumerate(parts):
        gather = made_by(part, "Gather")
        index = constant(gather.inputs[1]) if gather is not None else None
        if gather is not None and index is not None and index.ndim == 1 and _along_channels(gather):
            found += [(id(gather.inputs[0]), int(i)) for i in index]
            continue
        width = part.shape[-1] if part is not None and part.shape is not None and part.shape.rank() else None
        if not isinstance(width, int):
            return None
        found += [(-1 - number, k) for k in range(width)]
    return found


def _along_channels(gather: ir.Node) -> bool:
    value, axis = gather.inputs[0], attribute(gather, "axis", 0)
    return axis == -1 or (value is not None and value.shape is not None and axis == value.shape.rank() - 1)


def _read_alike(x: ir.Value, groups: list[list[int]]) -> bool:
    """Whether all readers of `x` are Linears whose columns are equal within each group."""
    for use in x.uses():
        weight = read_weight(use.node.inputs[1]) if dialect.is_op(use.node, "Linear") and use.idx == 0 else None
        if weight is None:
            return False
        columns = [weight.numpy()[:, group] for group in groups]
        weight.release()
        if any(np.any(held != held[:, :1]) for held in columns):
            return False
    return not x.is_graph_output()
