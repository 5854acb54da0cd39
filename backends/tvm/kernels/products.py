"""Products with quantized weights: bytes of weights times bytes of activations, or the exact float form.

The weight lies in *records* (`qc.backends.tvm.pack`): for ``lanes`` rows (output channels) and a few groups of
columns, codes, then scales, then zero points; a thread reads one sequential stream. Four columns of every row make one
vector of bytes; a vector holds ``8 / bits`` such slots, slot s at bit ``bits * s``. Three-bit codes lie as two planes,
of two bits and of one.

Integer form, in the order that makes it equal on every processor, bit for bit::

    t = float(sum(u * q) - z * sum(q)) * s_x[0]                      the first block of a group
    t = fma(float(sum(u * q) - z * sum(q)), s_x[b], t)              its other blocks, in order
    y = fma(t, s_w, y)     for each group, in order, starting at 0;  then bias, residual, activation

The level without fused products rounds each product too; its integers are the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.epilogue import Epilogue
from qc.backends.tvm.kernels.vectors import Kernel, Vectors

__all__ = ["Codes", "exact_product", "integer_product", "quantize_rows"]


_SAFE = 128
"""Largest byte of a weight whose products, in pairs, fit the 16 bits of ``maddubs``."""

_UNROLLED = 32
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
        table: 16 bytes that codes stand for; None: themselves.
    """

    bits: int
    block: int
    blocks: int
    half: bool
    zeros: bool
    zero: int
    per_record: int = 1
    table: tuple[int, ...] | None = None

    def signed(self, isa: Isa) -> bool:
        """Whether a code, or what it stands for, is a signed byte."""
        return isa.signed and (self.bits == 8 or self.table is not None)

    def code_bytes(self, lanes: int) -> int:
        """Bytes of the codes of one block of `lanes` rows."""
        return lanes * self.block * self.bits // 8

    def scale_bytes(self, lanes: int) -> int:
        """Bytes of the scales of one group."""
        return lanes * (2 if self.half else 4)

    def group_bytes(self, lanes: int) -> int:
        """Bytes of a group in a record with several."""
        return self.blocks * self.code_bytes(lanes) + self.scale_bytes(lanes) + (lanes if self.zeros else 0)

    def record_bytes(self, lanes: int) -> int:
        """Bytes of a record, padded to whole vectors."""
        unit = 4 * lanes
        return -(-self.per_record * self.group_bytes(lanes) // unit) * unit


def quantize_rows(isa: Isa, name: str, block: int) -> Any:
    """``q = rint(x * 127 / max|x|)`` per block of columns; its scale ``max|x| / 127`` and the sum of its codes.

    Units are rows. Columns beyond ``k`` up to the next whole group of ``kp`` are zeros.
    """
    v = Vectors(isa)
    T, L = v.T, v.L
    step = min(L, block)
    pointers = {"x": "float32", "q": "int8", "s": "float32", "z": "int32"}
    with Kernel(name, v, pointers, ("ld", "k", "kp")) as kernel:
        ld, k, kp = kernel.sizes["ld"], kernel.sizes["k"], kernel.sizes["kp"]
        x, q, s, z = (kernel.buffers[n] for n in pointers)
        with kernel.units() as row:
            blocks = T.bind(kp // block)
            with T.serial(0, blocks) as b:
                here = T.alloc_buffer((block,), "float32", scope="global")
                with T.If((b + 1) * block <= k):
                    with T.Then():
                        for i in range(0, block, step):
                            v.store(here, i, v.load(x, row * ld + b * block + i, step), step)
                    with T.Else(), T.serial(0, block) as i:
                        T.buffer_store(
                            here,
                            T.if_then_else(b * block + i < k, x[row * ld + b * block + i], T.float32(0)),
                            [i],
                        )
                parts = [v.load(here, i, step) for i in range(0, block, step)]
                top = v.intrinsic("llvm.fabs", f"float32x{step}", parts[0])
                for part in parts[1:]:
                    a = v.intrinsic("llvm.fabs", f"float32x{step}", part)
                    top = v.intrinsic("llvm.maxnum", f"float32x{step}", top, a)
                m = v.intrinsic("llvm.vector.reduce.fmax", "float32", top)
                inverse = T.bind(T.Select(m > T.float32(0), T.float32(127) / m, T.float32(0)))
                total = None
                for i, part in enumerate(parts):
                    rounded = v.intrinsic("llvm.rint", f"float32x{step}", part * T.broadcast(inverse, step))
                    codes = T.bind(T.cast(rounded, f"int32x{step}"))
                    v.store(q, row * kp + b * block + i * step, T.cast(codes, f"int8x{step}"), step)
                    total = codes if total is None else T.bind(total + codes)
                T.buffer_store(s, m * T.float32(1 / 127), [row * blocks + b])
                T.buffer_store(z, v.intrinsic("llvm.vector.reduce.add", "int32", total), [row * blocks + b])
    return kernel.function()


def integer_product(isa: Isa, name: str, codes: Codes, bias: bool, residual: bool, activation: str) -> Any:
    """``y[m, n] = activation(sum_k x[m, k] w[n, k] + bias[n] + r[m, n])`` on quantized activations.

    Units are vectors of rows of the weight, ``lanes`` output channels each.
    """
    v = Vectors(isa)
    pointers = {"q": "int8", "s": "float32", "z": "int32", "w": "uint8", **Epilogue.pointers(bias, residual)}
    integers = ("m", "n", "groups", "ldy", "ldr")
    with Kernel(name, v, pointers, integers) as kernel:
        _Product(v, kernel, codes, bias, residual, activation).emit()
    return kernel.function()


def exact_product(isa: Isa, name: str, codes: Codes, bias: bool, residual: bool, activation: str) -> Any:
    """``y[m, n] = activation(sum_k x[m, k] (u - z)[n, k] s[n, k] + bias[n] + r[m, n])`` on float activations.

    Units are vectors of rows of the weight. Rows of x hold whole groups: `ldx` columns, zeros behind the last.
    """
    v = Vectors(isa)
    pointers = {"x": "float32", "w": "uint8", **Epilogue.pointers(bias, residual)}
    integers = ("m", "n", "groups", "ldx", "ldy", "ldr")
    with Kernel(name, v, pointers, integers) as kernel:
        _ExactProduct(v, kernel, codes, bias, residual, activation).emit()
    return kernel.function()


class _Product:
    def __init__(self, v: Vectors, kernel: Kernel, codes: Codes, bias: bool, residual: bool, activation: str) -> None:
        self.v, self.kernel, self.codes = v, kernel, codes
        self.epilogue = Epilogue(kernel, bias, residual, activation)

    def emit(self) -> None:
        v, T = self.v, self.v.T
        rows, columns = v.isa.int_tile
        m, begin, end = self.kernel.sizes["m"], self.kernel.begin, self.kernel.end
        # Tiles of several rows for prefill, on pairs of units; single rows for decoding and what is left.
        whole, pairs = T.bind(m // rows), T.bind((end - begin) // columns)
        with T.serial(0, pairs) as p:
            unit = T.bind(begin + p * columns)
            with T.serial(0, whole) as i:
                self._tile(unit, i * rows, rows, columns)
            with T.serial(0, columns) as r, T.serial(whole * rows, m) as i:
                self._tile(unit + r, i, 1, 1)
            self.epilogue.finish(T.bind(unit * v.L), columns * v.L)
        with T.serial(begin + pairs * columns, end) as unit:
            with T.serial(0, m) as i:
                self._tile(unit, i, 1, 1)
            self.epilogue.finish(T.bind(unit * v.L), v.L)

    def _tile(self, unit: Any, row: Any, rows: int, columns: int) -> None:
        v, T, c, L = self.v, self.v.T, self.codes, self.v.L
        groups, per = self.kernel.sizes["groups"], c.per_record
        total = self.kernel.registers(rows * columns * L)
        for i in range(rows * columns):
            v.store(total, i * L, v.spread(0.0))
        records = T.bind((groups + per - 1) // per)
        with T.serial(0, groups) as group:
            record, within = (group, T.int32(0)) if per == 1 else (T.bind(group // per), T.bind(group % per))
            starts = [T.bind(((unit + r) * records + record) * c.record_bytes(L)) for r in range(columns)]
            if rows == 1:
                share = c.record_bytes(L) // per
                v.stream(self.kernel.buffers["w"], T.bind(starts[0] + within * share), share)
            self._group(starts, within, group, row, rows, columns, total)
        totals = {(i, r): v.load(total, (i * columns + r) * L) for i in range(rows) for r in range(columns)}
        self.epilogue.store(T.bind(unit * L), row, totals, columns)

    def _group(self, starts: list[Any], within: Any, group: Any, row: Any, rows: int, columns: int, total: Any) -> None:
        v, T, c, L, b = self.v, self.v.T, self.codes, self.v.L, self.kernel.buffers
        groups = self.kernel.sizes["groups"]
        scale_at = c.per_record * c.blocks * c.code_bytes(L)
        zero_at = scale_at + c.per_record * c.scale_bytes(L)
        zeros = []
        if c.zeros:
            loaded = [v.load(b["w"], s + zero_at + within * L, L) for s in starts]
            if c.bits == 8 and v.isa.signed:
                loaded = [T.reinterpret(f"int8x{L}", z) for z in loaded]
            zeros = [T.bind(T.cast(z, v.i32())) for z in loaded]
        sums: dict[tuple[int, int], Any] = {}
        for block in range(c.blocks):
            at = T.bind(group * c.blocks + block) if c.blocks > 1 else group
            codes = [s + (within * c.blocks + block) * c.code_bytes(L) for s in starts]
            for (i, r), integer in self._block(codes, at, row, rows, columns, zeros).items():
                sx = v.spread(b["s"][(row + i) * (groups * c.blocks) + at])
                exact = T.cast(integer, v.f32())
                sums[i, r] = T.bind(exact * sx) if block == 0 else v.fma(exact, sx, sums[i, r])
        for r in range(columns):
            scale = self._scale(starts[r] + scale_at + within * c.scale_bytes(L))
            for i in range(rows):
                place = (i * columns + r) * L
                v.store(total, place, v.fma(sums[i, r], scale, v.load(total, place)))

    def _scale(self, start: Any) -> Any:
        v, T, w = self.v, self.v.T, self.kernel.buffers["w"]
        if self.codes.half:
            return T.bind(T.cast(T.reinterpret(f"float16x{v.L}", v.load(w, start, 2 * v.L)), v.f32()))
        return T.bind(T.reinterpret(v.f32(), v.load(w, start, 4 * v.L)))

    def _block(
        self, starts: list[Any], at: Any, row: Any, rows: int, columns: int, zeros: list[Any]
    ) -> dict[tuple[int, int], Any]:
        """Integer sums of one block: ``sum(u * q) - z * sum(q)``, by row and unit of the tile."""
        v, T, c, L, b = self.v, self.v.T, self.codes, self.v.L, self.kernel.buffers
        blocks = self.kernel.sizes["groups"] * c.blocks
        acc: dict[tuple[int, int], Any] = {}
        for i in range(rows):
            total = b["z"][(row + i) * blocks + at]
            if c.zeros:
                spread = T.bind(T.broadcast(T.int32(0) - total, L))
                for r in range(columns):
                    acc[i, r] = T.bind(spread * zeros[r])
            else:
                start = T.bind(T.broadcast(total * T.int32(-c.zero), L))
                for r in range(columns):
                    acc[i, r] = start
        readers = [_Slots(v, c, b["w"], start) for start in starts]
        wide = c.bits == 8 or (c.table is not None and max(c.table) > _SAFE)
        dot = v.dot_bytes if wide else v.dot
        for slot in range(c.block // 4):
            weights = [reader.slot(slot) for reader in readers]
            for i in range(rows):
                start = ((row + i) * blocks + at) * c.block + 4 * slot
                word = T.reinterpret("int32", v.load(b["q"], start, 4))
                x = T.bind(T.reinterpret(f"int8x{4 * L}", T.broadcast(word, L)))
                for r in range(columns):
                    acc[i, r] = dot(acc[i, r], weights[r], x)
        return acc


class _ExactProduct(_Product):
    """The same tiles, with codes turned to floats."""

    def _group(self, starts: list[Any], within: Any, group: Any, row: Any, rows: int, columns: int, total: Any) -> None:
        v, T, c, L, b = self.v, self.v.T, self.codes, self.v.L, self.kernel.buffers
        scale_at = c.per_record * c.blocks * c.code_bytes(L)
        zero_at = scale_at + c.per_record * c.scale_bytes(L)
        zeros = [v.spread(float(c.zero))] * columns
        if c.zeros:
            loaded = [v.load(b["w"], s + zero_at + within * L, L) for s in starts]
            if c.bits == 8 and v.isa.signed:
                loaded = [T.reinterpret(f"int8x{L}", z) for z in loaded]
            zeros = [T.bind(T.cast(z, v.f32())) for z in loaded]
        sums = self.kernel.registers(rows * columns * L)
        for i in range(rows * columns):
            v.store(sums, i * L, v.spread(0.0))
        unit = min(c.block, _UNROLLED)
        with T.serial(0, c.blocks) as block, T.serial(0, c.block // unit) as part:
            first = T.bind((group * c.blocks + block) * c.block + part * unit)
            codes = T.bind((within * c.blocks + block) * c.code_bytes(L))
            readers = [_Slots(v, c, b["w"], s + codes, part) for s in starts]
            for slot in range(unit // 4):
                words = [T.bind(T.reinterpret(v.i32(), reader.slot(slot))) for reader in readers]
                for byte in range(4):
                    self._column(row, rows, columns, sums, words, zeros, T.bind(first + 4 * slot + byte), byte)
        for r in range(columns):
            scale = self._scale(starts[r] + scale_at + within * c.scale_bytes(L))
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


class _Slots:
    """The bytes of four columns at a time, of one block of one vector of rows, or of a part of it."""

    def __init__(self, v: Vectors, codes: Codes, w: Any, start: Any, part: Any = 0) -> None:
        self.v, self.codes, self.w = v, codes, w
        self._loaded: dict[tuple[int, int], Any] = {}
        self._wide = wide = 4 * v.L
        bits = 2 if codes.bits == 3 else codes.bits
        self._planes = (start + part * (bits * wide), start + (codes.block // 16 + part) * wide)
        """Where codes begin, and, where they lie in two planes, their top bits; in parts of `_UNROLLED` columns."""

    def slot(self, slot: int) -> Any:
        """The bytes of four columns of every row."""
        codes = self._codes(slot)
        return codes if self.codes.table is None else self.v.look_up(self.codes.table, codes)

    def _codes(self, slot: int) -> Any:
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

    def _vector(self, index: int, plane: int = 0) -> Any:
        if (plane, index) not in self._loaded:
            self._loaded[plane, index] = self.v.load(self.w, self._planes[plane] + index * self._wide, self._wide)
        return self._loaded[plane, index]

    def _field(self, vector: Any, shift: int, mask: int) -> Any:
        T, wide = self.v.T, self._wide
        if shift:
            halves = T.reinterpret(f"uint16x{wide // 2}", vector) >> T.broadcast(T.uint16(shift), wide // 2)
            vector = T.reinterpret(f"uint8x{wide}", halves)
        return T.bind(vector & T.broadcast(T.uint8(mask), wide))
