"""Products with codes of integers in tiles of AMX, many rows at a time.

Codes less their zero points are signed bytes. Those of a group are unpacked once for all rows, onto the stack, from
where they become tiles; the integers of its blocks come back the same way. They are those of `Product`, which scales
and adds them, so the result has the same bits.
"""

from __future__ import annotations

import itertools
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.code_products import Product
from qc.backends.tvm.kernels.records import Codes, Slots
from qc.backends.tvm.kernels.tiles import SIDE, Tiles

__all__ = ["TiledProduct"]

_COLUMNS = 64
"""Columns of a tile at most."""

_SUMS, _X, _WEIGHTS = 4, (4, 5), (6, 7)
"""How many tiles hold sums, of a block and `SIDE` rows each; and which the others are, that take turns."""

_SIDES = 2
"""Tiles of rows that are multiplied together, where a group is one block; fewer of several, which are more code."""


class TiledProduct(Product):
    """See the module. What is left of the rows is multiplied as ever."""

    @staticmethod
    def takes(codes: Codes, isa: Isa) -> bool:
        """Whether a level has tiles, blocks of a group fit them, and codes less their zero points are signed bytes."""
        if not isa.tiles or codes.entry > 1 or codes.blocks > _SUMS:
            return False
        values = range(1 << codes.bits) if codes.table is None else codes.table
        zeros = (0, max(values)) if codes.zeros else (codes.zero, codes.zero)
        return max(values) - zeros[0] < 128 and min(values) - zeros[1] >= -128

    def _first_rows(self) -> Any:
        T, L, c, size = self.v.T, self.v.L, self.codes, self.kernel.sizes
        self._step, self._sides = min(c.block, _COLUMNS), range(max(_SIDES // c.blocks, 1))
        self._height = SIDE * len(self._sides)
        blocks = range(c.blocks)
        self._weights = [
            [self.kernel.stack(self._step * L, "uint8") for _ in range(c.block // self._step)] for _ in blocks
        ]
        self._integers = [[self.kernel.stack(SIDE * L, "int32") for _ in self._sides] for _ in blocks]
        shapes = dict.fromkeys(range(_SUMS), (SIDE, 4 * L)) | dict.fromkeys(_X, (SIDE, self._step))
        shapes |= dict.fromkeys(_WEIGHTS, (self._step // 4, 4 * L))
        self._tiles = Tiles(self.v, T.bind(T.if_then_else(size["m"] >= self._height, size["tiles"], 0)), shapes)
        count = T.bind(self._tiles.allowed * (size["m"] // self._height))
        with T.If(count > 0), T.Then():
            with self.kernel.units() as unit, T.serial(0, count) as i:
                self._rows(unit, T.bind(i * self._height))
            self._tiles.release()
        return T.bind(count * self._height)

    def _rows(self, unit: Any, row: Any) -> None:
        """Rows of the tiles times a unit.

        A processor waits until what was stored is in the cache before it loads it into a tile, and the other way round:
        so codes are unpacked a group ahead, and sums are added a group behind.
        """
        v, T, L, groups = self.v, self.v.T, self.v.L, self.kernel.sizes["groups"]
        total = self.kernel.registers(self._height * L)
        for i in range(self._height):
            v.store(total, i * L, v.spread(0.0))
        start = T.bind(unit * self.codes.unit_bytes(L, groups))
        self._unpack(start, T.int32(0))
        with T.serial(0, groups + 1) as group:
            with T.If(group < groups), T.Then():
                self._multiply(row, group)
                self._unpack(start, T.bind(T.min(group + 1, groups - 1)))
            with T.If(group > 0), T.Then():
                starts, within = self._records([start], T.bind(group - 1))
                self._group(starts, [], within, T.bind(group - 1), row, self._height, 1, total)
            with T.If(group < groups), T.Then():
                for block, sides in enumerate(self._integers):
                    for side, found in enumerate(sides):
                        self._tiles.store(self._sums(block, side), found, 0, 4 * L)
        self.epilogue.store(T.bind(unit * L), row, {(i, 0): v.load(total, i * L) for i in range(self._height)}, 1)

    def _unpack(self, unit: Any, group: Any) -> None:
        """Writes a group's codes less their zero points."""
        v, T, c, wide = self.v, self.v.T, self.codes, 4 * self.v.L
        (start,), within = self._records([unit], group)
        zeros = self._zeros([start], within)
        zero = self._four_times(zeros[0]) if zeros else T.broadcast(T.uint8(c.zero), wide)
        for block, parts in enumerate(self._weights):
            at = T.bind(start + (within * c.blocks + block) * c.code_bytes(v.L))
            reader, slots = Slots(v, c, self.kernel.buffers["w"], at), itertools.count()
            for weights in parts:
                for slot in range(self._step // 4):
                    v.store(weights, slot * wide, reader.slot(next(slots)) - zero, wide)

    def _multiply(self, row: Any, group: Any) -> None:
        """Sums of a group's blocks, into tiles."""
        T, c, tiles, m = self.v.T, self.codes, self._tiles, self.kernel.sizes["m"]
        for block, parts in enumerate(self._weights):
            for side in self._sides:
                tiles.zero(self._sums(block, side))
            for part, unpacked in enumerate(parts):
                weights = tiles.load(_WEIGHTS[part % 2], unpacked, 0, 4 * self.v.L)
                first = T.bind(((group * c.blocks + block) * m + row) * c.block + part * self._step)
                for side in self._sides:
                    at = T.bind(first + side * (SIDE * c.block))
                    x = tiles.load(_X[side % 2], self.kernel.buffers["q"], at, c.block)
                    tiles.dot_signed(self._sums(block, side), x, weights)

    def _block(
        self, block: int, starts: list[Any], tables: list[Any], at: Any, row: Any, rows: int, columns: int,
        zeros: list[Any],
    ) -> dict[tuple[int, int], Any]:  # fmt: skip
        if rows < self._height:
            return super()._block(block, starts, tables, at, row, rows, columns, zeros)
        found, L = self._integers[block], self.v.L
        return {(i, 0): self.v.load(found[i // SIDE], i % SIDE * L) for i in range(self._height)}

    def _four_times(self, zeros: Any) -> Any:
        """Zero points of a unit as bytes, each four times, as codes lie."""
        T, L = self.v.T, self.v.L
        return T.bind(T.reinterpret(f"uint8x{4 * L}", zeros * T.broadcast(T.int32(0x01010101), L)))

    def _sums(self, block: int, side: int) -> int:
        """The tile of the sums of a block and so many rows."""
        return block * len(self._sides) + side
