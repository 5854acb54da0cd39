"""Improves codes and scales in turn, each step the best one with all else fixed.

For the error ``d H d^T`` of a row, ``d = w - decoded``, the step of one code is the nearest to

    decoded_k + (H d)_k / H_kk

(cyclic coordinate descent; QuantEase, arXiv 2309.01885, equation 9), and that of the scale of a group with decoded
values ``s u``

    s + u (H d)_g / (u H_gg u^T)

Neither step can increase the error, up to the rounding of scales to their storage type and of sums in float32. It ends
in a minimum that no single change improves, whereas rounding column by column never looks back.
"""

from __future__ import annotations

import numpy as np

from qc.passes.quantize._columns import Across, Columns

__all__ = ["polish"]

_INNER = 32
_LARGEST_CHANGE = 4.0
"""A scale may change by this factor: more is the sign of a group that H says next to nothing about."""


def polish(w: np.ndarray, columns: Columns | Across, matrix: np.ndarray, error: np.ndarray, sweeps: int) -> None:
    """Improves `columns` in place.

    Args:
        w: ``[K, R]``, the weight, transposed.
        columns: Its codes and parameters.
        matrix: H, ``[K, K]``, positive definite, float32.
        error: ``w - decoded``, ``[K, R]``; updated.
        sweeps: How often to go over all columns.
    """
    pull = matrix @ error
    for _ in range(sweeps):
        for start in range(0, len(w), columns.width):
            group = slice(start, min(start + columns.width, len(w)))
            before = error[group].copy()
            local = pull[group].copy()
            if isinstance(columns, Columns):
                _refit(columns, matrix, error, local, group)
            _descend(w, columns, matrix, error, local, group)
            pull += matrix[:, group] @ (error[group] - before)


def _refit(columns: Columns, matrix: np.ndarray, error: np.ndarray, pull: np.ndarray, group: slice) -> None:
    """Gives a group its least-squares scale, where that is a sane one."""
    units, old = columns.units(group), columns.scale_of(group)
    curved = matrix[group, group] @ units
    curvature, slope = np.einsum("kr,kr->r", units, curved), np.einsum("kr,kr->r", units, pull)
    ratio = 1 + slope / np.where(curvature > 0, curvature * old, np.inf)
    sane = (ratio > 1 / _LARGEST_CHANGE) & (ratio < _LARGEST_CHANGE)
    change = columns.set_scale(group, old * np.where(sane, ratio, 1)) - old
    error[group] -= units * change
    pull -= curved * change


def _descend(
    w: np.ndarray, columns: Columns | Across, matrix: np.ndarray, error: np.ndarray, pull: np.ndarray, group: slice
) -> None:
    """Gives each column of a group its best codes in turn."""
    change = np.empty_like(pull)
    decoded = np.empty(w.shape[1], np.float32)
    first = group.start
    for start in range(first, group.stop, _INNER):
        stop = min(start + _INNER, group.stop)
        pull[start - first : stop - first] += matrix[start:stop, first:start] @ change[: start - first]
        for k in range(start, stop):
            force = pull[k - first]
            force += matrix[k, start:k] @ change[start - first : k - first]
            columns.round(k, w[k] - error[k] + force / matrix[k, k], decoded)
            np.subtract(w[k] - decoded, error[k], out=change[k - first])
            error[k] += change[k - first]
