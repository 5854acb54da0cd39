"""Caches of keys and values on a GPU: the bytes of `qc.backends.tvm.kernels.caches`, four in a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qc.backends.tvm.gpu.threads import Threads
from qc.backends.tvm.kernels.caches import LARGEST_HALF, Cells

__all__ = ["Rows", "append"]

_WORD = 32


class Rows:
    """Rows of a cache in a kernel. Where they are codes, a word holds some channels, or some of each half of a row.

    Attributes:
        words: Those that hold channels; behind them lie the step and the lowest number, if there are any.
    """

    def __init__(self, k: Threads, cells: Cells, name: str, width: int) -> None:
        self._k, self._cells, self._name, self._width = k, cells, name, width
        self.words = width * cells.bits // _WORD
        self._field = max(cells.bits, 8)  # bits from one channel to the next
        self._half = width * cells.bits // self._field  # channels until those in the upper halves of bytes

    def each(self, start: Any, put: Callable[[Any, Any], None]) -> None:
        """Calls `put` with the number of each channel of the row at `start`, and its value."""
        T = self._k.T
        if not self._cells.narrow:
            with T.serial(0, self._width) as c:
                put(c, self._k.get(self._name, start + c))
            return
        ends = self._range(start)
        with T.serial(0, self.words) as w:
            word = self._k.get(self._name, start + w)
            for channel, shift in self.places(w):
                put(channel, self._value(word, T.uint32(shift), ends))

    def channel(self, start: Any, c: Any) -> Any:
        """One channel of the row at `start`."""
        T = self._k.T
        if not self._cells.narrow:
            return self._k.get(self._name, start + c)
        upper = T.truncdiv(c, self._half)
        place = T.bind(c - upper * self._half)
        per = _WORD // self._field
        shift = T.cast(T.truncmod(place, per) * self._field + upper * self._cells.bits, "uint32")
        return self._value(self._k.get(self._name, start + T.truncdiv(place, per)), shift, self._range(start))

    def places(self, word: Any) -> list[tuple[Any, int]]:
        """The channels in a word, each with its lowest bit."""
        per = _WORD // self._field
        return [
            (upper * self._half + word * per + i, i * self._field + upper * self._cells.bits)
            for upper in range(self._width // self._half)
            for i in range(per)
        ]

    def _range(self, start: Any) -> tuple[Any, ...]:
        if not self._cells.levels:
            return ()
        return tuple(self._k.T.reinterpret("float32", self._k.get(self._name, start + self.words + i)) for i in (0, 1))

    def _value(self, word: Any, shift: Any, ends: tuple[Any, ...]) -> Any:
        T = self._k.T
        code = T.bind((word >> shift) & T.uint32((1 << self._cells.bits) - 1))
        if not ends:
            return _from_half(self._k, code)
        step, low = ends
        return T.bind(T.cast(code, "float32") * step + low)


def append(name: str, width: int, cells: Cells) -> Any:
    """Stores heads in a cache at their positions, as `Cells.encode` does; a block for each head of each place.

    The position of place i of text b is ``positions[b * pb + i]``.
    """
    pointers = {"x": "float32", "y": "uint32", "positions": "int32", "status": "int32"}
    integers = ("heads", "s", "pb", "xb", "xh", "xs", "yb", "yh", "ys", "rows", "units")
    with Threads(name, pointers, integers) as k:
        T, s, rows = k.T, k.sizes, Rows(k, cells, "y", width)
        with k.blocks(s["units"], s["heads"]) as (unit, head, thread):
            batch, place = k.split(unit, [s["units"], s["s"]])
            position = k.checked(k.get("positions", batch * s["pb"] + place), s["rows"])
            x = T.bind(batch * s["xb"] + head * s["xh"] + place * s["xs"])
            y = T.bind(batch * s["yb"] + head * s["yh"] + position * s["ys"])
            code = (_codes if cells.levels else _halves)(k, cells, width, thread, x, y + rows.words)
            word = k.own(1, "uint32")
            with k.strided(thread, T.int32(rows.words)) as w:
                k.set(word, 0, T.uint32(0))
                for channel, shift in rows.places(w):
                    k.set(word, 0, word[0] | code(channel) << T.uint32(shift))
                k.put("y", y + w, word[0])
    return k.function()


def _halves(k: Threads, _cells: Cells, _width: int, _thread: Any, x: Any, _behind: Any) -> Callable[[Any], Any]:
    return lambda c: _to_half(k, k.get("x", x + c))


def _codes(k: Threads, cells: Cells, width: int, thread: Any, x: Any, behind: Any) -> Callable[[Any], Any]:
    """Finds the range of a row, and writes it behind the words of its codes."""
    T, ends = k.T, k.own(2)
    for i in (0, 1):
        k.set(ends, i, k.get("x", x))
    with k.strided(thread, T.int32(width)) as c:
        value = k.get("x", x + c)
        k.set(ends, 0, T.min(ends[0], value))
        k.set(ends, 1, T.max(ends[1], value))
    low, high = (k.fold(thread, ends[i], combine) for i, combine in enumerate((T.min, T.max)))
    top, span = T.float32(cells.levels), T.bind(high - low)
    inverse = T.bind(T.Select(span > T.float32(0), top / span, T.float32(0)))
    with T.If(thread == 0), T.Then():
        for i, value in enumerate((T.bind(span / top), low)):
            k.put("y", behind + i, T.reinterpret("uint32", value))

    def code(c: Any) -> Any:
        scaled = T.bind((k.get("x", x + c) - low) * inverse)
        return T.cast(T.bind(T.min(T.max(scaled, T.float32(0)), top) + T.float32(0.5)), "uint32")

    return code


def _to_half(k: Threads, x: Any) -> Any:
    """The bits of the nearest number of 16 bits, even where two are: not every language has the type.

    Numbers below 2^-14 are multiples of 2^-24, which the sum with 0.5 rounds to.
    """
    T = k.T
    whole = T.bind(T.reinterpret("uint32", T.bind(T.max(T.min(x, T.float32(LARGEST_HALF)), T.float32(-LARGEST_HALF)))))
    size = T.bind(whole & T.uint32(0x7FFFFFFF))
    normal = ((size + T.uint32(0xFFF) + ((size >> T.uint32(13)) & T.uint32(1))) >> T.uint32(13)) - T.uint32(112 << 10)
    above = T.bind(T.reinterpret("float32", size) + T.float32(0.5))
    small = T.reinterpret("uint32", above) - T.uint32(0x3F000000)
    sign = (whole >> T.uint32(16)) & T.uint32(0x8000)
    return T.bind(T.Select(size < T.uint32(0x38800000), small, normal) | sign)


def _from_half(k: Threads, bits: Any) -> Any:
    """What the bits of a number of 16 bits stand for."""
    T = k.T
    size = T.bind(bits & T.uint32(0x7FFF))
    normal = T.reinterpret("float32", T.bind((size << T.uint32(13)) + T.uint32(112 << 23)))
    value = T.bind(T.Select(size < T.uint32(0x400), T.cast(size, "float32") * T.float32(2.0**-24), normal))
    return T.bind(T.Select(bits < T.uint32(0x8000), value, -value))
