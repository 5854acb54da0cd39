"""The least-squares tables, codebooks and plane scales for given codes and the error of the outputs.

What a weight decodes to is linear in them, ``w = D p``, so ``d H d^T`` summed over rows is least where
``D' (D p) H = D' W H``. Conjugate gradients solve it without the matrix: D is the format's decoding, D' adds up the
elements that each number was used for. In turn with better codes, this is alternating least squares.
"""

from __future__ import annotations

import functools

import numpy as np

from qc.ir.quant import Format, Learned, Planes, QuantizedTensor, Vector

__all__ = ["is_linear", "refit"]

_STEPS = 6
"""Steps of conjugate gradients; from the numbers that there are, more change the error by less than a thousandth."""

_LARGEST = 60000.0


def is_linear(format: Format) -> bool:
    """Whether there are numbers to refit."""
    return isinstance(format.values, Learned | Planes | Vector) and format.axis in ("in", "out")


def refit(weight: np.ndarray, tensor: QuantizedTensor, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of a tensor with those numbers improved for its codes; the old ones where they are better.

    Args:
        weight: ``[N, K]``, float32.
        tensor: In a format that `is_linear` says yes to.
        matrix: H, ``[K, K]``, positive definite, float32.
    """
    format = tensor.format
    name = format.values.params[0].name
    held = tensor.params[name]
    alone = format.axis == "in" and not isinstance(format.values, Vector)  # rows share no number
    gather = functools.partial(_gathered, tensor)

    def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = (a.astype(np.float64) * b).reshape(len(a) if alone else 1, -1).sum(axis=1)
        return product.reshape(-1, *[1] * (a.ndim - 1))

    def decoded(numbers: np.ndarray) -> np.ndarray:
        return format.decode(tensor.codes, {**tensor.params, name: numbers})

    def loss(error: np.ndarray) -> np.ndarray:
        rows = np.einsum("nk,nk->n", error @ matrix, error, dtype=np.float64)
        return rows.reshape(-1, *[1] * (held.ndim - 1)) if alone else rows.sum().reshape([1] * held.ndim)

    start = held.astype(np.float32)
    error = weight - decoded(start)
    left = gather(error @ matrix)
    curvature = gather(np.broadcast_to(np.diagonal(matrix), weight.shape), squared=True)
    scaled = np.where(curvature > 0, left / np.where(curvature > 0, curvature, 1), 0)
    step, change, size = scaled, np.zeros_like(start), inner(left, scaled)
    for _ in range(_STEPS):
        curved = gather(decoded(step) @ matrix)
        bend = inner(step, curved)
        length = np.where(bend > 0, size / np.where(bend > 0, bend, 1), 0)
        change = change + length * step
        left = left - length * curved
        scaled = np.where(curvature > 0, left / np.where(curvature > 0, curvature, 1), 0)
        last, size = size, inner(left, scaled)
        step = (scaled + np.where(last > 0, size / np.where(last > 0, last, 1), 0) * step).astype(np.float32)
    found = np.clip(start + change, -_LARGEST, _LARGEST).astype(held.dtype)
    better = loss(weight - decoded(found)) < loss(error)
    return {**tensor.params, name: np.where(better, found, held)}


def _gathered(tensor: QuantizedTensor, weight: np.ndarray, *, squared: bool = False) -> np.ndarray:
    """``D' x`` of a matrix ``[N, K]``: for each number, the sum over the elements that it is a part of.

    Args:
        tensor: Has the codes.
        weight: The matrix.
        squared: Whether the entries of D count squared: of a diagonal, that gives the one of ``D' H D``.
    """
    format, values = tensor.format, tensor.format.values
    x = weight.T if format.axis == "out" else weight
    rows, columns = x.shape
    groups, width = format.groups(columns), format.width(columns)
    scale = format.scale.decode(tensor.params)
    padded = np.pad(x, ((0, 0), (0, groups * width - columns))).reshape(rows, groups, width)
    x = (padded * (scale**2 if squared else scale)[:, :, None]).reshape(rows * groups, width)
    shape = tensor.params[values.params[0].name].shape
    count = groups * width // values.tile * values.books
    codes = np.pad(tensor.codes, ((0, 0), (0, count - tensor.codes.shape[1]))).reshape(rows * groups, -1)
    if isinstance(values, Planes):
        signs = values.signs**2 if squared else values.signs
        return np.einsum("gmc,gm->gc", signs[codes], x).reshape(shape)
    if isinstance(values, Learned):
        size = 1 << values.bits
        index = codes.astype(np.int64) + size * np.arange(len(codes))[:, None]
        return np.bincount(index.reshape(-1), x.reshape(-1), size * len(codes)).reshape(shape).astype(np.float32)
    assert isinstance(values, Vector)
    vectors, indices = x.reshape(-1, values.tile), codes.reshape(-1, values.books)
    sums = [np.bincount(i, column, 1 << values.bits) for i in indices.T for column in vectors.T]
    return np.stack(sums).reshape(1, values.books, values.tile, -1).swapaxes(2, 3).astype(np.float32)
