"""A weight seen column by column: what rounding with feedback needs from a format, and nothing more."""

from __future__ import annotations

import numpy as np

from qc.ir.quant import Affine, FloatScale, Format, QuantizedTensor

__all__ = ["ROWS", "Across", "Columns", "takes"]

ROWS = 2048
"""Rows that are worked on together. Rows are independent; as many as this make products of matrices efficient while the
128 columns of a block stay in a core's cache."""


def takes(format: Format) -> bool:
    """Whether a weight in this format can be rounded with feedback: column by column, or vector by vector."""
    return format.axis != "tensor" and all(p.scope != "column" for p in format.values.params)


class Columns:
    """The parameters of some rows of a quantized tensor, transposed: a column of the weight is contiguous.

    Attributes:
        codes: ``[K, R]``, filled by `round`.
        width: Number of columns in a group.
    """

    def __init__(self, tensor: QuantizedTensor, rows: slice) -> None:
        """Takes a tensor in a format with a code per element, in groups along K."""
        format = tensor.format
        values = format.values
        part = tensor.rows(rows)
        self._values, self._tensor, self._rows = values, tensor, rows
        self.width = format.width(tensor.codes.shape[1])
        self.codes = np.ascontiguousarray(part.codes.T)
        self._scale = np.ascontiguousarray(format.scale.decode(part.params).T)
        if len(self._scale) == 1 or self._scale.shape[1] == 1:
            shape = format.groups(tensor.codes.shape[1]), self.codes.shape[1]
            self._scale = np.array(np.broadcast_to(self._scale, shape))
        self._params = {p.name: part.params[p.name] for p in values.params}
        self._fixed = not isinstance(format.scale, FloatScale)
        self._zero = self._integer_zeros()

    def _integer_zeros(self) -> np.ndarray | None:
        """Zero points ``[groups, R]`` if codes are integers and rounding is all there is to it, else None."""
        if not isinstance(self._values, Affine) or self._values.half or self._values.floating:
            return None
        zero = self._params.get("zero_point")
        return np.zeros_like(self._scale) if zero is None else np.ascontiguousarray(zero.T, np.float32)

    def round(self, column: int, target: np.ndarray, out: np.ndarray) -> None:
        """Stores the codes nearest to `target` ``[R]`` and writes what they decode to into `out`."""
        group = column // self.width
        scale = self._scale[group]
        np.divide(target, scale, out=out)
        if self._zero is None:
            params = self._of_group(group)
            codes = self._values.nearest(out[:, None], params)
            self.codes[column] = codes[:, 0]
            np.multiply(self._values.decode(codes, params)[:, 0], scale, out=out)
            return
        zero, values = self._zero[group], self._values
        assert isinstance(values, Affine)
        np.rint(out, out=out)
        out += zero
        np.maximum(out, values.low, out=out)
        np.minimum(out, values.high, out=out)
        self.codes[column] = out
        out -= zero
        out *= scale

    def _of_group(self, group: int) -> dict[str, np.ndarray]:
        """The parameters of the value map in one group, as `ValueMap` takes them."""
        scopes = {p.name: p.scope for p in self._values.params}
        return {name: array[:, group] if scopes[name] == "group" else array for name, array in self._params.items()}

    def units(self, part: slice) -> np.ndarray:
        """Decoded values of columns of one group at scale one, ``[k, R]``, float32."""
        group = part.start // self.width
        if self._zero is None:
            return self._values.decode(self.codes[part].T, self._of_group(group)).T
        return self.codes[part].astype(np.float32) - self._zero[group]

    def scale_of(self, part: slice) -> np.ndarray:
        """The scales ``[R]`` of the group that some columns belong to."""
        return self._scale[part.start // self.width]

    def set_scale(self, part: slice, scale: np.ndarray) -> np.ndarray:
        """Changes the scales ``[R]`` of the group of some columns; returns them as they are stored.

        Scales that depend on one another, or that are no floats, stay as they are.
        """
        group = part.start // self.width
        if self._fixed:
            return self._scale[group]
        storage = self._tensor.format.scale
        assert isinstance(storage, FloatScale)
        largest = storage.largest
        stored = storage.encode(np.clip(scale, -largest, largest))["scale"].astype(np.float32)
        self._scale[group] = stored
        return stored

    def commit(self) -> None:
        """Writes codes and scales back to the tensor."""
        self._tensor.codes[self._rows] = self.codes.T
        if not self._fixed:
            self._tensor.params["scale"][self._rows] = self._scale.T


class Across:
    """The codes of a tensor whose groups and vectors lie along N, so that a column of the weight has its own.

    Within a column the metric is a multiple of the identity, so the nearest codes are the best (VPTQ, arXiv 2409.17066,
    section 3).

    Attributes:
        codes: Of the transposed weight: a row of them is a column of the weight.
        width: Number of columns that are worked on together.
    """

    width = 32

    def __init__(self, tensor: QuantizedTensor, rows: slice) -> None:
        """Takes a tensor in a format with groups along N, and all of its rows."""
        self.codes, self._format, self._params = tensor.codes, tensor.format, tensor.params
        self._own = {p.name for p in tensor.format.values.params if p.scope != "tensor"}
        self._own |= {s.name for s in tensor.format.scale.streams(*tensor.format.grid(tensor.shape))}
        self._shared = {name for name in self._own if len(tensor.params[name]) != len(tensor.codes)}

    def round(self, column: int, target: np.ndarray, out: np.ndarray) -> None:
        """Stores the codes nearest to `target` ``[N]`` and writes what they decode to into `out`."""
        part = slice(column, column + 1)
        held = {n: a[part] if n in self._own - self._shared else a for n, a in self._params.items()}
        codes = self._format.nearest(target[:, None], held)
        self.codes[part] = codes
        out[:] = self._format.decode(codes, held)[:, 0]

    def commit(self) -> None:
        """Does nothing: codes are written where they belong at once."""
