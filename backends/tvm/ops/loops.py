"""Element by element, over broadcast operands. Copies, too: how every view becomes a tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qc.backends.tvm.lower import Lowering
from qc.backends.tvm.program import Tensor
from qc.backends.tvm.shapes import Dim, dim, stride_of, wider

__all__ = ["broadcast", "copy", "fill", "loop"]


def broadcast(at: Lowering, shapes: Sequence[Sequence[Dim]]) -> tuple[Dim, ...]:
    """The shape that shapes broadcast to."""
    rank = max(len(s) for s in shapes)
    found = []
    for axis in range(rank):
        sizes = [s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0]
        found.append(functools.reduce(wider, sizes, dim(1)))
        for size in sizes:
            at.program.require_spread(size, found[-1])
    return tuple(found)


def loop(at: Lowering, expression: str, inputs: Sequence[Tensor], y: Tensor) -> None:
    """``y = expression(a, b, ...)`` with the inputs broadcast to y, which has no gaps."""
    inputs = [at.stored(x) for x in inputs]
    shape = y.shape or (dim(1),)
    at.program.map(expression, inputs, [_strides(x, shape) for x in inputs], y, shape)


def _strides(x: Tensor, shape: Sequence[Dim]) -> list[Dim]:
    missing = len(shape) - len(x.shape)
    found = [dim(0)] * missing
    for size, stride, wanted in zip(x.shape, x.strides, shape[missing:], strict=True):
        found.append(stride if size == wanted else stride_of(size, stride))
    return found


def copy(at: Lowering, x: Tensor, y: Tensor) -> Tensor:
    """Copies elements to a tensor of the same shape, which may have gaps; returns it."""
    x = at.stored(x)
    if y.contiguous:
        loop(at, "{a}", [x], y)
    else:
        at.program.scatter(x, _strides(x, y.shape), y)
    return y


def fill(at: Lowering, y: Tensor, value: str) -> None:
    """Sets every element."""
    at.program.map(value, [], [], y.view((y.elements,), (1,)), (y.elements,))
