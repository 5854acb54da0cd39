"""How a library keeps keys and values: a head at a position is a row of floats, or of codes with a range of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.vectors import Kernel, Vectors
from qc.ir.errors import InputError

__all__ = ["CELLS", "LARGEST_HALF", "Cells", "Rows", "append", "cells"]

LARGEST_HALF = 65504.0
"""The largest number of 16 bits; larger ones are stored as it."""


@dataclasses.dataclass(frozen=True)
class Cells:
    """What the channels of a row are stored in.

    Codes stand for ``low + step * code``, with the step and the lowest number, both float32, behind them. Of two codes
    in a byte, the lower half holds a channel of the first half of the row, the upper one that of the second half.

    Attributes:
        name: As in ``--target tvm-cpu:kv=uint8``.
        bits: Of a channel.
    """

    name: str = "float32"
    bits: int = 32

    @property
    def narrow(self) -> bool:
        """Whether rows are bytes; else they are floats."""
        return self.bits < 32

    @property
    def levels(self) -> int:
        """The largest code; 0 if channels are floats."""
        return (1 << self.bits) - 1 if self.bits < 16 else 0

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` channels."""
        return -(-width * self.bits // 8) + (8 if self.levels else 0)

    def fits(self, width: int, lanes: int) -> bool:
        """Whether whole vectors of channels can be read."""
        return width % (2 * lanes if self.bits == 4 else lanes) == 0

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Rows ``[..., channels]`` as they are stored: uint8 ``[..., row_bytes]``."""
        x = np.ascontiguousarray(x, np.float32)
        if not self.narrow:
            return x.view(np.uint8)
        if not self.levels:
            return np.clip(x, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).view(np.uint8)
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        top, span = np.float32(self.levels), high - low
        inverse = np.divide(top, span, out=np.zeros_like(span), where=span > 0)
        codes = (np.clip((x - low) * inverse, 0, top) + np.float32(0.5)).astype(np.uint8)
        if self.bits == 4:
            half = x.shape[-1] // 2
            codes = codes[..., :half] | codes[..., half:] << 4
        return np.concatenate([codes, (span / top).view(np.uint8), low.view(np.uint8)], -1)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """What `encode` was given, as far as it was kept."""
        rows = np.ascontiguousarray(rows)
        if not self.levels:
            return rows.view(np.float16 if self.narrow else np.float32).astype(np.float32)
        step, low = (np.ascontiguousarray(rows[..., i : i + 4 or None]).view(np.float32) for i in (-8, -4))
        codes = rows[..., :-8]
        if self.bits == 4:
            codes = np.concatenate([codes & 15, codes >> 4], -1)
        return low + step * codes.astype(np.float32)


CELLS = {c.name: c for c in (Cells(), Cells("float16", 16), Cells("uint8", 8), Cells("uint4", 4))}
"""Every format by name."""


def cells(name: str) -> Cells:
    """Returns a format by name.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in CELLS:
        raise InputError(f"Expected a cache of {', '.join(CELLS)}, found {name!r}.")
    return CELLS[name]


class Rows:
    """Reads rows of a cache in a kernel, as floats."""

    def __init__(self, v: Vectors, held: Cells, buffer: Any, width: int) -> None:
        self._v, self._cells, self._buffer, self._width = v, held, buffer, width

    def vectors(self, start: Any, first: int, count: int) -> list[Any]:
        """Vectors `first` and following of the row at `start`, see `Cells.fits`."""
        v, T, L = self._v, self._v.T, self._v.L
        if not self._cells.narrow:
            return [v.load(self._buffer, start + i * L) for i in range(first, first + count)]
        if not self._cells.levels:
            found = [v.load(self._buffer, start + 2 * i * L, 2 * L) for i in range(first, first + count)]
            return [T.bind(T.cast(T.reinterpret(f"float16x{L}", x), v.f32())) for x in found]
        step, low = (v.spread(x) for x in self._range(start))
        codes = [self._codes(start, i * L) for i in range(first, first + count)]
        return [v.fma(T.bind(T.cast(c, v.f32())), step, low) for c in codes]

    def each(self, start: Any, put: Callable[[Any, Any], None]) -> None:
        """Calls `put` with the number of each channel of the row at `start`, and its value."""
        T, buffer, width = self._v.T, self._buffer, self._width
        if not self._cells.narrow:
            with T.serial(0, width) as d:
                put(d, buffer[start + d])
            return
        if not self._cells.levels:
            with T.serial(0, width) as d:
                half = T.reinterpret("float16", self._v.load(buffer, start + 2 * d, 2))
                put(d, T.cast(half, "float32"))
            return
        step, low = self._range(start)
        parts = (0,) if self._cells.bits == 8 else (0, 1)
        with T.serial(0, width // len(parts)) as d:
            byte = T.bind(T.cast(buffer[start + d], "int32"))
            for part in parts:
                code = byte if len(parts) == 1 else byte >> T.int32(4) if part else byte & T.int32(15)
                put(d + part * (width // 2), T.cast(code, "float32") * step + low)

    def _range(self, start: Any) -> tuple[Any, Any]:
        v, end = self._v, self._cells.row_bytes(self._width)
        step, low = (v.T.bind(v.T.reinterpret("float32", v.load(self._buffer, start + end - i, 4))) for i in (8, 4))
        return step, low

    def _codes(self, start: Any, channel: int) -> Any:
        """Codes of a vector of channels, as integers."""
        v, T, half = self._v, self._v.T, self._width // 2
        if self._cells.bits == 8:
            return T.cast(v.load(self._buffer, start + channel), v.i32())
        upper = channel >= half
        pairs = T.bind(T.cast(v.load(self._buffer, start + channel - (half if upper else 0)), v.i32()))
        return pairs >> v.spread(T.int32(4)) if upper else pairs & v.spread(T.int32(15))


def append(isa: Isa, name: str, width: int, held: Cells) -> Any:
    """Stores heads in a cache at their positions. Units are (batch, place in the text); bit for bit `Cells.encode`."""
    v = Vectors(isa)
    T = v.T
    pointers = {"x": "float32", "y": "uint8", "positions": "int64"}
    with Kernel(name, v, pointers, ("heads", "s", "pb", "xb", "xh", "xs", "yb", "yh", "ys")) as kernel:
        size, b = kernel.sizes, kernel.buffers
        with kernel.units() as unit:
            batch, s = T.bind(unit // size["s"]), T.bind(unit % size["s"])
            position = T.bind(T.cast(b["positions"][batch * size["pb"] + s], "int32"))
            with T.serial(0, size["heads"]) as head:
                x = T.bind(batch * size["xb"] + head * size["xh"] + s * size["xs"])
                y = T.bind(batch * size["yb"] + head * size["yh"] + position * size["ys"])
                (_store_codes if held.levels else _store_halves)(kernel, held, width, x, y)
    return kernel.function()


def _store_halves(kernel: Kernel, _held: Cells, width: int, x: Any, y: Any) -> None:
    v, T, b = kernel.v, kernel.v.T, kernel.buffers
    with T.serial(0, width) as d:
        value = T.bind(T.max(T.min(b["x"][x + d], T.float32(LARGEST_HALF)), T.float32(-LARGEST_HALF)))
        v.store(b["y"], y + 2 * d, T.reinterpret("uint8x2", T.cast(value, "float16")), 2)


def _store_codes(kernel: Kernel, held: Cells, width: int, x: Any, y: Any) -> None:
    v, T, b = kernel.v, kernel.v.T, kernel.buffers
    ends = kernel.registers(2)
    T.buffer_store(ends, b["x"][x], [0])
    T.buffer_store(ends, b["x"][x], [1])
    with T.serial(1, width) as d:
        value = T.bind(b["x"][x + d])
        T.buffer_store(ends, T.min(ends[0], value), [0])
        T.buffer_store(ends, T.max(ends[1], value), [1])
    top, low = T.float32(held.levels), T.bind(ends[0])
    span = T.bind(ends[1] - low)
    inverse = T.bind(T.Select(span > T.float32(0), top / span, T.float32(0)))

    def code(d: Any) -> Any:
        scaled = T.bind((b["x"][x + d] - low) * inverse)
        clipped = T.bind(T.min(T.max(scaled, T.float32(0)), top))
        return T.bind(T.cast(clipped + T.float32(0.5), "int32"))

    half = width // 2
    with T.serial(0, half if held.bits == 4 else width) as d:
        packed = code(d) | code(d + half) << T.int32(4) if held.bits == 4 else code(d)
        T.buffer_store(b["y"], T.cast(packed, "uint8"), [y + d])
    end = y + held.row_bytes(width)
    v.store(b["y"], end - 8, T.reinterpret("uint8x4", T.bind(span / top)), 4)
    v.store(b["y"], end - 4, T.reinterpret("uint8x4", low), 4)
