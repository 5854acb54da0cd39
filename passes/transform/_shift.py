"""Adds a vector to channels: one bias takes it up, everything behind it is corrected."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.ir.channels import ChannelGroup, Use
from qc.ir.errors import UnsupportedError
from qc.passes.transform._edits import Edits, read

__all__ = ["shift"]


def shift(model: ir.Model, group: ChannelGroup, offsets: np.ndarray, edits: Edits) -> None:
    """Plans ``z' = z + offsets``: the first bias (or table) of the group adds, consumers subtract ``offsets @ W.T``.

    Where several branches are added up, only what lies behind that bias is shifted, and as often as it is added in.
    """
    source = _source(model, group)
    _add(edits, source, offsets)
    times = _times(model, group, source.node)
    for use in group.uses:
        if not use.lead or use.value is None:
            continue
        count = times.get(use.node.inputs[0], 0.0)
        if use.role == "consumer" and count:
            _subtract(edits, use, offsets * count)
        elif use.role == "mean" and count:
            _add(edits, use, offsets * count)


def _source(model: ir.Model, group: ChannelGroup) -> Use:
    """The first reader of a bias in the graph that can take the shift up."""
    able = [
        u for u in group.uses if u.lead and (u.role == "bias" or (u.role == "producer" and u.node.op_type == "Gather"))
    ]
    if not able:
        raise UnsupportedError(f"No producer of group {group.id} has a bias that could take up a shift.")
    order = {node: i for i, node in enumerate(model.graph)}
    return min(able, key=lambda u: order[u.node])


def _times(model: ir.Model, group: ChannelGroup, start: ir.Node) -> dict[ir.Value, float]:
    """How often the shift is contained in each carrier."""
    carriers = set(group.carriers)
    times: dict[ir.Value, float] = {}
    for node in model.graph:
        outs = [v for v in node.outputs if v in carriers]
        if not outs:
            continue
        held = [times.get(v, 0.0) for v in node.inputs if v is not None]
        count = sum(held) if node.op_type in ("Add", "Sum") else max(held, default=0.0)
        times.update(dict.fromkeys(outs, count + (1.0 if node is start else 0.0)))
    return times


def _add(edits: Edits, use: Use, offsets: np.ndarray) -> None:
    by_position = np.where(use.index >= 0, offsets[use.index], 0.0)[:, None]
    key = ("add", use.axes, by_position.tobytes())
    edits.rows(use, key, lambda rows: rows + by_position)


def _subtract(edits: Edits, use: Use, offsets: np.ndarray) -> None:
    weight = read(use.value)
    by_position = np.where(use.index >= 0, offsets[use.index], 0.0)
    spread = [n if a in use.axes else 1 for a, n in enumerate(use.shape)]
    product = weight.reshape(use.shape) * by_position.reshape(spread)
    outputs = 1 + len(use.shape) - weight.ndim  # a grouped filter has its output axis divided
    change = product.reshape(*product.shape[:outputs], -1).sum(axis=-1).reshape(-1)
    edits.add(use.node, 2, ("subtract", change.tobytes()), lambda bias: bias - change)
