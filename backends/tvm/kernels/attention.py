"""Attention: one kernel for many queries, one for a few; rotation of heads and the append to a cache.

All take strides, in elements, of batch, head and position, so projections, caches and transposed heads are read where
they lie. Units are (batch, key head): the query heads that share a key head share what is read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.caches import CELLS, Cells, Rows
from qc.backends.tvm.kernels.vectors import Kernel, Vectors

__all__ = ["Heads", "attend_few", "attend_many", "rotate"]

_NOTHING = -3.0e38


@dataclasses.dataclass(frozen=True)
class Heads:
    """What an attention kernel is made for.

    Attributes:
        width: Channels of a head of queries and keys.
        value_width: Channels of a head of values.
        share: Query heads per key head.
        causal: Whether query i of a row sees keys up to ``past + i`` only.
        window: How many keys a query sees, its own included; 0 for all.
        bias: Whether something is added to the scores.
        scale: Factor on the scores.
        softcap: ``c tanh(score / c)`` if not 0.
        cells: What keys and values are stored in.
    """

    width: int
    value_width: int
    share: int
    causal: bool
    window: int
    bias: bool
    scale: float
    softcap: float = 0.0
    cells: Cells = CELLS["float32"]

    def scratch(self, isa: Isa, many: bool, keys: int) -> tuple[int, int]:
        """Floats that a unit needs for work: so many per key (rounded up to two vectors), plus so many."""
        unit = 2 * isa.lanes
        if not many:
            return self.share, unit * self.share
        padded = self.padded(isa) if self.copies_values(isa) else 0
        rows = self.width + isa.tile[0] + padded
        return rows, unit * rows

    def copies_values(self, isa: Isa) -> bool:
        """Whether many queries need values in another form than they are stored in."""
        return self.cells.narrow or self.value_width % isa.lanes != 0

    def fits_few(self, isa: Isa) -> bool:
        """Whether heads are whole vectors, as a kernel for few queries wants."""
        return all(self.cells.fits(width, isa.lanes) for width in (self.width, self.value_width))

    def padded(self, isa: Isa) -> int:
        """Channels of a head of values in whole vectors."""
        return -(-self.value_width // isa.lanes) * isa.lanes


_STRIDES = tuple(f"{tensor}{axis}" for tensor in "qkvy" for axis in "bhs")
_BIAS = ("bb", "bh", "bs")


def _kernel(v: Vectors, name: str, heads: Heads) -> Kernel:
    held = "uint8" if heads.cells.narrow else "float32"
    pointers = {"q": "float32", "k": held, "v": held, "y": "float32", "work": "float32", "past": "int32"}
    integers = ["kvheads", "s", "t", "room", *_STRIDES]
    if heads.bias:
        pointers["bias"] = "float32"
        integers += _BIAS
    return Kernel(name, v, pointers, integers)


class _Attention:
    """What both kernels share."""

    def __init__(self, kernel: Kernel, heads: Heads, unit: Any) -> None:
        self.k, self.v, self.h = kernel, kernel.v, heads
        T, size = self.v.T, kernel.sizes
        self.batch, self.head = T.bind(unit // size["kvheads"]), T.bind(unit % size["kvheads"])
        self.past = T.bind(kernel.buffers["past"][self.batch]) if heads.causal else T.int32(0)
        self.keys = Rows(self.v, heads.cells, kernel.buffers["k"], heads.width)
        self.values = Rows(self.v, heads.cells, kernel.buffers["v"], heads.value_width)

    def at(self, tensor: str, head: Any, position: Any) -> Any:
        """Index of the first channel of a head at a position."""
        size = self.k.sizes
        return self.batch * size[f"{tensor}b"] + head * size[f"{tensor}h"] + position * size[f"{tensor}s"]

    def range_of(self, query: Any) -> tuple[Any, Any]:
        """The keys ``[low, high)`` that a query sees."""
        T, h = self.v.T, self.h
        high = T.bind(self.past + query + 1) if h.causal else self.k.sizes["t"]
        low = T.bind(T.max(high - h.window, 0)) if h.window else T.int32(0)
        return low, high

    def softmax(self, row: Any, head: Any, query: Any, start: Any, stop: Any) -> Any:
        """Turns scores ``work[row + start .. row + stop)`` into powers, zero where a key is not seen.

        `start` and `stop` are multiples of a vector. Returns the reciprocal of their sum, 0 if no key is seen.
        """
        v, T, L, h, work = self.v, self.v.T, self.v.L, self.h, self.k.buffers["work"]
        seen = self.range_of(query)
        top, sums = self.k.registers(L), self.k.registers(L)
        v.store(top, 0, v.spread(_NOTHING))
        v.store(sums, 0, v.spread(0.0))
        if not h.bias:
            with T.serial(start // L, stop // L) as i:
                self._score(row, T.bind(i * L), seen, None, top)
        else:
            size, bias = self.k.sizes, self.k.buffers["bias"]
            base = T.bind(self.batch * size["bb"] + head * size["bh"] + query * size["bs"])
            whole = T.bind(T.min(size["t"], stop) // L)
            with T.serial(start // L, whole) as i:
                self._score(row, T.bind(i * L), seen, v.load(bias, base + i * L), top)
            slot = self.k.registers(L)
            with T.serial(T.max(whole, start // L), stop // L) as i:
                at = T.bind(i * L)
                v.store(slot, 0, v.spread(0.0))
                with T.serial(0, T.max(size["t"] - at, 0)) as j:
                    T.buffer_store(slot, bias[base + at + j], [j])
                self._score(row, at, seen, v.load(slot, 0), top)
        m = T.bind(T.max(v.largest_lane(v.load(top, 0)), T.float32(-1.0e38)))
        with T.serial(start // L, stop // L) as i:
            shifted = v.keep(v.load(work, row + i * L) - T.broadcast(m, L))
            # exp() clamps its argument at -87: what is masked must be nothing
            e = v.keep(T.Select(shifted > v.spread(-87.0), v.exp(shifted), v.spread(0.0)))
            v.store(work, row + i * L, e)
            v.store(sums, 0, v.load(sums, 0) + e)
        total = T.bind(v.add_lanes(v.load(sums, 0)))
        return T.bind(T.Select(total > T.float32(0), T.float32(1) / total, T.float32(0)))

    def _score(self, row: Any, at: Any, seen: tuple[Any, Any], bias: Any, top: Any) -> None:
        """Finishes a vector of scores: scaled, with its bias, nothing where a key is not seen; raises `top`."""
        v, T, L, h, work = self.v, self.v.T, self.v.L, self.h, self.k.buffers["work"]
        x = T.bind(v.load(work, row + at) * v.spread(h.scale))
        if h.softcap:
            x = T.bind(v.spread(h.softcap) * v.tanh(x / v.spread(h.softcap)))
        lanes = T.bind(T.broadcast(at, L) + T.ramp(0, 1, L))
        inside = lanes < T.broadcast(seen[1], L)
        if h.window:
            inside = T.bitwise_and(inside, lanes >= T.broadcast(seen[0], L))
        if bias is not None:
            x = T.bind(x + bias)
        x = v.keep(T.Select(inside, x, v.spread(_NOTHING)))
        v.store(work, row + at, x)
        v.store(top, 0, v.maximum(v.load(top, 0), x))


def attend_many(isa: Isa, name: str, heads: Heads) -> Any:
    """Attention of many queries: keys are transposed once, then scores and values are tiles of float products."""
    v = Vectors(isa)
    T, L = v.T, v.L
    rows, pair = isa.tile[0], 2
    with _kernel(v, name, heads) as kernel:
        size, b = kernel.sizes, kernel.buffers
        work, room, s = b["work"], size["room"], size["s"]
        with kernel.units() as unit:
            a = _Attention(kernel, heads, unit)
            keys = T.bind(a.past + s) if heads.causal else size["t"]
            width, padded = heads.width, heads.padded(isa)
            copied = padded if heads.copies_values(isa) else 0
            base = T.bind(unit * (room * (width + rows + copied)))
            scores = T.bind(base + room * width)
            values = T.bind(scores + room * rows)
            with T.serial(0, keys) as t:
                column = T.bind(base + t)
                a.keys.each(T.bind(a.at("k", a.head, t)), lambda d, x: T.buffer_store(work, x, [column + d * room]))
                if copied:
                    row = T.bind(values + t * padded)
                    a.values.each(T.bind(a.at("v", a.head, t)), lambda d, x: T.buffer_store(work, x, [row + d]))
                    with T.serial(heads.value_width, padded) as d:
                        T.buffer_store(work, T.float32(0), [row + d])
            with T.serial(0, heads.share) as r, T.serial(0, (s + rows - 1) // rows) as tile:
                head = T.bind(a.head * heads.share + r)
                # the last tile repeats its last query rather than reading beyond it
                queries = [T.bind(T.min(tile * rows + i, s - 1)) for i in range(rows)]
                start = T.bind(a.range_of(queries[0])[0] // (pair * L) * (pair * L))
                stop = T.bind((a.range_of(queries[-1])[1] + (pair * L - 1)) // (pair * L) * (pair * L))
                _scores(kernel, a, head, queries, base, scores, start, stop, pair)
                factors = kernel.registers(rows)
                with T.serial(0, rows) as i:
                    query = T.bind(T.min(tile * rows + i, s - 1))
                    T.buffer_store(factors, a.softmax(T.bind(scores + i * room), head, query, start, stop), [i])
                first = a.range_of(queries[0])[0]
                last = a.range_of(queries[-1])[1]
                source = (work, values, padded) if copied else (b["v"], a.at("v", a.head, 0), size["vs"])
                _values(kernel, a, head, queries, scores, first, last, source, factors)
    return kernel.function()


def _scores(
    kernel: Kernel, a: _Attention, head: Any, queries: list[Any], base: Any, scores: Any, start: Any, stop: Any,
    pair: int,
) -> None:  # fmt: skip
    """Dot products of a tile of queries with all keys from `start` to `stop`."""
    v = kernel.v
    T, L, room, work = v.T, v.L, kernel.sizes["room"], kernel.buffers["work"]
    q = [T.bind(a.at("q", head, query)) for query in queries]
    with T.serial(start // (pair * L), stop // (pair * L)) as chunk:
        sums = kernel.registers(len(queries) * pair * L)
        for i in range(len(queries) * pair):
            v.store(sums, i * L, v.spread(0.0))
        with T.serial(0, a.h.width) as d:
            keys = [v.load(work, base + d * room + (chunk * pair + r) * L) for r in range(pair)]
            for i, at in enumerate(q):
                x = T.bind(T.broadcast(kernel.buffers["q"][at + d], L))
                for r in range(pair):
                    place = (i * pair + r) * L
                    v.store(sums, place, v.fma(x, keys[r], v.load(sums, place)))
        for i in range(len(queries)):
            for r in range(pair):
                v.store(work, scores + i * room + (chunk * pair + r) * L, v.load(sums, (i * pair + r) * L))


def _values(
    kernel: Kernel, a: _Attention, head: Any, queries: list[Any], scores: Any, first: Any, last: Any,
    source: tuple[Any, Any, Any], factors: Any,
) -> None:  # fmt: skip
    """Sums of values weighted by the powers of the scores, for a tile of queries."""
    v = kernel.v
    T, L, room, work = v.T, v.L, kernel.sizes["room"], kernel.buffers["work"]
    buffer, origin, stride = source
    vectors = a.h.padded(v.isa) // L
    wide = max(n for n in range(1, vectors + 1) if vectors % n == 0 and n * len(queries) <= 24)
    for chunk in range(vectors // wide):
        sums = kernel.registers(len(queries) * wide * L)
        for i in range(len(queries) * wide):
            v.store(sums, i * L, v.spread(0.0))
        with T.serial(first, last) as t:
            row = T.bind(origin + t * stride)
            values = [v.load(buffer, row + (chunk * wide + n) * L) for n in range(wide)]
            for i in range(len(queries)):
                p = T.bind(T.broadcast(work[scores + i * room + t], L))
                for n in range(wide):
                    place = (i * wide + n) * L
                    v.store(sums, place, v.fma(p, values[n], v.load(sums, place)))
        for i, query in enumerate(queries):
            at = T.bind(a.at("y", head, query))
            for n in range(wide):
                column = (chunk * wide + n) * L
                value = T.bind(v.load(sums, (i * wide + n) * L) * T.broadcast(factors[i], L))
                if column + L <= a.h.value_width:
                    v.store(kernel.buffers["y"], at + column, value)
                    continue
                slot = kernel.registers(L)
                v.store(slot, 0, value)
                with T.serial(0, a.h.value_width - column) as j:
                    T.buffer_store(kernel.buffers["y"], slot[j], [at + column + j])


def attend_few(isa: Isa, name: str, heads: Heads) -> Any:
    """Attention of a few queries, as in decoding: keys and values stream through once, shared by all their heads.

    See `Heads.fits_few`.
    """
    v = Vectors(isa)
    T, L = v.T, v.L
    with _kernel(v, name, heads) as kernel:
        size, b = kernel.sizes, kernel.buffers
        work, room, R = b["work"], size["room"], heads.share
        vectors = heads.width // L
        with kernel.units() as unit:
            a = _Attention(kernel, heads, unit)
            base = T.bind(unit * (room * R))
            with T.serial(0, size["s"]) as query:
                low, high = a.range_of(query)
                start = T.bind(low // L * L)
                stop = T.bind((high + (L - 1)) // L * L)
                q = [
                    [v.load(b["q"], a.at("q", a.head * R + r, query) + i * L) for i in range(vectors)] for r in range(R)
                ]
                with T.serial(start, high) as t:
                    keys = a.keys.vectors(T.bind(a.at("k", a.head, t)), 0, vectors)
                    for r in range(R):
                        total = T.bind(q[r][0] * keys[0])
                        for i in range(1, vectors):
                            total = v.fma(q[r][i], keys[i], total)
                        T.buffer_store(work, v.add_lanes(total), [base + r * room + t])
                with T.serial(high, stop) as t:
                    for r in range(R):
                        T.buffer_store(work, T.float32(0), [base + r * room + t])
                factors = kernel.registers(R)
                with T.serial(0, R) as r:
                    head = T.bind(a.head * R + r)
                    T.buffer_store(factors, a.softmax(T.bind(base + r * room), head, query, start, stop), [r])
                _few_values(kernel, a, query, base, low, high, factors)
    return kernel.function()


def _few_values(kernel: Kernel, a: _Attention, query: Any, base: Any, low: Any, high: Any, factors: Any) -> None:
    v, R = kernel.v, a.h.share
    T, L, room, b = v.T, v.L, kernel.sizes["room"], kernel.buffers
    vectors = a.h.value_width // L
    wide = max(n for n in range(1, vectors + 1) if vectors % n == 0 and (n * R <= 24 or n == 1))
    for chunk in range(vectors // wide):
        sums = kernel.registers(R * wide * L)
        for i in range(R * wide):
            v.store(sums, i * L, v.spread(0.0))
        with T.serial(low, high) as t:
            values = a.values.vectors(T.bind(a.at("v", a.head, t)), chunk * wide, wide)
            for r in range(R):
                p = T.bind(T.broadcast(b["work"][base + r * room + t], L))
                for n in range(wide):
                    place = (r * wide + n) * L
                    v.store(sums, place, v.fma(p, values[n], v.load(sums, place)))
        for r in range(R):
            at = T.bind(a.at("y", a.head * R + r, query))
            for n in range(wide):
                value = T.bind(v.load(sums, (r * wide + n) * L) * T.broadcast(factors[r], L))
                v.store(b["y"], at + (chunk * wide + n) * L, value)


def rotate(isa: Isa, name: str, width: int, rotated: int, interleaved: bool, append: bool) -> Any:
    """Rotates the first `rotated` channels of heads by angles of a table, and copies the others (all, if it is 0).

    ``(a, b) -> (a cos - b sin, a sin + b cos)`` on channels i and ``i + rotated / 2``, or on neighbours if interleaved.
    Units are (batch, place in the text). With `append` a head is written at its position, as into a cache, else at its
    place.
    """
    v = Vectors(isa)
    T, L = v.T, v.L
    pointers = {"x": "float32", "y": "float32", "cos": "float32", "sin": "float32", "positions": "int64"}
    integers = ("heads", "s", "pb", "xb", "xh", "xs", "yb", "yh", "ys")
    with Kernel(name, v, pointers, integers) as kernel:
        size, b, half = kernel.sizes, kernel.buffers, rotated // 2
        with kernel.units() as unit:
            batch, s = T.bind(unit // size["s"]), T.bind(unit % size["s"])
            position = T.bind(T.cast(b["positions"][batch * size["pb"] + s], "int32"))
            angle = T.bind(position * half)
            with T.serial(0, size["heads"]) as head:
                x = T.bind(batch * size["xb"] + head * size["xh"] + s * size["xs"])
                y = T.bind(batch * size["yb"] + head * size["yh"] + (position if append else s) * size["ys"])
                step = L if not interleaved else 1
                for i in range(0, half - half % step, step):
                    _rotate_one(kernel, x, y, angle, i, half, step, interleaved)
                for i in range(half - half % step, half):
                    _rotate_one(kernel, x, y, angle, i, half, 1, interleaved)
                with T.serial(rotated, width) as i:
                    T.buffer_store(b["y"], b["x"][x + i], [y + i])
    return kernel.function()


def _rotate_one(kernel: Kernel, x: Any, y: Any, angle: Any, i: int, half: int, lanes: int, interleaved: bool) -> None:
    v, b = kernel.v, kernel.buffers
    T = v.T
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)

    def get(buffer: Any, at: Any) -> Any:
        return v.load(buffer, at, lanes) if lanes > 1 else T.bind(buffer[at])

    def put(at: Any, value: Any) -> None:
        if lanes > 1:
            v.store(b["y"], at, value, lanes)
        else:
            T.buffer_store(b["y"], value, [at])

    p, q, cos, sin = get(b["x"], x + first), get(b["x"], x + second), get(b["cos"], angle + i), get(b["sin"], angle + i)
    put(y + first, T.bind(p * cos - q * sin))
    put(y + second, T.bind(p * sin + q * cos))
