"""Chooses codes and remainder together: what is taken out first, what is added last, from decoded numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qc.ir.errors import InputError
from qc.ir.quant import Columns, Format, LowRank, Order, QuantizedTensor, Sparse

__all__ = ["assign_with_remainder", "leading_directions", "salient_columns", "with_columns"]

_Assign = Callable[[np.ndarray, Format, np.ndarray | None], QuantizedTensor]

_ROUNDS = 2
"""Alternations of dense part and low-rank term; a third changes the error by less than a hundredth."""

_OVERSAMPLE = 8


def assign_with_remainder(
    weight: np.ndarray,
    format: Format,
    metric: np.ndarray | None,
    assign: _Assign,
) -> QuantizedTensor:
    """Quantizes the dense part by `assign`, and what is left as the format says.

    * Sparse: the elements with the largest ``m_k w^2`` are taken out before; their places then hold what the dense part
      misses there, whatever it decodes to (SqueezeLLM, section 4.2).
    * Low rank: the best approximation of the weighted residual, in turn with the codes of what it leaves (LQ-LoRA,
      arXiv 2311.12023, algorithm 1).
    * Columns: those with the largest ``m_k sum_n w_nk^2`` (PB-LLM and PTQ1.61 by columns).
    * Order: columns in falling order of m, as act-order of GPTQ.

    Args:
        weight: ``[N, K]``, any float type.
        format: One with a remainder.
        metric: ``[K]`` or ``[N, K]``, or None for one.
        assign: Quantizes a matrix to a format without one, given which columns of the weight it has (None for all).
    """
    dense, remainder = dataclasses.replace(format, remainder=None), format.remainder
    w = np.asarray(weight, np.float32)
    if not np.all(np.isfinite(w)):
        raise InputError("Expected finite numbers in a weight, found NaN or infinity. Repair the model or exclude it.")
    importance = np.ones(w.shape[1], np.float32) if metric is None else metric
    if isinstance(remainder, Sparse):
        found = _sparse(w, dense, remainder, importance, assign)
    elif isinstance(remainder, LowRank):
        found = _low_rank(w, dense, remainder, importance, assign)
    elif isinstance(remainder, Columns):
        found = _columns(w, dense, remainder, importance, assign)
    else:
        assert isinstance(remainder, Order)
        order = np.argsort(-(importance if importance.ndim == 1 else importance.mean(axis=0)), kind="stable")
        tensor = assign(w[:, order], dense, order)
        found = tensor, {"order": _inverse(order)}
    tensor, params = found
    return QuantizedTensor(format, tensor.codes, {**tensor.params, **params})


_Found = tuple[QuantizedTensor, dict[str, np.ndarray]]


def _sparse(w: np.ndarray, dense: Format, remainder: Sparse, importance: np.ndarray, assign: _Assign) -> _Found:
    count = remainder.count(w.shape)
    saliency = (w * w * importance).reshape(-1)
    places = np.sort(np.argpartition(saliency, len(saliency) - count)[-count:])
    kept = w.copy()
    kept.reshape(-1)[places] = 0
    tensor = assign(kept, dense, None)
    rows, columns = np.divmod(places, w.shape[1])
    values = w[rows, columns] - tensor.decode()[rows, columns]
    types = {s.name: s.dtype.numpy() for s in remainder.streams(w.shape)}
    return tensor, {
        "sparse_values": values.astype(np.float16),
        "sparse_columns": columns.astype(types["sparse_columns"]),
        "sparse_counts": np.bincount(rows, minlength=len(w)).astype(types["sparse_counts"]),
    }


def _low_rank(w: np.ndarray, dense: Format, remainder: LowRank, importance: np.ndarray, assign: _Assign) -> _Found:
    """Weights of elements count by the roots of their means over rows and columns (LQ-LoRA, section 3.3)."""
    column = _root(importance if importance.ndim == 1 else importance.mean(axis=0))
    row = np.ones((len(w), 1), np.float32) if importance.ndim == 1 else _root(importance.mean(axis=1))[:, None]

    def rest(decoded: np.ndarray) -> dict[str, np.ndarray]:
        left, right = _truncated((w - decoded) * row * column, remainder.rank)
        return {"lowrank_left": (left / row).astype(np.float16), "lowrank_right": (right / column).astype(np.float16)}

    zeros = np.zeros_like(w)
    params = rest(zeros)
    for _ in range(_ROUNDS):
        tensor = assign(w - remainder.decode(zeros, params), dense, None)
        params = rest(tensor.decode())
    return tensor, params


def _root(weights: np.ndarray) -> np.ndarray:
    """Square roots relative to the largest, none of them zero."""
    largest = max(float(weights.max()), 1e-30)
    return np.sqrt(np.maximum(weights / largest, 1e-12)).astype(np.float32)


def leading_directions(error: np.ndarray, matrix: np.ndarray, rank: int) -> np.ndarray:
    """The leading eigenvectors of ``E H E^T``, ``[N, rank]``, by the power method; zeros where there are fewer."""
    random = np.random.default_rng(0)
    count = min(rank + _OVERSAMPLE, *error.shape)
    basis = error @ random.standard_normal((error.shape[1], count)).astype(np.float32)
    for _ in range(3):
        basis = np.linalg.qr(error @ (matrix @ (error.T @ np.linalg.qr(basis)[0])))[0]
    pulled = basis.T @ error
    _, vectors = np.linalg.eigh(pulled @ matrix @ pulled.T)
    found = np.zeros((len(error), rank), np.float32)
    leading = basis @ vectors[:, ::-1][:, :rank]
    found[:, : leading.shape[1]] = leading
    return found


def _truncated(a: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``[N, r]`` and ``[r, K]`` of nearly the best approximation (Halko et al. 2011, two power iterations)."""
    random = np.random.default_rng(0)
    basis = a @ random.standard_normal((a.shape[1], min(rank + _OVERSAMPLE, *a.shape))).astype(np.float32)
    for _ in range(2):
        basis = np.linalg.qr(a @ (a.T @ np.linalg.qr(basis)[0]))[0]
    u, s, v = np.linalg.svd(basis.T @ a, full_matrices=False)
    left, right = np.zeros((len(a), rank), np.float32), np.zeros((rank, a.shape[1]), np.float32)
    n = min(rank, len(s))
    root = np.sqrt(s[:n])
    left[:, :n], right[:n] = basis @ u[:, :n] * root, root[:, None] * v[:n]
    return left, right


