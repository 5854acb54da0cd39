"""The tiles of products with codes that are looked up in tables of integers of 16 bits, or of floats."""

from __future__ import annotations

import itertools
from typing import Any

from qc.backends.tvm.kernels.code_products import Product
from qc.backends.tvm.kernels.records import UNROLLED, Slots

__all__ = ["ExactTableProduct", "TableProduct"]


class TableProduct(Product):
    """Tiles of one unit, with codes that are looked up in a table, or in tables of their rows."""

    @property
    def tile(self) -> tuple[int, int]:
        """Many rows, since what is looked up costs more than a product."""
        rows, columns = self.v.isa.int_tile
        return min(rows * columns, 8), 1

    def _block(
        self, block: int, starts: list[Any], tables: list[Any], at: Any, row: Any, rows: int, columns: int,
        zeros: list[Any],
    ) -> dict[tuple[int, int], Any]:  # fmt: skip
        v, T, c, b = self.v, self.v.T, self.codes, self.kernel.buffers
        tile = [(i, r) for i in range(rows) for r in range(columns)]
        place = T.bind(at * self.kernel.sizes["m"] + row)
        x = {}
        for i, part in itertools.product(range(rows), range(c.block // 8)):
            eight = v.load(b["q"], (place + i) * c.block + 8 * part, 8)
            x[i, part] = v.keep(v.repeat(T.cast(eight, "int16x8"), 8), f"int16x{2 * v.L}")
        readers = [Slots(v, c, b["w"], start) for start in starts]
        turned = {place: self.kernel.registers(4 * v.L, "int32") for place in tile}
        with (T.unroll if rows == 1 else T.serial)(0, 4) as turn:  # all at once would not fit the registers
            sums = dict.fromkeys(tile, T.broadcast(T.int32(0), v.L))
            for part in range(c.block // 16):
                pairs = [self._words(t, s.slot(4 * part + turn), turn) for t, s in zip(tables, readers, strict=True)]
                for (i, r), half in itertools.product(tile, range(2)):
                    sums[i, r] = v.dot_words(sums[i, r], pairs[r][0][half], x[i, 2 * part + half])
            for place in tile:
                v.store(turned[place], turn * v.L, sums[place])
        return {place: v.add_turned(turned[place]) for place in tile}

    def _words(self, table: Any, codes: Any, turn: Any) -> list[tuple[Any, Any]]:
        """The entries that codes of rows ``turn``, ``turn + 4``, ... stand for, by two bytes of an entry.

        Of each 16 codes, those of the lower 8 and those of the upper 8.
        """
        v, wide, entry, fixed = self.v, 4 * self.v.L, self.codes.entry, self.codes.table
        planes = [
            v.load(self.kernel.buffers["w"], table + (turn * entry + plane) * wide, wide)
            if fixed is None
            else v.constants(fixed[16 * plane : 16 * plane + 16])
            for plane in range(entry)
        ]
        found = [v.look_up(plane, codes) for plane in planes]
        return [v.interleave(*found[p : p + 2], f"int16x{2 * v.L}") for p in range(0, entry, 2)]


class ExactTableProduct(TableProduct):
    """The same tiles, with codes that are looked up in tables of floats."""

    def _group(
        self, starts: list[Any], tables: list[Any], within: Any, group: Any, row: Any, rows: int, columns: int,
        total: Any,
    ) -> None:  # fmt: skip
        v, T, c, L, b = self.v, self.v.T, self.codes, self.v.L, self.kernel.buffers
        tile = [(i, r) for i in range(rows) for r in range(columns)]
        turned = {place: self.kernel.registers(4 * L) for place in tile}
        unit = min(c.block, UNROLLED)
        with T.serial(0, 4) as turn:
            sums = self.kernel.registers(rows * columns * L)
            places = {(i, r): (i * columns + r) * L for i, r in tile}
            for place in places.values():
                v.store(sums, place, v.spread(0.0))
            with T.serial(0, c.blocks) as block, T.serial(0, c.block // unit) as part:
                first = T.bind((group * c.blocks + block) * c.block + part * unit)
                skipped = T.bind((within * c.blocks + block) * c.code_bytes(L))
                readers = [Slots(v, c, b["w"], s + skipped, part) for s in starts]
                for at in range(0, unit, 16):
                    codes = [reader.slot(at // 4 + turn) for reader in readers]
                    found = [self._floats(t, four, turn) for t, four in zip(tables, codes, strict=True)]
                    for (i, r), k in itertools.product(tile, range(4)):
                        start = (row + i) * self.kernel.sizes["ldx"] + first + at + 4 * k
                        x = v.repeat(v.load(b["x"], start, 4), 4)
                        v.store(sums, places[i, r], v.fma(x, found[r][k], v.load(sums, places[i, r])))
            for place in tile:
                v.store(turned[place], turn * L, v.load(sums, places[place]))
        for i, r in tile:
            to, scale = (i * columns + r) * L, self._scale(starts[r], within)
            v.store(total, to, v.fma(v.add_turned(turned[i, r]), scale, v.load(total, to)))

    def _floats(self, table: Any, codes: Any, turn: Any) -> list[Any]:
        """The floats of the codes of four columns each, of one row in every 16 bytes."""
        low, high = self._words(table, codes, turn)
        sides = [self.v.interleave(a, b, self.v.f32()) for a, b in zip(low, high, strict=True)]
        return [word for side in sides for word in side]
