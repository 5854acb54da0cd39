"""Finding the few key and value heads behind their repetition to the number of query heads."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qc.passes.canonicalize._graph import made_by, same_dim, stored

__all__ = ["unrepeated"]


def unrepeated(value: ir.Value, heads: int) -> ir.Value | None:
    """The value of which `value` repeats each head, one after the other, to `heads` heads; None if it is not that."""
    for few, axis in _expansions(value):
        if few.shape is None or len(few.shape) != 4 or not isinstance(few.shape[1], int):
            continue
        stored_heads = few.shape[1]
        if axis == 2 and stored_heads < heads and heads % stored_heads == 0:
            return few
        if axis == 1 and stored_heads == 1 < heads:
            return few
    return None


def _expansions(value: ir.Value) -> Iterator[tuple[ir.Value, int]]:
    """Yields (x, axis): `value` repeats x along a new axis in front of `axis`, which a Reshape merges with heads."""
    reshape, expand = made_by(value, "Reshape"), made_by(value, "Expand")
    if expand is not None:
        yield expand.inputs[0], 1  # one head for all: [B, 1, S, D] -> [B, H, S, D]
    expand = made_by(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = made_by(expand.inputs[0], "Unsqueeze") if expand is not None else None
    axes = stored(unsqueeze.inputs[1]) if unsqueeze is not None else None
    if axes is None or axes.size != 1:
        return
    source, wide = unsqueeze.inputs[0], expand.outputs[0]
    if not _restores(source, wide, value):
        return
    yield source, int(axes.numpy().reshape(()))


def _restores(source: ir.Value, wide: ir.Value, merged: ir.Value) -> bool:
    """Whether the Reshape merges exactly the two head axes: the other sizes are those of the source."""
    if source.shape is None or merged.shape is None or len(source.shape) != 4 or len(merged.shape) != 4:
        return False
    if not (isinstance(source.shape[1], int) and isinstance(merged.shape[1], int)):
        return False
    if wide.shape is not None and len(wide.shape) == 5 and not same_dim(wide.shape[1], source.shape[1]):
        return False
    return all(same_dim(source.shape[i], merged.shape[i]) for i in (0, 2, 3))
