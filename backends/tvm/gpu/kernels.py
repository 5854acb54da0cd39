"""GPU kernels of our own schedule: maps, rows, rotation of heads and attention.

Parameters and meaning are those of the kernels for processors with the same names, `qc.backends.tvm.kernels`, with the
number of units as last integer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qc.backends.tvm.gpu.caches import Rows
from qc.backends.tvm.gpu.expressions import activate, parse
from qc.backends.tvm.gpu.threads import BLOCK, Threads
from qc.backends.tvm.kernels.attention import Heads
from qc.backends.tvm.kernels.vectors import LOWEST

__all__ = [
    "activation", "attend", "gated", "map_elements", "normalize", "reduce_axes",
    "rotate", "row_ranges", "softmax",
]  # fmt: skip

_NOTHING = -3.0e38


def map_elements(name: str, expression: str, kinds: Sequence[str], out: str, rank: int) -> Any:
    """``y = expression(a, b, ...)``: every operand, and y, has a stride per axis. ``i`` is the number of the element.

    Integers: the sizes, the strides of each operand and of y, and ``p`` and ``q``, which the expression may use.
    """
    names = "abcd"[: len(kinds)]
    sizes = [f"n{a}" for a in range(rank)]
    strides = {n: [f"{n}{a}" for a in range(rank)] for n in (*names, "y")}
    pointers = dict(zip((*names, "y"), (*kinds, out), strict=True))
    with Threads(name, pointers, [*sizes, *(s for held in strides.values() for s in held), "p", "q"]) as k:
        T, total = k.T, k.sizes[sizes[0]]
        for s in sizes[1:]:
            total = total * k.sizes[s]
        with k.elements(total) as i:
            place = k.split(i, [k.sizes[s] for s in sizes])

            def at(tensor: str) -> Any:
                found: Any = 0
                for index, stride in zip(place, strides[tensor], strict=True):
                    found = found + index * k.sizes[stride]
                return T.bind(found)

            held = {n: k.get(n, at(n)) for n in names} | {"i": i, "p": k.sizes["p"], "q": k.sizes["q"]}
            held["INFINITY"] = T.float32(-_NOTHING)  # not every language spells infinity
            value = parse(expression.format(**{n: n for n in (*names, "i", "p", "q")}), held)
            k.put("y", at("y"), value if str(value.ty) == out else T.cast(value, out))
    return k.function()


def activation(name: str, kind: str) -> Any:
    """An activation function on rows."""
    with Threads(name, {"x": "float32", "y": "float32"}, ("n", "ldx", "ldy", "units")) as k:
        n = k.sizes["n"]
        with k.elements(n * k.sizes["units"]) as i:
            row, column = k.split(i, [k.sizes["units"], n])
            k.put("y", row * k.sizes["ldy"] + column, activate(kind, k.get("x", row * k.sizes["ldx"] + column)))
    return k.function()


def gated(name: str, kind: str) -> Any:
    """``activation(x) * g`` on rows."""
    with Threads(name, dict.fromkeys("xgy", "float32"), ("n", "ldx", "ldg", "ldy", "units")) as k:
        n = k.sizes["n"]
        with k.elements(n * k.sizes["units"]) as i:
            row, column = k.split(i, [k.sizes["units"], n])
            x, g = (k.get(p, row * k.sizes[f"ld{p}"] + column) for p in "xg")
            k.put("y", row * k.sizes["ldy"] + column, activate(kind, x) * g)
    return k.function()


def _sum(k: Threads, thread: Any, n: Any, get: Callable[[Any], Any]) -> Any:
    total = k.own(1)
    k.set(total, 0, k.T.float32(0))
    with k.strided(thread, n) as i:
        k.set(total, 0, total[0] + get(i))
    return k.fold(thread, total[0], lambda a, b: a + b)


def normalize(name: str, kind: str, weight: bool, bias: bool) -> Any:
    """RMS or layer normalization; a block for each row."""
    pointers = {"x": "float32", "y": "float32", "eps": "float32"}
    pointers |= {n: "float32" for n, used in (("weight", weight), ("bias", bias)) if used}
    with Threads(name, pointers, ("n", "ldx", "ldy", "units")) as k:
        T, n = k.T, k.sizes["n"]
        with k.blocks(k.sizes["units"]) as (row, thread):
            start = T.bind(row * k.sizes["ldx"])
            mean: Any = T.float32(0)
            if kind == "layer":
                mean = T.bind(_sum(k, thread, n, lambda i: k.get("x", start + i)) / T.cast(n, "float32"))

            def centred(i: Any) -> Any:
                return T.bind(k.get("x", start + i) - mean)

            def squared(i: Any) -> Any:
                x = centred(i)
                return x * x

            variance = _sum(k, thread, n, squared) / T.cast(n, "float32")
            factor = T.bind(T.float32(1) / T.sqrt(variance + k.get("eps", 0)))
            with k.strided(thread, n) as i:
                value = centred(i) * factor
                value = value * k.get("weight", i) if weight else value
                value = value + k.get("bias", i) if bias else value
                k.put("y", row * k.sizes["ldy"] + i, value)
    return k.function()


def softmax(name: str) -> Any:
    """``exp(x - max x) / sum``; a block for each row."""
    with Threads(name, {"x": "float32", "y": "float32"}, ("n", "ldx", "ldy", "units")) as k:
        T, n = k.T, k.sizes["n"]
        with k.blocks(k.sizes["units"]) as (row, thread):
            start = T.bind(row * k.sizes["ldx"])
            top = k.own(1)
            k.set(top, 0, T.float32(LOWEST))
            with k.strided(thread, n) as i:
                k.set(top, 0, T.max(top[0], k.get("x", start + i)))
            largest = k.fold(thread, top[0], T.max)

            def power(i: Any) -> Any:
                return T.exp(k.get("x", start + i) - largest)

            total = _sum(k, thread, n, power)
            with k.strided(thread, n) as i:
                k.put("y", row * k.sizes["ldy"] + i, power(i) / total)
    return k.function()


def row_ranges(name: str) -> Any:
    """The smallest and the largest entry of each row; a block for each."""
    with Threads(name, dict.fromkeys(("x", "low", "high"), "float32"), ("ld", "n", "units")) as k:
        T, s = k.T, k.sizes
        with k.blocks(s["units"]) as (row, thread):
            start, ends = T.bind(row * s["ld"]), k.own(2)
            for slot in range(2):
                k.set(ends, slot, k.get("x", start))
            with k.strided(thread, s["n"]) as i:
                x = k.get("x", start + i)
                k.set(ends, 0, T.min(ends[0], x))
                k.set(ends, 1, T.max(ends[1], x))
            low, high = k.fold(thread, ends[0], T.min), k.fold(thread, ends[1], T.max)
            with T.If(thread == 0), T.Then():
                k.put("low", row, low)
                k.put("high", row, high)
    return k.function()


_REDUCE: dict[str, tuple[float, Callable[[Any, Any, Any], Any]]] = {
    "ReduceSum": (0.0, lambda x, a, b: a + b),
    "ReduceMean": (0.0, lambda x, a, b: a + b),
    "ReduceL2": (0.0, lambda x, a, b: a + b),
    "ReduceSumSquare": (0.0, lambda x, a, b: a + b),
    "ReduceProd": (1.0, lambda x, a, b: a * b),
    "ReduceMax": (-3.4028234e38, lambda x, a, b: x.Max(a, b)),
    "ReduceMin": (3.4028234e38, lambda x, a, b: x.Min(a, b)),
}


def reduce_axes(name: str, kind: str, dtype: str, kept: int, rank: int) -> Any:
    """One number of the axes behind the first `kept`; a block for each. Integers: sizes and strides of x."""
    names = [f"n{a}" for a in range(rank)], [f"s{a}" for a in range(rank)]
    start, combine = _REDUCE[kind]
    if dtype == "int32":
        start = max(-(1 << 31), min((1 << 31) - 1, int(start)))
    with Threads(name, {"x": dtype, "y": dtype}, [*names[0], *names[1], "units"]) as k:
        T = k.T
        sizes, strides = ([k.sizes[n] for n in held] for held in names)
        with k.blocks(k.sizes["units"]) as (block, thread):
            base: Any = T.int32(0)
            if kept:
                for index, stride in zip(k.split(block, sizes[:kept]), strides[:kept], strict=True):
                    base = base + index * stride
            base = T.bind(base)
            count: Any = T.int32(1)
            for size in sizes[kept:]:
                count = count * size
            count = T.bind(count)
            total = k.own(1, dtype)
            k.set(total, 0, k.x.const(start, dtype))
            with k.strided(thread, count) as i:
                at: Any = base
                if kept < rank:
                    for index, stride in zip(k.split(i, sizes[kept:]), strides[kept:], strict=True):
                        at = at + index * stride
                x = k.get("x", at)
                x = T.bind(x * x) if kind in ("ReduceL2", "ReduceSumSquare") else x
                k.set(total, 0, combine(k.x, total[0], x))
            found = k.fold(thread, total[0], lambda a, b: combine(k.x, a, b), dtype)
            if kind == "ReduceMean" and dtype == "int32":
                found = T.truncdiv(found, T.max(count, 1))
            elif kind == "ReduceMean":
                found = found / T.cast(count, "float32")
            elif kind == "ReduceL2" and dtype == "int32":
                root = T.bind(T.cast(T.sqrt(T.cast(found, "float32")), "int32"))
                found = root - T.cast(root * root > found, "int32")  # a float has not all digits of the square
            elif kind == "ReduceL2":
                found = T.sqrt(found)
            with T.If(thread == 0), T.Then():
                k.put("y", block, found)
    return k.function()


def rotate(name: str, width: int, rotated: int, interleaved: bool, append: bool) -> Any:
    """Rotates heads by angles of a table, or copies them; with `append` to their positions in a cache.

    A thread for each channel; the position of place i of text b is ``positions[b * pb + i]``.
    """
    pointers = {"x": "float32", "y": "float32", "cos": "float32", "sin": "float32", "positions": "int32"}
    pointers["status"] = "int32"
    integers = ("heads", "s", "pb", "xb", "xh", "xs", "yb", "yh", "ys", "rows", "units")
    with Threads(name, pointers, integers) as k:
        T, s, half = k.T, k.sizes, rotated // 2
        with k.elements(s["units"] * s["heads"] * width) as i:
            unit, head, c = k.split(i, [s["units"], s["heads"], T.int32(width)])
            batch, place = k.split(unit, [s["units"], s["s"]])
            position = k.checked(k.get("positions", batch * s["pb"] + place), s["rows"])
            x = T.bind(batch * s["xb"] + head * s["xh"] + place * s["xs"])
            y = T.bind(batch * s["yb"] + head * s["yh"] + (position if append else place) * s["ys"])
            if not rotated:
                k.put("y", y + c, k.get("x", x + c))
            else:
                angle = T.truncdiv(c, 2) if interleaved else T.truncmod(c, half)
                second = (T.truncmod(c, 2) == 1) if interleaved else c >= half
                other = T.if_then_else(second, c - 1, c + 1) if interleaved else T.truncmod(c + half, rotated)
                with T.If(c < rotated):
                    with T.Then():
                        cos, sin = (k.get(n, position * half + angle) for n in ("cos", "sin"))
                        turned = T.if_then_else(second, sin, -sin)
                        k.put("y", y + c, k.get("x", x + c) * cos + k.get("x", x + other) * turned)
                    with T.Else():
                        k.put("y", y + c, k.get("x", x + c))
    return k.function()


_STRIDES = tuple(f"{tensor}{axis}" for tensor in "qkvy" for axis in "bhs")


def attend(name: str, h: Heads) -> Any:
    """Attention of one query of one head, by a block: keys in tiles of `BLOCK`, their softmax kept up as they come.

    With scores s of a tile, m the largest so far and m' with it, ``l = l e^(m - m') + sum e^(s - m')`` and
    ``a = a e^(m - m') + sum e^(s - m') v``; the result is ``a / l``: "Online normalizer calculation for softmax"
    (Milakov, Gimelshein), equations 5-7. A thread scores one key of a tile, and holds every `BLOCK`-th channel of a.
    """
    held = "uint32" if h.cells.narrow else "float32"
    pointers = {"q": "float32", "k": held, "v": held, "y": "float32", "past": "int32"}
    pointers |= {"bias": "float32"} if h.bias else {}
    integers = ["kvheads", "s", "t", *_STRIDES, *(("bb", "bh", "bs") if h.bias else ()), "units"]
    each = -(-h.value_width // BLOCK)
    with Threads(name, pointers, integers) as k:
        T, s = k.T, k.sizes
        heads = s["kvheads"] * h.share
        with k.blocks(s["s"], heads * s["units"]) as (query, place, thread):
            batch, head = k.split(place, [s["units"], heads])
            kv = T.bind(T.truncdiv(head, h.share))
            q = T.bind(batch * s["qb"] + head * s["qh"] + query * s["qs"])
            keys = T.bind(batch * s["kb"] + kv * s["kh"])
            values = T.bind(batch * s["vb"] + kv * s["vh"])
            high = T.bind(T.min(k.get("past", batch) + query + 1, s["t"])) if h.causal else s["t"]
            low = T.bind(T.max(high - h.window, 0)) if h.window else T.int32(0)
            k_rows, v_rows = Rows(k, h.cells, "k", h.width), Rows(k, h.cells, "v", h.value_width)
            row, scores, powers = k.common(h.width), k.common(BLOCK), k.common(BLOCK)
            state, sums, score = k.own(2), k.own(each), k.own(1)
            with k.strided(thread, T.int32(h.width)) as c:
                k.set(row, c, k.get("q", q + c))
            k.set(state, 0, T.float32(_NOTHING))  # the largest score
            k.set(state, 1, T.float32(0))  # the sum of powers
            for n in range(each):
                k.set(sums, n, T.float32(0))
            k.wait()
            first = T.bind(T.truncdiv(low, BLOCK))
            tiles = T.bind(T.max(T.truncdiv(high + (BLOCK - 1), BLOCK) - first, 0))
            with T.serial(0, tiles) as tile:
                start = T.bind((first + tile) * BLOCK)
                key = T.bind(start + thread)
                seen = k.x.And(key >= low, key < high)
                k.set(score, 0, T.float32(_NOTHING))
                with T.If(seen), T.Then():
                    k.set(score, 0, T.float32(0))
                    at = T.bind(keys + key * s["ks"])
                    k_rows.each(at, lambda c, x: k.set(score, 0, score[0] + row[c] * x))
                    k.set(score, 0, score[0] * T.float32(h.scale))
                    if h.softcap:
                        cap = T.float32(h.softcap)
                        k.set(score, 0, cap * activate("tanh", T.bind(score[0] / cap)))
                    if h.bias:
                        bias = k.get("bias", batch * s["bb"] + head * s["bh"] + query * s["bs"] + key)
                        k.set(score, 0, T.max(score[0] + bias, T.float32(_NOTHING)))
                k.set(scores, thread, score[0])
                k.wait()
                top = k.own(1)
                k.set(top, 0, state[0])
                with T.serial(0, BLOCK) as j:
                    k.set(top, 0, T.max(top[0], scores[j]))
                shown = score[0] > T.float32(_NOTHING)
                k.set(powers, thread, T.if_then_else(shown, T.exp(score[0] - top[0]), T.float32(0)))
                k.wait()
                kept = T.bind(T.exp(state[0] - top[0]))
                k.set(state, 0, top[0])
                k.set(state, 1, state[1] * kept)
                for n in range(each):
                    k.set(sums, n, sums[n] * kept)
                with T.serial(0, T.min(high - start, BLOCK)) as j:
                    k.set(state, 1, state[1] + powers[j])
                    for n in range(each):
                        c = thread + n * BLOCK
                        with T.If(c < h.value_width), T.Then():
                            value = v_rows.channel(T.bind(values + (start + j) * s["vs"]), c)
                            k.set(sums, n, sums[n] + powers[j] * value)
                k.wait()
            for n in range(each):
                c = thread + n * BLOCK
                with T.If(c < h.value_width), T.Then():
                    at = batch * s["yb"] + head * s["yh"] + query * s["ys"] + c
                    k.put("y", at, sums[n] / T.max(state[1], T.float32(1e-30)))
    return k.function()
