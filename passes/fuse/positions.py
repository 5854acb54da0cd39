"""Whether positions count on from the cache."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.passes.canonicalize._evaluate import Piece
from qc.passes.canonicalize._graph import Decline

__all__ = ["are_running"]

_SETTINGS = ((2, 3, 4), (1, 1, 5), (2, 5, 0))
"""Batch, new and cached tokens of each evaluation."""


def are_running(model: ir.Model, value: ir.Value | None) -> bool:
    """Whether `value` ``[batch, sequence]`` is ``past, past + 1, ...`` in each row of an unpadded text.

    The model's input of that role is, by the meaning of the role. A computed value is evaluated.
    """
    if value is None:
        return False
    if value.is_graph_input():
        return _role(value) == "positions"
    try:
        piece = Piece(model.graph, [value])
        return all(_runs(piece, *setting) for setting in _SETTINGS)
    except Decline:
        return False


def _runs(piece: Piece, batch: int, new: int, past: int) -> bool:
    expected = np.broadcast_to(past + np.arange(new), (batch, new))
    arrays = {
        "mask": np.ones((batch, past + new)),
        "tokens": np.ones((batch, new)),
        "positions": expected,
    }
    feeds, sizes = {}, {}
    for graph_input in piece.graph_inputs:
        role = _role(graph_input)
        axes = (batch, None, past, None) if role.startswith("past_") else arrays.get(role, expected).shape
        names = [None if isinstance(d, int) else str(d.value) for d in graph_input.shape or ()]
        sizes.update({n: s for n, s in zip(names, axes, strict=False) if n is not None and s is not None})
    for read in piece.reads:
        if _role(read) not in arrays:
            return False
        feeds[read] = arrays[_role(read)].astype(read.dtype.numpy())  # type: ignore[union-attr]
    (found,) = piece.run(feeds, sizes)
    if found.ndim == 1:
        found = found[None]
    return found.shape[-1] == new and np.array_equal(np.broadcast_to(found, expected.shape), expected)


def _role(value: ir.Value) -> str:
    return value.metadata_props.get("qc.role", "other").partition(".")[0]
