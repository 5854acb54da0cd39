"""Where the channels of a value lie: an array of channel numbers over some of its axes, and how shapes move it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["Dims", "View", "dims_of", "reshape", "transpose"]

Dims = tuple["int | str | None", ...]
"""One entry per axis: a size, the name of a symbolic size, or None if unknown."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """The channels of a value.

    Attributes:
        axes: The axes that enumerate channels, ascending; none has size 1.
        ids: Number of the channel at each position, over `axes`.
    """

    axes: tuple[int, ...]
    ids: np.ndarray

    @classmethod
    def of(cls, axes: Sequence[int], ids: np.ndarray) -> View | None:
        """A view without its axes of size 1; None if nothing remains."""
        kept = [i for i, n in enumerate(ids.shape) if n != 1]
        if not kept:
            return None
        if len(kept) != ids.ndim:
            ids = ids.reshape([ids.shape[i] for i in kept])
        return cls(tuple(axes[i] for i in kept), ids)


def dims_of(value: ir.Value | None) -> Dims | None:
    """The shape of a value, or None if even its rank is unknown."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return tuple(int(d) for d in value.const_value.shape)  # an exporter may declare less than it stores
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else (None if d.value is None else str(d.value)) for d in value.shape)


def transpose(view: View, perm: Sequence[int]) -> View:
    """The view after a transposition of the value by `perm`."""
    moved = sorted((perm.index(axis), i) for i, axis in enumerate(view.axes))
    return View(tuple(axis for axis, _ in moved), np.transpose(view.ids, [i for _, i in moved]))


def reshape(view: View, before: Dims, after: Dims) -> View | None:
    """The view after the value took another shape; None if the shapes do not prove where the channels went.

    Equal sizes at the left and at the right are the same axes; what lies between must be static if it has channels.
    """
    left = 0
    while left < min(len(before), len(after)) and before[left] == after[left] and before[left] is not None:
        left += 1
    right = 0
    while (
        right < min(len(before), len(after)) - left
        and before[-1 - right] == after[-1 - right]
        and before[-1 - right] is not None
    ):
        right += 1
    end_before, end_after = len(before) - right, len(after) - right
    middle = [a for a in view.axes if left <= a < end_before]
    outer = [(i, a) for i, a in enumerate(view.axes) if not left <= a < end_before]
    moved = [(i, a if a < left else a - end_before + end_after) for i, a in outer]
    if not middle:
        return View(tuple(a for _, a in moved), view.ids)
    sizes, new_sizes = before[left:end_before], after[left:end_after]
    if not all(isinstance(d, int) for d in (*sizes, *new_sizes)) or math.prod(sizes) != math.prod(new_sizes):
        return None
    # Lay the channels out over all axes between, in order, after those that stay.
    inner = [i for i, a in enumerate(view.axes) if left <= a < end_before]
    ids = np.transpose(view.ids, [i for i, _ in outer] + inner)
    kept = ids.shape[: len(outer)]
    spread = [d if left + n in middle else 1 for n, d in enumerate(sizes)]
    ids = np.broadcast_to(ids.reshape(*kept, *spread), (*kept, *sizes)).reshape(*kept, *new_sizes)
    axes = [a for _, a in moved] + list(range(left, end_after))
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return View.of([axes[i] for i in order], np.transpose(ids, order))
