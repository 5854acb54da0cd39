"""Rounds a weight column by column, such that later columns make up for the errors of earlier ones.

GPTQ, arXiv 2210.17323. With ``H = E[x x^T] = R R^T``, R upper triangular, the error of the outputs of a row is

    d H d^T = sum_k R_kk^2 (d_k + sum_{j<k} d_j R_jk / R_kk)^2        d = w - decoded

so with the columns before k rounded, column k is best rounded to the nearest of ``w_k + sum_{j<k} d_j R_jk / R_kk``.
That is GPTQ in the form of LDLQ (QuIP, arXiv 2307.13304, theorem 6): the same codes, but one factorization and no
inverse. The last column has no later one to lean on, so a column's place matters: those with the largest second moment
come first. Groups do not move with them (*static groups*): their parameters are found before, by range search weighted
by `Hessian.importance`, and the result needs no index of groups.

Where H is a multiple of the identity, the codes are those of range search. A weight that the format holds exactly stays
as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qc.ir.errors import InputError
from qc.ir.quant import Columns as ColumnsApart
from qc.ir.quant import Format, LowRank, QuantizedTensor, Vector
from qc.passes.quantize._columns import ROWS, Across, Columns, takes
from qc.passes.quantize._hessian import Hessian
from qc.passes.quantize._polish import polish
from qc.passes.quantize._refit import is_linear, refit
from qc.passes.quantize._remainder import assign_with_remainder, leading_directions, salient_columns, with_columns
from qc.passes.quantize._tiles import Tiles, descend_tiles, round_tiles
from qc.passes.quantize.assign import Search, assign, run_parallel

__all__ = ["Hessian", "gptq", "output_sqnr_db", "working_bytes"]

_BLOCK, _INNER = 128, 32
"""Columns whose feedback is summed by one product of matrices, at two levels; within the inner one, by products with
vectors."""

_LOW_RANK_ROUNDS = 3
"""Alternations of codes and low-rank term; the error of a later one is not always smaller."""

_SQUARES = 20
"""Bytes for each element of the Hessian: second moments in float64, feedback, the damped matrix, and what making them
takes beyond."""

_SAMPLE = 64
"""Rows that the error of the outputs is measured on."""


def gptq(
    weight: np.ndarray,
    format: Format,
    hessian: Hessian,
    *,
    sweeps: int = 0,
    name: str = "weight",
    threads: int = 1,
    effort: Search | None = None,
) -> QuantizedTensor:
    """Quantizes a weight for the least squared error of its outputs.

    Memory beside the weight and the Hessian: four float32 copies of 2048 rows per thread, or of the whole weight in
    formats with vectors, groups along N or a low-rank term. The result does not depend on the number of threads.

    Args:
        weight: ``[N, K]`` of any float type.
        format: What the codes shall mean.
        hessian: Of the inputs; layers with the same input share it.
        sweeps: How often scales and codes are improved once more, each in turn; see `qc.passes.quantize._polish`.
        name: Name of the weight for messages.
        threads: Number of threads.
        effort: How hard to search for ranges; None for the default.

    Raises:
        InputError: If the weight is not a finite matrix, a scale does not fit its storage type, or codes of the format
            depend on one another by more than columns.
    """
    if format.remainder is not None:

        def rounded(part: np.ndarray, format: Format, hessian: Hessian) -> QuantizedTensor:
            return gptq(part, format, hessian, sweeps=sweeps, name=name, threads=threads, effort=effort)

        if isinstance(format.remainder, ColumnsApart):
            return _apart(weight, format, hessian, rounded)
        if isinstance(format.remainder, LowRank):
            return _with_low_rank(weight, format, hessian, rounded)

        def dense(part: np.ndarray, format: Format, columns: np.ndarray | None) -> QuantizedTensor:
            return rounded(part, format, hessian if columns is None else hessian.part(columns))

        return assign_with_remainder(weight, format, hessian.diagonal, dense)
    if not takes(format):
        raise InputError(
            f"Expected a format whose codes depend on one another by columns alone, found {format} for {name!r}."
        )
    tensor = assign(weight, format, hessian.importance, name=name, threads=threads, effort=effort)
    vectors = isinstance(format.values, Vector)
    if vectors and format.axis == "in":
        return _vectors(weight, tensor, hessian, sweeps, threads)
    linear = bool(sweeps) and is_linear(format)
    matrix = hessian.matrix if sweeps else None  # made once, by this thread

    def work(start: int) -> None:
        rows = slice(start, start + step)
        columns = Columns(tensor, rows) if format.axis == "in" else Across(tensor, rows)
        w = np.ascontiguousarray(np.asarray(weight[rows], np.float32).T)
        error = _round(w, columns, hessian)
        if matrix is not None:
            polish(w, columns, matrix, error, 1 if linear else sweeps)
        columns.commit()
        for _ in range(sweeps if linear else 0):
            assert matrix is not None
            part = tensor.rows(rows) if format.axis == "in" else tensor
            for key, array in refit(w.T, part, matrix).items():
                part.params[key][:] = array
            columns = Columns(tensor, rows) if format.axis == "in" else Across(tensor, rows)
            columns.codes[:] = part.codes.T if format.axis == "in" else part.codes
            polish(w, columns, matrix, np.ascontiguousarray((w.T - part.decode()).T), 1)
            columns.commit()

    step = ROWS if format.axis == "in" else len(weight)
    run_parallel(work, range(0, len(weight), step), threads)
    return tensor


def _vectors(
    weight: np.ndarray, tensor: QuantizedTensor, hessian: Hessian, sweeps: int, threads: int
) -> QuantizedTensor:
    """Vectors along K: all rows share the codebooks, so these are refitted when each has been gone over."""
    w, matrix = np.asarray(weight, np.float32), hessian.matrix
    tiled = hessian.tiled(tensor.format.values.tile)
    starts = range(0, len(w), ROWS)

    def round_rows(start: int) -> None:
        rows = slice(start, start + ROWS)
        round_tiles(w[rows], Tiles(tensor, rows), tiled)

    def descend_rows(start: int) -> None:
        rows = slice(start, start + ROWS)
        descend_tiles(w[rows], Tiles(tensor, rows), matrix, w[rows] - tensor.rows(rows).decode())

    run_parallel(round_rows, starts, threads)
    for _ in range(sweeps):
        tensor = QuantizedTensor(tensor.format, tensor.codes, refit(w, tensor, matrix))
        run_parallel(descend_rows, starts, threads)
    return tensor


_Rounded = Callable[[np.ndarray, Format, Hessian], QuantizedTensor]


def _apart(weight: np.ndarray, format: Format, hessian: Hessian, rounded: _Rounded) -> QuantizedTensor:
    """Rounds what has the dense format first; the columns apart, which have more bits as a rule, make up for it."""
    remainder, w = format.remainder, np.asarray(weight, np.float32)
    assert isinstance(remainder, ColumnsApart)
    rest, chosen = salient_columns(w, remainder, hessian.diagonal.astype(np.float32))
    dense = rounded(w[:, rest], dataclasses.replace(format, remainder=None), hessian.without(chosen))
    more = hessian.made_up(w[:, rest] - dense.decode(), chosen)
    own = rounded((w[:, chosen] + more).astype(np.float32), remainder.format, hessian.part(chosen))
    _, params = with_columns(dense, own, rest, chosen)
    return QuantizedTensor(format, dense.codes, {**dense.params, **params})


def _with_low_rank(weight: np.ndarray, format: Format, hessian: Hessian, rounded: _Rounded) -> QuantizedTensor:
    """Codes and the low-rank term that is best for what they leave, in turn; the best pair that was seen.

    The term of least ``tr(d H d^T)`` for an error E is ``U U^T E``, with U the leading eigenvectors of ``E H E^T``.
    """
    remainder, w, matrix = format.remainder, np.asarray(weight, np.float32), hessian.matrix
    assert isinstance(remainder, LowRank)
    found: tuple[float, QuantizedTensor] | None = None
    term = np.zeros_like(w)
    for _ in range(_LOW_RANK_ROUNDS):
        dense = rounded(w - term, dataclasses.replace(format, remainder=None), hessian)
        error = w - dense.decode()
        basis = leading_directions(error, matrix, remainder.rank)
        params = {"lowrank_left": basis.astype(np.float16), "lowrank_right": (basis.T @ error).astype(np.float16)}
        term = remainder.decode(np.zeros_like(w), params)
        error -= term
        loss = float(np.vdot(error @ matrix, error))
        if found is None or loss < found[0]:
            found = loss, QuantizedTensor(format, dense.codes, {**dense.params, **params})
    assert found is not None
    return found[1]


def working_bytes(columns: int, threads: int = 2) -> int:
    """Memory of `gptq` and the Hessian for so many columns, in bytes, beside the weight."""
    return _SQUARES * columns**2 + 16 * threads * ROWS * columns


def output_sqnr_db(weight: np.ndarray, tensor: QuantizedTensor, gram: np.ndarray) -> float:
    """Signal to noise ratio of the layer's outputs in decibels, over evenly spaced rows; infinite if exact.

    Args:
        weight: ``[N, K]``, any float type.
        tensor: What it became.
        gram: ``E[x x^T]``, ``[K, K]``.
    """
    rows = np.unique(np.linspace(0, len(weight) - 1, _SAMPLE).astype(int))
    w = np.asarray(weight[rows], np.float64)
    noise = w - tensor.decode()[rows] if not tensor.sliceable else w - tensor.rows(rows).decode()
    signal, noise = (float(np.einsum("nk,nk->", a @ gram, a)) for a in (w, noise))
    if noise <= 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def _round(w: np.ndarray, columns: Columns | Across, hessian: Hessian) -> np.ndarray:
    """Rounds all columns of ``w [K, R]``; returns ``w - decoded`` in the same layout."""
    order, feedback = hessian.order, hessian.feedback
    error = np.empty_like(w)  # in the order of the factor
    decoded = np.empty(w.shape[1], np.float32)
    for start in range(0, len(w), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(w)))
        original = w[order[block]]
        target = original + feedback[:start, block].T @ error[:start]
        for inner in range(start, block.stop, _INNER):
            stop = min(inner + _INNER, block.stop)
            target[inner - start : stop - start] += feedback[start:inner, inner:stop].T @ error[start:inner]
            for k in range(inner, stop):
                goal = target[k - start]
                goal += feedback[inner:k, k] @ error[inner:k]
                columns.round(order[k], goal, decoded)
                np.subtract(original[k - start], decoded, out=error[k])
    unsorted = np.empty_like(error)
    unsorted[order] = error
    return unsorted
