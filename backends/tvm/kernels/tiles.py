"""Tiles of AMX: registers of 16 rows of 64 bytes, and one instruction that multiplies two of them."""

from __future__ import annotations

from typing import Any

from qc.backends.tvm.kernels.vectors import Vectors

__all__ = ["SIDE", "Tiles"]

SIDE = 16
"""Rows of a tile."""

_SHAPES = (1, 0, 0, 0, *[0x00400040] * 4, 0, 0, 0, 0, 0x10101010, 0x10101010, 0, 0)
"""The configuration, as words: palette 1, and eight tiles of 16 rows of 64 bytes."""


class Tiles:
    """The eight tiles of a thread, set up where a kernel begins if `allowed` is 1, not 0."""

    def __init__(self, v: Vectors, allowed: Any) -> None:
        self.v, self.allowed = v, allowed
        T = v.T
        shapes = T.alloc_buffer((len(_SHAPES),), "int32", scope="global")
        with T.If(allowed == 1), T.Then():
            for i, word in enumerate(_SHAPES):
                T.buffer_store(shapes, T.int32(word), [i])
            self._call("ldtilecfg", T.address_of(shapes[0]))

    def zero(self, tile: int) -> int:
        """Sets a tile to zeros and returns its number."""
        self._call("tilezero", self.v.T.int8(tile))
        return tile

    def load(self, tile: int, buffer: Any, start: Any, stride: Any) -> int:
        """Loads 16 rows, `stride` bytes apart, and returns the number of the tile."""
        T = self.v.T
        self._call("tileloadd64", T.int8(tile), T.address_of(buffer[start]), T.cast(stride, "int64"))
        return tile

    def dot(self, total: int, a: int, b: int) -> None:
        """``total[m, n] += sum a[m, 4 k + i] b[k, 4 n + i]``: signed bytes times unsigned ones."""
        self._call("tdpbsud", *map(self.v.T.int8, (total, a, b)))

    def store(self, tile: int, buffer: Any, start: Any, stride: Any) -> None:
        """Stores 16 rows, `stride` bytes apart."""
        T = self.v.T
        self._call("tilestored64", T.int8(tile), T.address_of(buffer[start]), T.cast(stride, "int64"))

    def release(self) -> None:
        """Gives the tiles back: a thread that holds them is slow to switch."""
        T = self.v.T
        with T.If(self.allowed == 1), T.Then():
            self._call("tilerelease")

    def _call(self, name: str, *arguments: Any) -> None:
        T = self.v.T
        T.evaluate(T.call_llvm_intrin(T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"), *arguments, dtype="void"))