def _columns(w: np.ndarray, dense: Format, remainder: Columns, importance: np.ndarray, assign: _Assign) -> _Found:
    rest, chosen = salient_columns(w, remainder, importance)
    tensor, own = (
        assign(np.ascontiguousarray(w[:, part]), format, part)
        for part, format in ((rest, dense), (chosen, remainder.format))
    )
    return with_columns(tensor, own, rest, chosen)


def salient_columns(w: np.ndarray, remainder: Columns, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the dense part and those of the remainder, in order: those with the most ``sum_n m_nk w_nk^2``."""
    saliency = (importance * w * w).sum(axis=0, dtype=np.float64)
    chosen = np.sort(np.argsort(-saliency, kind="stable")[: remainder.count(w.shape[1])])
    return np.setdiff1d(np.arange(w.shape[1]), chosen), chosen


def with_columns(tensor: QuantizedTensor, own: QuantizedTensor, rest: np.ndarray, chosen: np.ndarray) -> _Found:
    """The dense part and everything else that is stored, given both parts of the columns."""
    params = {f"columns_{name}": array for name, array in {"codes": own.codes, **own.params}.items()}
    return tensor, {**params, "order": _inverse(np.concatenate([rest, chosen]))}


def _inverse(order: np.ndarray) -> np.ndarray:
    """The place of each column in an order, in the smallest type that holds it."""
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places.astype(np.uint16 if len(order) <= 1 << 16 else np.int32)
