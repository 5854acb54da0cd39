"""Tiles of AMX: registers of up to 16 rows of 64 bytes, and instructions that multiply two of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from qc.backends.tvm.kernels.vectors import Vectors

__all__ = ["SIDE", "Tiles", "configuration"]

SIDE = 16
"""Rows of a whole tile."""

_COUNT = 8


class Tiles:
    """The tiles of a thread, set up where a kernel begins if `allowed` is 1, not 0: rows and their bytes, by number.

    What they were before they are again where it ends: others (llama.cpp) set theirs up once, and rely on it.
    """

    def __init__(self, v: Vectors, allowed: Any, shapes: Mapping[int, tuple[int, int]] | None = None) -> None:
        self.v, self.allowed = v, allowed
        T = v.T
        shapes = shapes or dict.fromkeys(range(_COUNT), (SIDE, 64))
        words, self._before = (T.alloc_buffer((16,), "int32", scope="global") for _ in range(2))
        with T.If(allowed == 1), T.Then():
            self._call("sttilecfg", T.address_of(self._before[0]))
            for i, word in enumerate(struct.unpack("<16i", configuration(shapes))):
                T.buffer_store(words, T.int32(word), [i])
            self._call("ldtilecfg", T.address_of(words[0]))

    def zero(self, tile: int) -> int:
        """Sets a tile to zeros and returns its number."""
        self._call("tilezero", self.v.T.int8(tile))
        return tile

    def load(self, tile: int, buffer: Any, start: Any, stride: Any) -> int:
        """Loads its rows, `stride` bytes apart, and returns the number of the tile."""
        T = self.v.T
        self._call("tileloadd64", T.int8(tile), T.address_of(buffer[start]), T.cast(stride, "int64"))
        return tile

    def dot(self, total: int, a: int, b: int) -> None:
        """``total[m, n] += sum a[m, 4 k + i] b[k, 4 n + i]``: signed bytes times unsigned ones."""
        self._call("tdpbsud", *map(self.v.T.int8, (total, a, b)))

    def dot_signed(self, total: int, a: int, b: int) -> None:
        """The same, with signed bytes on both sides."""
        self._call("tdpbssd", *map(self.v.T.int8, (total, a, b)))

    def store(self, tile: int, buffer: Any, start: Any, stride: Any) -> None:
        """Stores its rows, `stride` bytes apart."""
        T = self.v.T
        self._call("tilestored64", T.int8(tile), T.address_of(buffer[start]), T.cast(stride, "int64"))

    def release(self) -> None:
        """Gives the tiles back: a thread that holds some is slow to switch."""
        T = self.v.T
        with T.If(self.allowed == 1), T.Then():
            self._call("ldtilecfg", T.address_of(self._before[0]))

    def _call(self, name: str, *arguments: Any) -> None:
        T = self.v.T
        T.evaluate(T.call_llvm_intrin(T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), *arguments, dtype="void"))


def configuration(shapes: Mapping[int, tuple[int, int]]) -> bytes:
    """What ``ldtilecfg`` reads: palette 1, the bytes of a row of each tile, and its rows."""
    rows, widths = ([shapes.get(tile, (0, 0))[part] for tile in range(_COUNT)] for part in range(2))
    return struct.pack("<B15x8H16x8B8x", 1, *widths, *rows)
