"""Fits of values that are stored with the weight: tables, planes, powers, codebooks, signed low-rank blocks."""

from __future__ import annotations

import numpy as np

from qc.ir.quant import Clustered, Learned, Nested, Planes, SignedLowRank, Vector, nearest_vectors
from qc.passes.quantize._fit_base import Fit, better, measured, refitted
from qc.passes.quantize._kmeans import kmeans_rows, kmeans_vectors, split
from qc.passes.quantize._search import Search

__all__ = ["fit_learned", "fit_nested", "fit_planes", "fit_signed_low_rank", "fit_vector"]

_CLUSTER_ROUNDS = 4

_TABLE_SAMPLE = 1 << 16
"""Elements that a shared table is fitted on."""

_SWEEPS = 30
"""Alternations of codes and plane scales, as in the reference numbers of DB-LLM's planes."""


def _absolute(
    values: Learned | Nested | Planes | Vector | SignedLowRank,
    w: np.ndarray,
    importance: np.ndarray | None,
    params: dict[str, np.ndarray],
) -> Fit:
    """The fit of values that have no scale, with their parameters as they are stored."""
    stored = {name: array.astype(np.float16) for name, array in params.items()}
    return measured(values, w, importance, np.ones((len(w), 1), np.float32), stored)


def fit_learned(values: Learned, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """Lloyd's k-means in each group."""
    return _absolute(values, w, importance, {"table": kmeans_rows(w, values.bits, importance)})


def fit_clustered(values: Clustered, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """Groups sorted by how heavy their tails are, in as many clusters; then tables, scales and clusters in turn."""
    power = np.sqrt(np.einsum("gm,gm->g", w, w)[:, None] / w.shape[1])
    scale = np.where(power > 0, power, np.float32(1)).astype(np.float32)
    tails = np.mean((w / scale) ** 4, axis=1)
    cluster = np.empty(len(w), np.uint8)
    cluster[np.argsort(tails, kind="stable")] = np.arange(len(w)) * values.tables // len(w)
    table = np.zeros((values.tables, 1 << values.bits), np.float16)
    best: Fit | None = None
    for _ in range(_CLUSTER_ROUNDS):
        for c in range(values.tables):
            table[c] = _shared_table(w, scale, importance, cluster == c, table[c], values.bits)
        choices = []
        for c in range(values.tables):
            params = {"table": table[None], "cluster": np.full(len(w), c, np.uint8)}
            choices.append(refitted(values, w, importance, measured(values, w, importance, scale, params)))
        found = choices[0]
        for other in choices[1:]:
            found = better(found, other)
        found = Fit(found.scale, {**found.params, "table": table[None].copy()}, found.error)
        scale, cluster = found.scale, found.params["cluster"]
        best = found if best is None or found.error.sum() < best.error.sum() else best
    assert best is not None
    return best


def _shared_table(
    w: np.ndarray, scale: np.ndarray, importance: np.ndarray | None, mine: np.ndarray, old: np.ndarray, bits: int
) -> np.ndarray:
    """The table of least error for the groups of a cluster; the old one if it has none."""
    if not mine.any():
        return old
    weights = np.broadcast_to(scale[mine] ** 2, w[mine].shape)
    weights = weights if importance is None else weights * importance[mine]
    units, weights = (w[mine] / scale[mine]).reshape(1, -1), weights.reshape(1, -1)
    step = -(-units.size // _TABLE_SAMPLE)  # a sample tells as much
    return kmeans_rows(units[:, ::step], bits, np.ascontiguousarray(weights[:, ::step])).astype(np.float16)[0]


def fit_nested(values: Nested, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """K-means at the lowest width, then every cluster in two (Any-Precision, section 3.2)."""
    table = kmeans_rows(w, values.first, importance)
    params = {f"table{values.first}": table}
    for bits in range(values.first + 1, values.bits + 1):
        table = split(w, table, importance)
        params[f"table{bits}"] = table
    return _absolute(values, w, importance, params)


def fit_planes(values: Planes, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """Starts from greedy planes, or from a grid of 2 bits; then codes and scales in turn, by least squares."""
    f = np.ones_like(w) if importance is None else importance
    scales, left = [], w.copy()
    if values.signed:
        for _ in range(values.bits):
            scales.append((f * np.abs(left)).sum(axis=1) / f.sum(axis=1))
            left -= np.where(left >= 0, 1, -1) * scales[-1][:, None]
    else:
        step = np.abs(w).max(axis=1) / 2
        scales = [step * (2 if c == 0 else -(0.5 ** (c - 1))) for c in range(values.bits)]
    best = current = _absolute(values, w, importance, {"plane_scale": np.stack(scales, axis=1)})
    for _ in range(_SWEEPS):
        signs = values.signs[values.nearest(w, current.params)]
        normal = np.einsum("gmc,gm,gmd->gcd", signs, f, signs, optimize=True)
        normal += 1e-6 * (np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-30) * np.eye(values.bits)
        right = np.einsum("gmc,gm->gc", signs, f * w, optimize=True)
        solved = np.linalg.solve(normal, right[..., None])[..., 0]
        last, current = current, _absolute(values, w, importance, {"plane_scale": solved})
        best = better(best, current)
        if not np.any(current.error < last.error * (1 - 1e-4)):
            break
    return best


def fit_vector(values: Vector, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """K-means on the vectors; further books on what is left, then each once more with the others fixed."""
    scale = np.ones((len(w), 1), np.float32)
    if values.scaled:
        norms = np.sqrt(np.einsum("gm,gm->g", w, w)[:, None] / w.shape[1])
        scale = np.where(norms > 0, norms, np.float32(1))
    vectors = (w / scale).reshape(-1, values.tile)
    weights = (scale * scale * np.ones_like(w) if importance is None else scale * scale * importance).reshape(
        -1, values.tile
    )
    random, weights = np.random.default_rng(0), weights.mean(axis=1)
    books, codes, left = [], [], vectors.copy()
    for _ in range(values.books):
        books.append(kmeans_vectors(left, values.bits, weights, random))
        codes.append(nearest_vectors(left, books[-1]))
        left -= books[-1][codes[-1]]
    for c in range(values.books) if values.books > 1 else ():
        left += books[c][codes[c]]
        books[c] = kmeans_vectors(left, values.bits, weights, random, books[c])
        codes[c] = nearest_vectors(left, books[c])
        left -= books[c][codes[c]]
    params = {"codebooks": np.stack(books)[None].astype(np.float16)}
    return measured(values, w, importance, scale, params)


def fit_signed_low_rank(values: SignedLowRank, w: np.ndarray, importance: np.ndarray | None, effort: Search) -> Fit:
    """Signs of what is left, and the best low-rank approximation of its magnitudes, block by block."""
    column = np.ones((1, w.shape[1])) if importance is None else np.sqrt(importance.mean(axis=0, keepdims=True) + 1e-12)
    left, lefts, rights = w.astype(np.float64) * column, [], []
    for _ in range(values.books):
        u, s, v = np.linalg.svd(np.abs(left), full_matrices=False)
        rank = min(values.rank, len(s))
        a, b = np.zeros((len(w), values.rank)), np.zeros((values.rank, w.shape[1]))
        a[:, :rank], b[:rank] = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * v[:rank]
        a, b = a.astype(np.float16), (b / column).astype(np.float16)
        lefts.append(a)
        rights.append(b)
        left -= np.where(left >= 0, 1, -1) * (a.astype(np.float64) @ b.astype(np.float64)) * column
    params = {"left": np.stack(lefts, axis=1), "right": np.stack(rights)[None]}
    return _absolute(values, w, importance, params)
