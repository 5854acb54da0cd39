"""Images in other sizes, and at other places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.c_loops import RESIZE_PLACES, RESIZE_VALUES
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, scaled
from qc.passes.canonicalize._graph import constant

__all__ = ["grid_sample", "resize"]


_IMAGES = 4
"""Axes of images with channels, in a batch."""


@operator("Resize", "Upsample")
def resize(at: Lowering, node: ir.Node) -> None:
    """The nearest element, or what a line between two says, one axis after the other.

    Element j of an axis lies at ``(j + 1/2) / scale - 1/2`` of its n elements, or where another rule says, in float32.
    Before opset 11 there are no rules: it lies at ``j / scale``, the nearest element is the one before if axes grow.
    """
    old = len(node.inputs) == 2
    x, sizes = at.input(node, 0), at.input(node, 3)
    assert x is not None
    mode, place, nearest, policy = (
        held.as_string() if (held := node.attributes.get(name)) is not None else absent
        for name, absent in (
            ("mode", "nearest"),
            ("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"),
            ("nearest_mode", "floor" if old else "round_prefer_floor"),
            ("keep_aspect_ratio_policy", "stretch"),
        )
    )
    value = nearest if mode == "nearest" else mode
    if value not in RESIZE_VALUES or place not in RESIZE_PLACES or x.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, f"it resizes {x.dtype.name} by the rules {value!r} and {place!r}")
    if policy != "stretch" or at.attribute(node, "antialias", 0):
        raise at.refuse(node, "it keeps the aspect ratio, or filters what it makes smaller")
    axes: Sequence[int] = at.attribute(node, "axes", range(len(x.shape)))  # type: ignore[assignment]
    axes = [a % len(x.shape) for a in axes]
    pairs = (
        _from_scales(at, node, x, axes, smaller=not old or mode != "nearest")
        if sizes is None
        else _from_sizes(at, node, x, axes, sizes)
    )
    moved = [(axis, size, scale) for axis, (size, scale) in zip(axes, pairs, strict=True) if scale != 1]
    if not moved:
        at.set(node.outputs[0], x)
        return
    x = at.contiguous(x)
    for step, (axis, size, scale) in enumerate(reversed(moved), 1):
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        y = at.result(node.outputs[0], shape) if step == len(moved) else at.program.tensor(shape)
        at.program.resize(x, y, axis, scale, place, value)
        x = y


def _from_scales(
    at: Lowering, node: ir.Node, x: Tensor, axes: Sequence[int], *, smaller: bool
) -> list[tuple[Dim, float | None]]:
    """Size and scale of each axis, no scale below 1 unless `smaller` says so."""
    scales = constant(node.inputs[min(2, len(node.inputs) - 1)])
    if scales is None or len(scales) != len(axes) or (scales.min() < 1 and not smaller):
        raise at.refuse(node, "its scales are computed, or make an image smaller by the rules of opset 10")
    return [(scaled(x.shape[a], s), float(s)) for a, s in zip(axes, scales.astype(np.float32), strict=True)]


def _from_sizes(
    at: Lowering, node: ir.Node, x: Tensor, axes: Sequence[int], sizes: Tensor
) -> list[tuple[Dim, float | None]]:
    """Size and scale of each axis; None is that of its sizes."""
    if sizes.values is None or len(sizes.values) != len(axes):
        raise at.refuse(node, "its sizes depend on values that are computed")
    pairs = [(x.shape[a], size) for a, size in zip(axes, sizes.values, strict=True)]
    for n, size in pairs:
        if n != size:
            at.program.require_within(1, n)
    return [(size, 1.0 if size == n else None) for n, size in pairs]


@operator("GridSample")
def grid_sample(at: Lowering, node: ir.Node) -> None:
    """Images at the places of a grid, which are numbers in [-1, 1]: between four elements, or at the nearest."""
    x, grid = at.input(node, 0), at.input(node, 1)
    assert x is not None
    assert grid is not None
    mode, padding = (
        held.as_string() if (held := node.attributes.get(name)) is not None else absent
        for name, absent in (("mode", "linear"), ("padding_mode", "zeros"))
    )
    mode = mode.removeprefix("bi")
    if mode not in ("linear", "nearest") or len(x.shape) != _IMAGES or x.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, f"its places are {mode}, or it is not over two axes of float32")
    for size, wanted in ((x.shape[0], grid.shape[0]), (grid.shape[-1], 2)):
        at.program.require_equal(size, wanted)
    for size in x.shape[2:]:
        at.program.require_within(1, size)
    x, grid = at.contiguous(x), at.contiguous(grid)
    y = at.result(node.outputs[0], (*x.shape[:2], *grid.shape[1:3]))
    aligned = bool(at.attribute(node, "align_corners", 0))
    at.program.grid_sample(x, grid, y, nearest=mode == "nearest", padding=padding, aligned=aligned)
