"""The vocabulary of formats: what is stored (`Stream`), what a value map needs (`Param`, `ValueMap`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qc.ir._quant_packing import pack, row_bytes, unpack

__all__ = ["Param", "Stream", "ValueMap"]


@dataclasses.dataclass(frozen=True)
class Stream:
    """One array that a quantized weight stores.

    Attributes:
        name: ``codes``, ``scale``, ``zero_point``, ``table``...
        shape: As `QuantizedTensor` holds it, one element per code.
        dtype: Element type as stored; None for packed codes.
        bits: Width of a packed code, or of an element type that holds codes (`qc.ir._quant_packing`); None if
            `dtype` says it.
        low: The smallest code, which is packed as 0.
        by_row: Whether the first axis is that of the weight's rows, so that rows can be decoded alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType | None = None
    bits: int | None = None
    low: int = 0
    by_row: bool = True

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor: packed rows are bytes."""
        if self.bits is None or self.dtype is not None:
            return self.shape
        return (*self.shape[:-1], row_bytes(self.shape[-1], self.bits))

    @property
    def nbytes(self) -> int:
        """Bytes as stored, padding included."""
        count = int(np.prod(self.stored_shape, dtype=np.int64))
        return count if self.dtype is None else -(-count * self.dtype.bitwidth // 8)

    def pack(self, array: np.ndarray) -> np.ndarray:
        """The array as stored, one element per code of `dtype`."""
        array = np.asarray(array).reshape(self.shape)
        if self.bits is None or self.dtype is not None:
            return array
        return pack(array - np.int16(self.low) if self.low else array, self.bits)

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """The inverse of `pack`."""
        if self.bits is None or self.dtype is not None:
            return np.asarray(stored).reshape(self.shape)
        codes = unpack(np.asarray(stored).reshape(self.stored_shape), self.bits, self.shape[-1])
        return (codes.astype(np.int16) + self.low).astype(np.int8) if self.low else codes

    @property
    def packed(self) -> Stream:
        """The same as bytes, also where ONNX has an element type for it: an integer of `bits`."""
        return self if self.bits is None else dataclasses.replace(self, dtype=None)


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter of a value map, beside the scale.

    Attributes:
        name: Its key in `QuantizedTensor.params`.
        scope: What one of them belongs to: ``group``, ``row``, ``tensor``, or ``column`` (of a weight without groups).
        shape: Its own dimensions, after those of the scope (before, for ``column``).
        dtype: Element type as stored; None for packed codes.
        bits: Width of a packed code.
    """

    name: str
    scope: str
    shape: tuple[int, ...] = ()
    dtype: ir.DataType | None = None
    bits: int | None = None

    def stream(self, rows: int, groups: int, columns: int) -> Stream:
        """What is stored for a weight."""
        scopes = {"group": (rows, groups), "row": (rows,), "tensor": (1,)}
        shape = (1, *self.shape, columns) if self.scope == "column" else (*scopes[self.scope], *self.shape)
        return Stream(self.name, shape, self.dtype, self.bits, by_row=self.scope in ("group", "row"))


class ValueMap(Protocol):
    """What a code stands for, before the scale: the part of a format that assignments search and project on.

    Arrays are laid out by groups: a matrix ``[G, M]`` of units (weight / scale), its codes ``[G, n]`` with
    ``n = M / tile * books``, and parameters ``[G, *shape]`` (or ``[1, ...]`` where all groups share them).

    Attributes:
        bits: Width of a code; 0 for ternary codes, which are stored five to a byte.
        low: The smallest code.
        tile: Elements that a code stands for: more than 1 for vector codebooks.
        books: Codes that are summed for a tile.
        scaled: Whether units are multiplied by a scale; tables of absolute values are not.
        params: Its parameters.
        about: One line for listings.
    """

    @property
    def bits(self) -> int: ...
    @property
    def low(self) -> int: ...
    @property
    def tile(self) -> int: ...
    @property
    def books(self) -> int: ...
    @property
    def scaled(self) -> bool: ...
    @property
    def params(self) -> tuple[Param, ...]: ...
    @property
    def about(self) -> str: ...

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest unit per group, ``[G, 1]`` (or ``[1, 1]``), under these parameters."""
        ...

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The definition: units ``[G, M]``, float32, of codes ``[G, n]``."""
        ...

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The projection that every assignment uses: codes ``[G, n]`` of the values nearest to units ``[G, M]``."""
        ...
