"""A weight seen column by column: what rounding with feedback needs from a format, and nothing more."""

from __future__ import annotations

import numpy as np

from qc.ir.quant import QuantizedTensor
from qc.passes.quantize.assign import stored_scale

__all__ = ["ROWS", "Columns"]

ROWS = 2048
"""Rows that are worked on together. Rows are independent; as many as this make products of matrices efficient while the
128 columns of a block stay in a core's cache."""


class Columns:
    """The parameters of some rows of a quantized tensor, transposed: a column of the weight is contiguous.

    Attributes:
        codes: ``[K, R]``, filled by `round`.
        width: Number of columns in a group.
    """

    def __init__(self, tensor: QuantizedTensor, rows: slice) -> None:
        format = tensor.format
        self._values = format.values
        self.width = tensor.codes.shape[1] if format.group is None else format.group
        self._tensor, self._rows = tensor, rows
        self._scale = np.ascontiguousarray(tensor.params["scale"][rows].T, np.float32)
        zero = tensor.params.get("zero_point")
        self._zero = np.zeros_like(self._scale) if zero is None else np.ascontiguousarray(zero[rows].T, np.float32)
        self.codes = np.ascontiguousarray(tensor.codes[rows].T)

    def round(self, column: int, target: np.ndarray, out: np.ndarray) -> None:
        """Stores the codes nearest to `target` ``[R]`` and writes what they decode to into `out`."""
        group = column // self.width
        scale, zero = self._scale[group], self._zero[group]
        np.divide(target, scale, out=out)
        np.rint(out, out=out)
        out += zero
        np.maximum(out, self._values.low, out=out)
        np.minimum(out, self._values.high, out=out)
        self.codes[column] = out
        out -= zero
        out *= scale

    def units(self, part: slice) -> np.ndarray:
        """Decoded values of columns of one group at scale one, ``[k, R]``, float32."""
        return self.codes[part].astype(np.float32) - self._zero[part.start // self.width]

    def scale_of(self, part: slice) -> np.ndarray:
        """The scales ``[R]`` of the group that some columns belong to."""
        return self._scale[part.start // self.width]

    def set_scale(self, part: slice, scale: np.ndarray) -> np.ndarray:
        """Changes the scales ``[R]`` of the group of some columns; returns them as they are stored."""
        kind = self._tensor.format.scale
        largest = float(np.finfo(kind.numpy()).max)
        stored = stored_scale(np.clip(scale, -largest, largest), kind, "weight").astype(np.float32)
        self._scale[part.start // self.width] = stored
        return stored

    def commit(self) -> None:
        """Writes codes and scales back to the tensor."""
        self._tensor.codes[self._rows] = self.codes.T
        self._tensor.params["scale"][self._rows] = self._scale.T
