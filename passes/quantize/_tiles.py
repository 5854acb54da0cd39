"""Rounds vectors along K with feedback: a code stands for several columns, whose errors the inputs tie together.

For a tile B of columns the terms of ``d H d^T`` (`qc.passes.quantize.gptq`) that belong to it are

    |(d_B + c) R_BB|^2        c = sum_{j<B} d_j R_jB R_BB^-1

so its best code is that of the vector nearest to ``w_B + c`` once both are multiplied by ``R_BB``: the nearest of a
codebook that is transformed alike. Ignoring ``R_BB`` is the usual mistake. Vectors along N lie in one column and need
none of this: there, the metric is a multiple of the identity (VPTQ, arXiv 2409.17066, section 3).
"""

from __future__ import annotations

import numpy as np

from qc.ir.quant import QuantizedTensor, Vector
from qc.passes.quantize._hessian import Hessian

__all__ = ["Tiles", "descend_tiles", "round_tiles"]

_BLOCK = 128
"""Columns whose feedback is summed by one product of matrices."""


class Tiles:
    """The codes of some rows of a tensor whose vectors lie along K.

    Attributes:
        size: Columns of a tile.
    """

    def __init__(self, tensor: QuantizedTensor, rows: slice) -> None:
        """Takes a tensor of `Vector` values; codes are written into it."""
        values, part = tensor.format.values, tensor.rows(rows)
        assert isinstance(values, Vector)
        self.size, self._values, self._codes = values.tile, values, part.codes
        self._books = part.params["codebooks"].astype(np.float32)
        scale, columns = tensor.format.scale.decode(part.params), part.shape[1]
        self._scale = np.broadcast_to(scale, (len(scale), tensor.format.groups(columns)))
        self._width = tensor.format.width(columns)

    def round(self, first: int, target: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Stores the codes of one tile and returns what they decode to, ``[R, v]``.

        Args:
            first: Its first column.
            target: ``[R, v]``.
            factor: ``[v, v]``: distances are those of vectors times it.
        """
        scale = self._scale[:, first // self._width][:, None]
        codes = self._values.nearest((target / scale) @ factor, {"codebooks": self._books @ factor})
        books = self._values.books
        place = first // self.size * books
        self._codes[:, place : place + books] = codes
        return self._values.decode(codes, {"codebooks": self._books}) * scale


def round_tiles(w: np.ndarray, tiles: Tiles, hessian: Hessian) -> np.ndarray:
    """Rounds all columns of ``w [R, K]`` with feedback; returns ``w - decoded``.

    Args:
        w: The weight, float32.
        tiles: Takes the codes.
        hessian: With whole tiles in its order (`Hessian.tiled`).
    """
    order, feedback, pivots, size = hessian.order, hessian.feedback, hessian.pivots, tiles.size
    error = np.empty_like(w)  # in the order of the factor
    for start in range(0, len(order), size * max(1, _BLOCK // size)):
        stop = min(start + size * max(1, _BLOCK // size), len(order))
        before = error[:, :start] @ feedback[:start, start:stop]
        for first in range(start, stop, size):
            tile = slice(first, first + size)
            pull = before[:, first - start : first - start + size] + error[:, start:first] @ feedback[start:first, tile]
            factor = np.triu(feedback[tile, tile]) * pivots[tile]
            original = w[:, order[tile]]
            target = original + np.linalg.solve(factor.T, (pull * pivots[tile]).T).T
            error[:, tile] = original - tiles.round(order[first], target, factor)
    unsorted = np.empty_like(error)
    unsorted[:, order] = error
    return unsorted


def descend_tiles(w: np.ndarray, tiles: Tiles, matrix: np.ndarray, error: np.ndarray) -> None:
    """Gives each tile its best code in turn, everything else fixed (AQLM, arXiv 2401.06118, section 3, one beam).

    With ``H_BB = L L^T``, that is the code of the vector nearest to ``decoded_B + (d H)_B H_BB^-1``, both times L.

    Args:
        w: ``[R, K]``.
        tiles: Has the codes, and gets better ones.
        matrix: H.
        error: ``w - decoded``; updated.
    """
    pull, size = error @ matrix, tiles.size
    for start in range(0, w.shape[1], size * max(1, _BLOCK // size)):
        block = slice(start, min(start + size * max(1, _BLOCK // size), w.shape[1]))
        before, local = error[:, block].copy(), pull[:, block].copy()
        for first in range(start, block.stop, size):
            tile, inner = slice(first, first + size), slice(first - start, first - start + size)
            own = matrix[tile, tile]
            target = w[:, tile] - error[:, tile] + np.linalg.solve(own, local[:, inner].T).T
            left = w[:, tile] - tiles.round(first, target, np.linalg.cholesky(own))
            local += (left - error[:, tile]) @ matrix[tile, block]
            error[:, tile] = left
        pull += (error[:, block] - before) @ matrix[block]
