"""Which values lose little on grids of 8 bits, among others of 16.

Units multiply codes of 16 bits with codes of 8, and change between grids; elementwise operators want one width. So what
may be narrow is what is read as the second operand of products only: keys and values of attention, and their caches.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from qc.passes.quantize._ranges import Grid

__all__ = ["decibels", "may_be_narrow"]


def may_be_narrow(group: Sequence[ir.Value], moving: Collection[str]) -> bool:
    """Whether values that share a grid are read as second operands of products, and by what moves them, only.

    Args:
        group: The values.
        moving: Operators that move numbers from one of them to another.
    """
    members, products = set(group), 0
    for value in group:
        if value.is_graph_input() and not value.metadata_props.get("qc.role", "").startswith("past_"):
            return False
        for use in value.uses():
            product = use.node.op_type == "MatMul" and use.idx == 1
            moved = use.node.op_type in moving and use.node.outputs[0] in members
            if not product and not moved and use.node.op_type != "Shape":
                return False
            products += product
    return products > 0


def decibels(seen: np.ndarray, grid: Grid) -> float:
    """The signal to noise of values on a grid.

    Args:
        seen: Points and the number of entries around each, ``[2, B]``.
        grid: The grid.
    """
    points, counts = seen
    noise = float((counts * (grid.rounded(points) - points) ** 2).sum())
    signal = float((counts * points**2).sum())
    return float("inf") if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))
