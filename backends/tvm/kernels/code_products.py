"""The tiles of products with codes of integers."""

from __future__ import annotations

from typing import Any

from qc.backends.tvm.kernels.epilogue import Epilogue
from qc.backends.tvm.kernels.records import UNROLLED, Codes, Slots
from qc.backends.tvm.kernels.vectors import Kernel, Vectors

__all__ = ["ExactProduct", "Product"]

_SAFE = 128
"""Largest byte of a weight whose products, in pairs, fit the 16 bits of ``maddubs``."""


class Product:
    """Tiles of integers: codes, or bytes that they stand for, times quantized activations."""

    def __init__(self, v: Vectors, kernel: Kernel, codes: Codes, bias: bool, residual: bool, activation: str) -> None:
        self.v, self.kernel, self.codes = v, kernel, codes
        self.epilogue = Epilogue(kernel, bias, residual, activation)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows of x and units of the weight that are multiplied at a time."""
        return self.v.isa.int_tile

    def emit(self) -> None:
        v, T = self.v, self.v.T
        rows, columns = self.tile
        m, begin, end = self.kernel.sizes["m"], self.kernel.begin, self.kernel.end
        # Tiles of several rows for prefill, on pairs of units; single rows for decoding and what is left.
        first = self._first_rows()
        whole, pairs = T.bind((m - first) // rows), T.bind((end - begin) // columns)
        with T.serial(0, pairs) as p:
            unit = T.bind(begin + p * columns)
            with T.serial(0, whole) as i:
                self._tile(unit, first + i * rows, rows, columns)
            with T.serial(0, columns) as r, T.serial(first + whole * rows, m) as i:
                self._tile(unit + r, i, 1, 1)
            self.epilogue.finish(T.bind(unit * v.L), columns * v.L)
        with T.serial(begin + pairs * columns, end) as unit:
            with T.serial(first, m) as i:
                self._tile(unit, i, 1, 1)
            self.epilogue.finish(T.bind(unit * v.L), v.L)

    def _first_rows(self) -> Any:
        """Multiplies the first rows in another way, if a kind of product has one, and returns how many they are."""
        return 0

    def _tile(self, unit: Any, row: Any, rows: int, columns: int) -> None:
        v, T, c, L = self.v, self.v.T, self.codes, self.v.L
        groups = self.kernel.sizes["groups"]
        total = self.kernel.registers(rows * columns * L)
        for i in range(rows * columns):
            v.store(total, i * L, v.spread(0.0))
        units = [T.bind((unit + r) * c.unit_bytes(L, groups)) for r in range(columns)]
        with T.serial(0, groups) as group:
            starts, within = self._records(units, group)
            if rows == 1:
                share = c.record_bytes(L) // c.per_record
                v.stream(self.kernel.buffers["w"], T.bind(starts[0] + within * share), share)
            tables = [T.bind(s + c.table_at(L)) for s in starts] if c.by_group else units
            self._group(starts, tables, within, group, row, rows, columns, total)
        totals = {(i, r): v.load(total, (i * columns + r) * L) for i in range(rows) for r in range(columns)}
        self.epilogue.store(T.bind(unit * L), row, totals, columns)

    def _records(self, units: list[Any], group: Any) -> tuple[list[Any], Any]:
        """Where the records of a group begin, and its number in them."""
        T, c, L = self.v.T, self.codes, self.v.L
        per = c.per_record
        record, within = (group, T.int32(0)) if per == 1 else (T.bind(group // per), T.bind(group % per))
        return [T.bind(u + c.head_bytes(L) + record * c.record_bytes(L)) for u in units], within

    def _zeros(self, starts: list[Any], within: Any) -> list[Any]:
        """The zero points of a group as integers; none, if all are the same."""
        v, T, c, L = self.v, self.v.T, self.codes, self.v.L
        if not c.zeros:
            return []
        zero_at = c.per_record * (c.blocks * c.code_bytes(L) + c.scale_bytes(L))
        loaded = [v.load(self.kernel.buffers["w"], s + zero_at + within * L, L) for s in starts]
        if c.bits == 8 and v.isa.signed:
            loaded = [T.reinterpret(f"int8x{L}", z) for z in loaded]
        return [T.bind(T.cast(z, v.i32())) for z in loaded]

    def _group(
        self, starts: list[Any], tables: list[Any], within: Any, group: Any, row: Any, rows: int, columns: int,
        total: Any,
    ) -> None:  # fmt: skip
        v, T, c, L, b = self.v, self.v.T, self.codes, self.v.L, self.kernel.buffers
        m, zeros = self.kernel.sizes["m"], self._zeros(starts, within)
        sums: dict[tuple[int, int], Any] = {}
        for block in range(c.blocks):
            at = T.bind(group * c.blocks + block) if c.blocks > 1 else group
            codes = [s + (within * c.blocks + block) * c.code_bytes(L) for s in starts]
            for (i, r), integer in self._block(block, codes, tables, at, row, rows, columns, zeros).items():
                sx = v.spread(b["s"][at * m + row + i])
                exact = T.cast(integer, v.f32())
                sums[i, r] = T.bind(exact * sx) if block == 0 else v.fma(exact, sx, sums[i, r])
        for r in range(columns):
            scale = self._scale(starts[r], within)
            for i in range(rows):
                place = (i * columns + r) * L
                v.store(total, place, v.fma(sums[i, r], scale, v.load(total, place)))

    def _scale(self, record: Any, within: Any) -> Any:
        v, T, c, w = self.v, self.v.T, self.codes, self.kernel.buffers["w"]
        start = record + c.per_record * c.blocks * c.code_bytes(v.L) + within * c.scale_bytes(v.L)
        if self.codes.half:
            return T.bind(T.cast(T.reinterpret(f"float16x{v.L}", v.load(w, start, 2 * v.L)), v.f32()))
        return T.bind(T.reinterpret(v.f32(), v.load(w, start, 4 * v.L)))

    def _block(
        self, block: int, starts: list[Any], tables: list[Any], at: Any, row: Any, rows: int, columns: int,
        zeros: list[Any],
    ) -> dict[tuple[int, int], Any]:  # fmt: skip
        """Integer sums of one block of a group: ``sum(u * q) - z * sum(q)``, by row and unit of the tile."""
        v, T, c, L, b = self.v, self.v.T, self.codes, self.v.L, self.kernel.buffers
        place = T.bind(at * self.kernel.sizes["m"] + row)
        acc: dict[tuple[int, int], Any] = {}
        for i in range(rows):
            total = b["z"][place + i]
            if c.zeros:
                spread = T.bind(T.broadcast(T.int32(0) - total, L))
                for r in range(columns):
                    acc[i, r] = T.bind(spread * zeros[r])
            else:
                start = T.bind(T.broadcast(total * T.int32(-c.zero), L))
                for r in range(columns):
                    acc[i, r] = start
        readers = [Slots(v, c, b["w"], start) for start in starts]
        wide = c.bits == 8 or (c.table is not None and max(c.table) > _SAFE)
        dot = v.dot_bytes if wide else v.dot
        for slot in range(c.block // 4):
            weights = [reader.slot(slot) for reader in readers]
            for i in range(rows):
                start = (place + i) * c.block + 4 * slot
                word = T.reinterpret("int32", v.load(b["q"], start, 4))
                x = T.bind(T.reinterpret(f"int8x{4 * L}", T.broadcast(word, L)))
                for r in range(columns):
                    acc[i, r] = dot(acc[i, r], weights[r], x)
        return acc


class ExactProduct(Product):
    """The same tiles, with codes turned to floats."""

    def _group(
        self, starts: list[Any], tables: list[Any], within: Any, group: Any, row: Any, rows: int, columns: int,
        total: Any,
    ) -> None:  # fmt: skip
        v, T, c, L, b = self.v, self.v.T, self.codes, self.v.L, self.kernel.buffers
        zeros = [T.bind(T.cast(z, v.f32())) for z in self._zeros(starts, within)] or [v.spread(float(c.zero))] * columns
        sums = self.kernel.registers(rows * columns * L)
        for i in range(rows * columns):
            v.store(sums, i * L, v.spread(0.0))
        unit = min(c.block, UNROLLED)
        with T.serial(0, c.blocks) as block, T.serial(0, c.block // unit) as part:
            first = T.bind((group * c.blocks + block) * c.block + part * unit)
            codes = T.bind((within * c.blocks + block) * c.code_bytes(L))
            readers = [Slots(v, c, b["w"], s + codes, part) for s in starts]
            for slot in range(unit // 4):
                words = [T.bind(T.reinterpret(v.i32(), reader.slot(slot))) for reader in readers]
                for byte in range(4):
                    self._column(row, rows, columns, sums, words, zeros, T.bind(first + 4 * slot + byte), byte)
        for r in range(columns):
            scale = self._scale(starts[r], within)
            for i in range(rows):
                place = (i * columns + r) * L
                v.store(total, place, v.fma(v.load(sums, place), scale, v.load(total, place)))

    def _column(
        self, row: Any, rows: int, columns: int, sums: Any, words: list[Any], zeros: list[Any], at: Any, byte: int
    ) -> None:
        v, T, c, L = self.v, self.v.T, self.codes, self.v.L
        weights = []
        for word, zero in zip(words, zeros, strict=True):
            if c.signed(v.isa):
                code = (word << T.broadcast(T.int32(24 - 8 * byte), L)) >> T.broadcast(T.int32(24), L)
            else:
                code = (word >> T.broadcast(T.int32(8 * byte), L)) & T.broadcast(T.int32(255), L)
            weights.append(T.bind(T.cast(code, v.f32()) - zero))
        for i in range(rows):
            x = T.bind(T.broadcast(self.kernel.buffers["x"][(row + i) * self.kernel.sizes["ldx"] + at], L))
            for r in range(columns):
                place = (i * columns + r) * L
                v.store(sums, place, v.fma(x, weights[r], v.load(sums, place)))
