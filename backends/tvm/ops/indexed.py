"""What is read from, or written to, the places that computed indices say. One counts from the end if it is negative."""

from __future__ import annotations

import onnx_ir as ir

from qc.backends.tvm.c_loops import UPDATES
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.loops import copy, loop
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import product

__all__ = ["gather_elements", "gather_nd", "scatter_elements", "scatter_nd"]


def _indices(at: Lowering, node: ir.Node) -> Tensor:
    """Indices without gaps, in int64."""
    held = at.input(node, 1)
    assert held is not None
    if held.dtype == ir.DataType.INT64:
        return at.contiguous(held)
    wide = at.program.tensor(held.shape, ir.DataType.INT64)
    loop(at, "{a}", [held], wide)
    return wide


def _depth(at: Lowering, node: ir.Node, indices: Tensor) -> int:
    """How many indices make one place."""
    depth = indices.shape[-1].constant
    if depth is None or at.attribute(node, "batch_dims", 0):
        raise at.refuse(node, "it has batch axes, or an unknown number of indices")
    return depth


@operator("GatherND")
def gather_nd(at: Lowering, node: ir.Node) -> None:
    """Slices by tuples of indices."""
    x, indices = at.input(node, 0), _indices(at, node)
    assert x is not None
    depth, x = _depth(at, node, indices), at.contiguous(x)
    y = at.result(node.outputs[0], (*indices.shape[:-1], *x.shape[depth:]), x.dtype)
    at.program.gather_nd(x, indices, y, x.shape[:depth], product(x.shape[depth:]))


@operator("ScatterND")
def scatter_nd(at: Lowering, node: ir.Node) -> None:
    """Slices of a copy are replaced, or take others in, by tuples of indices."""
    x, indices, updates = at.input(node, 0), _indices(at, node), at.input(node, 2)
    assert x is not None
    assert updates is not None
    depth, step = _depth(at, node, indices), _step(at, node, x)
    for size, wanted in zip(updates.shape, (*indices.shape[:-1], *x.shape[depth:]), strict=True):
        at.program.require_equal(size, wanted)
    y, updates = copy(at, x, at.result(node.outputs[0], x.shape, x.dtype)), at.contiguous(updates)
    at.program.scatter_nd(step, updates, indices, y, x.shape[:depth], product(x.shape[depth:]))


@operator("GatherElements")
def gather_elements(at: Lowering, node: ir.Node) -> None:
    """One element along an axis for each index."""
    x, indices = at.input(node, 0), _indices(at, node)
    assert x is not None
    axis = _axis(at, node, x, indices)
    y = at.result(node.outputs[0], indices.shape, x.dtype)
    at.program.gather_elements(at.stored(x), indices, y, axis)


@operator("ScatterElements", "Scatter")
def scatter_elements(at: Lowering, node: ir.Node) -> None:
    """Elements of a copy are replaced, or take others in, one along an axis for each index."""
    x, indices, updates = at.input(node, 0), _indices(at, node), at.input(node, 2)
    assert x is not None
    assert updates is not None
    axis, step = _axis(at, node, x, indices), _step(at, node, x)
    for size, wanted in zip(updates.shape, indices.shape, strict=True):
        at.program.require_equal(size, wanted)
    y, updates = copy(at, x, at.result(node.outputs[0], x.shape, x.dtype)), at.contiguous(updates)
    at.program.scatter_elements(step, updates, indices, y, axis)


def _axis(at: Lowering, node: ir.Node, x: Tensor, indices: Tensor) -> int:
    """The axis along which indices count; on the others there are no more of them than elements."""
    axis = int(at.attribute(node, "axis", 0)) % len(x.shape)  # type: ignore[call-overload]
    for i, (count, size) in enumerate(zip(indices.shape, x.shape, strict=True)):
        if i != axis:
            at.program.require_within(count, size)
    return axis


def _step(at: Lowering, node: ir.Node, x: Tensor) -> str:
    """What becomes of an element and of one that comes to its place."""
    held = node.attributes.get("reduction")
    step = held.as_string() if held is not None else "none"
    if step not in UPDATES or (x.dtype == ir.DataType.BOOL and step != "none"):
        raise at.refuse(node, f"it reduces {x.dtype.name} by {step!r}")
    return step
