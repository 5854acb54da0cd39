"""How quantized weights lie: records of codes, scales and zero points.

A record holds, of ``lanes`` rows (output channels) and a few groups of columns, codes, then scales, then zero points.
Four columns of every row make one vector of bytes; a vector holds ``8 / bits`` such slots, slot s at bit ``bits * s``.
Three-bit codes lie as two planes, of two bits and of one.

Codes may be looked up in a table of 16 bytes, of 16 integers of 16 bits, or, in the exact form, of 16 floats. A fixed
one is part of the kernel; those that each row, or each group, has of its own lie before the records of their rows, or
behind the scales of their group. The lowest bytes of all entries come first: processors look bytes up, 16 codes in a
table. So, where entries have several bytes, slot ``4 c + t`` holds columns ``16 c`` to ``16 c + 15`` of rows t,
``t + 4``, ...
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.vectors import Vectors

__all__ = ["UNROLLED", "Codes", "Slots"]

UNROLLED = 32
"""Columns of a tile that are code, in the form on floats; more run in a loop: compilers take long over long code."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """How a weight lies in its records.

    Attributes:
        bits: 2, 3, 4 or 8.
        block: Columns whose activations share a scale; a multiple of 16.
        blocks: Blocks in a group: columns of a group are ``block * blocks``.
        half: Whether scales are stored in half precision.
        zeros: Whether each group has a zero point; else it is `zero`.
        zero: The code that stands for 0 where groups have no zero points of their own.
        per_record: Groups in a record.
        entry: Bytes of an entry of the tables of codes: 1, 2 of an integer, 4 of a float; 0: there are none.
        table: The bytes of a fixed one, which is part of the kernel; None: there is none, or rows have their own.
        by_group: Whether each group of a row has a table of its own.
    """

    bits: int
    block: int
    blocks: int
    half: bool
    zeros: bool
    zero: int
    per_record: int = 1
    entry: int = 0
    table: tuple[int, ...] | None = None
    by_group: bool = False

    def signed(self, isa: Isa) -> bool:
        """Whether a code, or what it stands for, is a signed byte."""
        return isa.signed and (self.bits == 8 or self.entry == 1)

    def code_bytes(self, lanes: int) -> int:
        """Bytes of the codes of one block of `lanes` rows."""
        return lanes * self.block * self.bits // 8

    def scale_bytes(self, lanes: int) -> int:
        """Bytes of the scales of one group."""
        return lanes * (2 if self.half else 4)

    def table_bytes(self, lanes: int) -> int:
        """Bytes of the tables that `lanes` rows have of their own."""
        return 16 * self.entry * lanes if self.table is None else 0

    def head_bytes(self, lanes: int) -> int:
        """Bytes before the records of `lanes` rows."""
        return 0 if self.by_group else self.table_bytes(lanes)

    def table_at(self, lanes: int) -> int:
        """Where the tables of a group begin in its record, which holds no other group."""
        return self.group_bytes(lanes) - self.table_bytes(lanes)

    def group_bytes(self, lanes: int) -> int:
        """Bytes of a group in a record with several."""
        codes = self.blocks * self.code_bytes(lanes) + self.scale_bytes(lanes) + (lanes if self.zeros else 0)
        return codes + (self.table_bytes(lanes) if self.by_group else 0)

    def record_bytes(self, lanes: int) -> int:
        """Bytes of a record, padded to whole vectors."""
        unit = 4 * lanes
        return -(-self.per_record * self.group_bytes(lanes) // unit) * unit

    def unit_bytes(self, lanes: int, groups: Any) -> Any:
        """Bytes of `lanes` rows of so many groups."""
        return self.head_bytes(lanes) + (groups + self.per_record - 1) // self.per_record * self.record_bytes(lanes)


class Slots:
    """The bytes of four columns at a time, of one block of one vector of rows, or of a part of it."""

    def __init__(self, v: Vectors, codes: Codes, w: Any, start: Any, part: Any = 0) -> None:
        self.v, self.codes, self.w = v, codes, w
        self._wide = wide = 4 * v.L
        bits = 2 if codes.bits == 3 else codes.bits
        self._planes = (start + part * (bits * wide), start + (codes.block // 16 + part) * wide)
        """Where codes begin, and, where they lie in two planes, their top bits; in parts of `UNROLLED` columns."""

    def slot(self, slot: Any) -> Any:
        """The bytes of four columns of every row."""
        codes = self._codes(slot)
        return self.v.look_up(self.v.constants(self.codes.table), codes) if self.codes.entry == 1 else codes

    def _codes(self, slot: Any) -> Any:
        c, T = self.codes, self.v.T
        if c.bits == 8:
            return self._vector(slot)
        if c.bits == 3:
            low = self._field(self._vector(slot // 4), 2 * (slot % 4), 3)
            top = self._field(self._vector(slot // 8, 1), slot % 8, 1)
            shifted = T.reinterpret(f"uint16x{self._wide // 2}", top) << T.broadcast(T.uint16(2), self._wide // 2)
            return T.bind(low | T.reinterpret(f"uint8x{self._wide}", shifted))
        per = 8 // c.bits
        return self._field(self._vector(slot // per), c.bits * (slot % per), (1 << c.bits) - 1)

    def _vector(self, index: Any, plane: int = 0) -> Any:
        return self.v.load(self.w, self._planes[plane] + index * self._wide, self._wide)

    def _field(self, vector: Any, shift: Any, mask: int) -> Any:
        T, wide = self.v.T, self._wide
        by = T.broadcast(T.cast(shift, "uint16"), wide // 2)
        vector = T.reinterpret(f"uint8x{wide}", T.reinterpret(f"uint16x{wide // 2}", vector) >> by)
        return T.bind(vector & T.broadcast(T.uint8(mask), wide))
