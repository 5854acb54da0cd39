"""Products of bytes with bytes: weights with one scale per output channel, activations on one grid per row.

An activation is ``(q - z) s`` with signed bytes q and numbers s and z of its row; a weight ``(u - v) w`` with numbers w
and v of its output channel. Sums run over the whole row in integers, exactly::

    i = sum(q * u) - v * (sum(q) - k * z) - z * sum(u)            over the k columns
    y = (float(i) * s) * w;  then bias, residual, activation

which is ``sum (q - z) (u - v)`` on integers, the same on every processor, bit for bit.

The weight lies in units of a few vectors of channels: ``[columns / 4, vectors, lanes, 4]`` bytes, then of each channel
its scale, its zero point v and its sum(u). Columns are padded to `PADDING` with codes that meet zeros.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.epilogue import Epilogue
from qc.backends.tvm.kernels.tiles import SIDE, Tiles
from qc.backends.tvm.kernels.vectors import Kernel, Vectors

__all__ = ["FACTS", "PADDING", "byte_product", "quantize_grid", "row_ranges", "vectors_of"]

PADDING = 64
"""Columns are padded to a multiple."""

_AHEAD = {2: 8, 1: 32}
"""Lines of the next unit that a step asks for, by tiles of rows in it: 128 rows ask for all of it, or 16."""

_CHAINS = 4
"""Ends of a row that are found side by side: each waits for the one before."""

FACTS = 12
"""Bytes behind the codes of a channel: scale, zero point and sum."""


def vectors_of(isa: Isa) -> int:
    """Vectors of output channels in a unit of a weight: two, where they may become tiles."""
    return 2 if isa.tiles else isa.tile[1]


def row_ranges(isa: Isa, name: str) -> Any:
    """The smallest and the largest entry of each row; units are rows."""
    v = Vectors(isa)
    T, L = v.T, v.L
    with Kernel(name, v, {"x": "float32", "low": "float32", "high": "float32"}, ("ld", "k")) as kernel:
        ld, k, x = kernel.sizes["ld"], kernel.sizes["k"], kernel.buffers["x"]
        with kernel.units() as row:
            first = T.bind(x[row * ld])
            ends = {"low": (v.minimum, T.min), "high": (v.maximum, T.max)}
            slots = {end: [kernel.registers(L) for _ in range(_CHAINS)] for end in ends}
            for slot in itertools.chain(*slots.values()):
                v.store(slot, 0, T.broadcast(first, L))
            whole = T.bind(k // L)

            def take(i: Any, chain: int) -> None:
                part = v.load(x, row * ld + i * L)
                for end, (pick, _) in ends.items():
                    slot = slots[end][chain]
                    v.store(slot, 0, pick(v.load(slot, 0), part))

            with T.serial(0, whole // _CHAINS) as i:
                for chain in range(_CHAINS):
                    take(i * _CHAINS + chain, chain)
            with T.serial(whole // _CHAINS * _CHAINS, whole) as i:
                take(i, 0)
            for end, (pick, pick_one) in ends.items():
                found = functools.reduce(pick, (v.load(slot, 0) for slot in slots[end]))
                found = v.fold_lanes(pick_one, found)
                T.buffer_store(kernel.buffers[end], found, [row])
                with T.serial(whole * L, k) as i:
                    held = kernel.buffers[end]
                    T.buffer_store(held, pick_one(held[row], x[row * ld + i]), [row])
    return kernel.function()


def quantize_grid(isa: Isa, name: str, low: int, high: int) -> Any:
    """``q = clamp(rint(x / s) + z, low, high)``, and ``t = sum(q) - k * z`` of each row; units are rows.

    Columns beyond k up to `kp` are zeros. It is x that is clamped, between the numbers of the outermost codes: these
    are rounded to their codes.
    """
    v = Vectors(isa)
    T, L = v.T, v.L
    pointers = {"x": "float32", "s": "float32", "z": "int32", "q": "int8", "t": "int32"}
    with Kernel(name, v, pointers, ("ld", "k", "kp")) as kernel:
        ld, k, kp = (kernel.sizes[n] for n in ("ld", "k", "kp"))
        x, s, z, q, t = (kernel.buffers[n] for n in pointers)
        with kernel.units() as row:
            total, rest = kernel.registers(L, "int32"), kernel.registers(L)
            v.store(total, 0, T.broadcast(T.int32(0), L))
            scale, inverse = (v.spread(T.bind(a)) for a in (s[row], T.float32(1) / s[row]))
            zero = T.bind(T.broadcast(z[row], L))
            least, most = (v.spread(T.bind(T.cast(end - z[row], "float32") * s[row])) for end in (low, high))

            def codes(part: Any) -> Any:
                inside = v.minimum(v.maximum(part, least), most)
                return T.bind(T.cast(v.nearest(v.divide(inside, scale, inverse)), v.i32()) + zero)

            whole = T.bind(k // L)
            with T.serial(0, whole) as i:
                found = codes(v.load(x, row * ld + i * L))
                v.store(total, 0, v.load(total, 0) + found)
                v.store(q, row * kp + i * L, T.cast(found, f"int8x{L}"))
            with T.serial(whole, kp // L) as i:
                v.store(q, row * kp + i * L, T.broadcast(T.int8(0), L))
            v.store(rest, 0, v.spread(0.0))
            with T.serial(0, k - whole * L) as j:
                T.buffer_store(rest, x[row * ld + whole * L + j], [j])
            tail = kernel.registers(L, "int32")
            v.store(tail, 0, codes(v.load(rest, 0)))
            T.buffer_store(t, v.intrinsic("llvm.vector.reduce.add", "int32", v.load(total, 0)) - k * z[row], [row])
            with T.serial(0, k - whole * L) as j:
                T.buffer_store(q, T.cast(tail[j], "int8"), [row * kp + whole * L + j])
                T.buffer_store(t, t[row] + tail[j], [row])
    return kernel.function()


def byte_product(isa: Isa, name: str, zeros: bool, bias: bool, residual: bool, activation: str) -> Any:
    """The product above. Units are units of the weight: `vectors_of` vectors of output channels.

    Where the level has tiles, the last size says whether this processor and system do: 1 or 0.

    Args:
        isa: The level.
        name: Of the function.
        zeros: Whether activations have zero points.
        bias: See `Epilogue`, as the last two.
        residual: See above.
        activation: See above.
    """
    v, columns = Vectors(isa), vectors_of(isa)
    pointers = {"q": "int8", "s": "float32", "t": "int32", **({"z": "int32"} if zeros else {}), "w": "uint8"}
    pointers |= Epilogue.pointers(bias, residual)
    with Kernel(name, v, pointers, ("m", "n", "k", "ldy", "ldr", *(["tiles"] if isa.tiles else []))) as kernel:
        product = _ByteProduct(v, kernel, columns, zeros)
        epilogue = Epilogue(kernel, bias, residual, activation)
        tiles = Tiles(v, kernel.sizes["tiles"]) if isa.tiles else None
        with kernel.units() as unit:
            done: Any = product.in_tiles(unit, tiles) if tiles is not None else v.T.int32(0)
            rows = isa.tile[0]
            while rows >= 1:
                count = v.T.bind((kernel.sizes["m"] - done) // rows)
                ask = product.ahead(unit, count) if rows == isa.tile[0] else None
                with v.T.serial(0, count) as i:
                    row = v.T.bind(done + i * rows)
                    totals = product.tile(unit, row, rows, i, ask)
                    epilogue.store(v.T.bind(unit * columns * v.L), row, totals, columns)
                done = v.T.bind(done + count * rows)
                rows //= 2
            epilogue.finish(v.T.bind(unit * columns * v.L), columns * v.L)
        if tiles is not None:
            tiles.release()
    return kernel.function()


class _ByteProduct:
    def __init__(self, v: Vectors, kernel: Kernel, columns: int, zeros: bool) -> None:
        self.v, self.kernel, self.columns, self.zeros = v, kernel, columns, zeros

    def ahead(self, unit: Any, tiles: Any) -> Any:
        """See `Kernel.ahead`."""
        k, wide = self.kernel.sizes["k"], self.columns * self.v.L
        return self.kernel.ahead(self.kernel.buffers["w"], unit, (k + FACTS) * wide, tiles, k // 4)

    def tile(self, unit: Any, row: Any, rows: int, number: Any, ask: Any) -> dict[tuple[int, int], Any]:
        """Finished products of a few rows, by row and vector."""
        v, T, L, columns, b = self.v, self.v.T, self.v.L, self.columns, self.kernel.buffers
        k, step = self.kernel.sizes["k"], columns * 4 * L
        start = T.bind(unit * (k * columns * L + FACTS * columns * L))
        sums = self.kernel.registers(rows * columns * L, "int32")
        for i in range(rows * columns):
            v.store(sums, i * L, T.broadcast(T.int32(0), L))
        with T.serial(0, k // 4) as four:
            weights = [v.load(b["w"], start + four * step + r * 4 * L, 4 * L) for r in range(columns)]
            for i in range(rows):
                word = T.reinterpret("int32", v.load(b["q"], (row + i) * k + 4 * four, 4))
                x = T.bind(T.reinterpret(f"int8x{4 * L}", T.broadcast(word, L)))
                for r in range(columns):
                    place = (i * columns + r) * L
                    v.store(sums, place, v.dot_bytes(v.load(sums, place), weights[r], x))
            if ask is not None:
                ask(number, four)
            elif rows == 1:
                v.stream(b["w"], start + four * step, step)
        facts = self._facts(start)
        return {
            (i, r): self._finished(facts, row + i, r, v.load(sums, (i * columns + r) * L))
            for r in range(columns)
            for i in range(rows)
        }

    def in_tiles(self, unit: Any, tiles: Tiles) -> Any:
        """Products of as many whole tiles of rows as there are, where a unit lies inside of y; returns their rows."""
        T, size, columns = self.v.T, self.kernel.sizes, self.columns * self.v.L
        inside = T.bind(T.if_then_else((unit + 1) * columns <= size["n"], tiles.allowed, 0))
        self._integers = [self.kernel.stack(max(_AHEAD) * SIDE * self.v.L, "int32") for _ in range(self.columns)]
        done: Any = T.int32(0)
        for sides in _AHEAD:
            count = T.bind(inside * ((size["m"] - done) // (sides * SIDE)))
            with T.serial(0, count) as block:
                self._block(unit, tiles, block, T.bind(done + block * (sides * SIDE)), sides)
            done = T.bind(done + count * (sides * SIDE))
        return done

    def _block(self, unit: Any, tiles: Tiles, block: Any, row: Any, sides: int) -> None:
        """Products of the rows of one or two tiles, by way of integers on the stack: rows of y lie far apart."""
        v, T, L, columns, b, size = self.v, self.v.T, self.v.L, self.columns, self.kernel.buffers, self.kernel.sizes
        k, ldy, step = size["k"], size["ldy"], columns * 4 * L
        start = T.bind(unit * ((k + FACTS) * columns * L))
        facts = self._facts(start)
        lines = T.bind((k + FACTS) * (columns * L) // 64)
        sums = [[tiles.zero(i * columns + r) for r in range(columns)] for i in range(sides)]
        with T.serial(0, k // 64) as part:
            for i in range(_AHEAD[sides]):
                ahead = T.min((block * (k // 64) + part) * _AHEAD[sides] + i, lines)
                v.prefetch(b["w"], T.bind(start + (k + FACTS) * (columns * L) + ahead * 64))
            x = [tiles.load(4 + i, b["q"], (row + i * SIDE) * k + part * 64, k) for i in range(sides)]
            w = [tiles.load(6 + r, b["w"], start + part * (16 * step) + r * 4 * L, step) for r in range(columns)]
            for i in range(sides):
                for r in range(columns):
                    tiles.dot(sums[i][r], x[i], w[r])
        for i in range(sides):
            for r in range(columns):
                tiles.store(sums[i][r], self._integers[r], i * SIDE * L, 4 * L)
        at = T.bind(row * ldy + unit * (columns * L))
        with T.serial(0, sides * SIDE) as i:
            for r in range(columns):
                total = v.load(self._integers[r], i * L)
                v.store(b["y"], T.bind(at + i * ldy + r * L), self._finished(facts, row + i, r, total))

    def _facts(self, start: Any) -> list[Any]:
        k, wide = self.kernel.sizes["k"], self.columns * self.v.L
        return [self.v.T.bind(start + k * wide + part * 4 * wide) for part in range(3)]

    def _finished(self, facts: list[Any], row: Any, r: int, total: Any) -> Any:
        v, T, L, b = self.v, self.v.T, self.v.L, self.kernel.buffers
        scale, zero, of_weight = (v.load(b["w"], fact + r * 4 * L, 4 * L) for fact in facts)
        total = T.bind(total - T.reinterpret(v.i32(), zero) * T.broadcast(b["t"][row], L))
        if self.zeros:
            total = T.bind(total - T.reinterpret(v.i32(), of_weight) * T.broadcast(b["z"][row], L))
        scaled = T.bind(T.cast(total, v.f32()) * T.broadcast(b["s"][row], L))
        return T.bind(scaled * T.reinterpret(v.f32(), scale))
