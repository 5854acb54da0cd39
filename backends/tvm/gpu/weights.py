"""Quantized weights for GPUs: codes in words of 32 bits along a row, scales and zero points in arrays of their own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from qc.ir.quant import Affine, Format, QuantizedTensor, Table

__all__ = ["Words", "why_decoded", "words_of"]

_BITS = (2, 4, 8)
_TABLE_BITS = 4
_WORD = 32


@dataclasses.dataclass(frozen=True)
class Words:
    """How a weight lies: ``value = (code - zero) * scale``, or ``table[code] * scale``.

    Attributes:
        bits: Of a code and of a zero point: 2, 4 or 8.
        group: Columns that share a scale; 0 for a whole row.
        zero: The code that stands for 0; None if each group has its own.
        table: What codes stand for; None for themselves.
    """

    bits: int
    group: int
    zero: int | None
    table: tuple[float, ...] | None = None

    @property
    def pointers(self) -> dict[str, str]:
        """The parameters of a kernel, with their types."""
        held = {"w": "uint32", "scale": "float32"}
        if self.zero is None:
            held["zeros"] = "uint32"
        return held

    def groups(self, columns: int) -> int:
        """Groups in a row."""
        return -(-columns // self.group) if self.group else 1

    def words(self, count: int) -> int:
        """Words that hold so many codes."""
        return -(-count * self.bits // _WORD)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters."""
        groups = self.groups(columns)
        held: dict[str, tuple[int, ...]] = {"w": (rows, self.words(columns)), "scale": (rows, groups)}
        if self.zero is None:
            held["zeros"] = (rows, self.words(groups))
        return held

    def value(self, get: Callable[..., Any], row: Any, column: Any) -> Any:
        """An element, of parameters that are read by name, row and column."""
        from tvm import tirx as x

        def code(name: str, at: Any) -> Any:
            per = _WORD // self.bits
            shift = x.Cast("uint32", (at % per) * self.bits)
            return (get(name, row, at // per) >> shift) & x.const((1 << self.bits) - 1, "uint32")

        group = column // self.group if self.group else x.const(0, "int32")
        held = code("w", column)
        if self.table is not None:
            number = _chosen(self.table, held)
        else:
            zero = code("zeros", group) if self.zero is None else x.const(self.zero, "uint32")
            number = x.Cast("float32", held) - x.Cast("float32", zero)
        return number * get("scale", row, group)

    def flat(self, get: Callable[[str, Any], Any], rows: int, columns: int) -> Callable[[Any, Any], Any]:
        """What reads an element by row and column, of parameters that are read by name and place."""
        shapes = self.shapes(rows, columns)
        return functools.partial(self.value, lambda name, row, column: get(name, row * shapes[name][1] + column))

    def pack(self, tensor: QuantizedTensor, name: str) -> np.ndarray:
        """One parameter of a weight."""
        values, (rows, columns) = tensor.format.values, tensor.codes.shape
        if name == "w":
            low = values.low if isinstance(values, Affine) and values.symmetric else 0
            return self._packed((tensor.codes.astype(np.int16) - low).astype(np.uint8))
        shape = (rows, self.groups(columns))
        if name == "scale":
            return np.array(np.broadcast_to(tensor.format.scale.decode(tensor.params), shape), np.float32)
        return self._packed(np.broadcast_to(tensor.params["zero_point"], shape).astype(np.uint8))

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        rows, count = codes.shape
        per = _WORD // self.bits
        padded = np.zeros((rows, self.words(count) * per), np.uint32)
        padded[:, :count] = codes
        shifts = (self.bits * np.arange(per)).astype(np.uint32)
        return np.bitwise_or.reduce(padded.reshape(rows, -1, per) << shifts, axis=2)


def _chosen(table: tuple[float, ...], code: Any) -> Any:
    """The entry of a table, by one choice for each bit of the code: an index would keep dlight from a schedule."""
    from tvm import tirx as x

    if len(table) == 1:
        return x.const(table[0], "float32")
    half = len(table) // 2
    upper = x.NE(code & x.const(half, "uint32"), x.const(0, "uint32"))
    return x.Select(upper, _chosen(table[half:], code), _chosen(table[:half], code))


def words_of(format: Format) -> Words:
    """How weights of a format lie; `why_decoded` has said that they can."""
    values = format.values
    bits = next(b for b in _BITS if b >= values.bits)
    if isinstance(values, Affine):
        return Words(bits, format.group or 0, -values.low if values.symmetric else None)
    assert isinstance(values, Table)
    table = tuple(float(v) for v in np.resize(values.values, 1 << bits))
    return Words(bits, format.group or 0, 0, table)


def why_decoded(format: Format) -> str:
    """Why weights of a format become floats; empty if a kernel decodes them as it multiplies."""
    values = format.values
    if isinstance(values, Affine) and not values.half and not values.floating:
        pass
    elif not isinstance(values, Table) or values.bits > _TABLE_BITS:
        return f"its codes are neither integers nor indices of one table of {1 << _TABLE_BITS}"
    if values.bits > _BITS[-1]:
        return f"its codes have more than {_BITS[-1]} bits"
    if format.axis == "out" or format.remainder is not None:
        return "its groups do not lie along a row, or it has a remainder"
    return ""
