"""GPU kernels that look numbers up by indices. An index counts from the end if it is negative."""

from __future__ import annotations

from typing import Any

from qc.backends.tvm.gpu.threads import Threads
from qc.backends.tvm.gpu.weights import Words

__all__ = ["decode_rows", "gather", "gather_elements", "gather_nd"]


def gather(name: str, kind: str) -> Any:
    """``y[o, j, i] = x[o, index[j], i]``."""
    pointers = {"x": kind, "index": "int32", "y": kind, "status": "int32"}
    with Threads(name, pointers, ("outer", "n", "count", "inner")) as k:
        T, s = k.T, k.sizes
        with k.elements(s["outer"] * s["count"] * s["inner"]) as i:
            o, j, c = k.split(i, [s["outer"], s["count"], s["inner"]])
            index = k.get("index", j)
            index = k.checked(T.bind(T.if_then_else(index < 0, index + s["n"], index)), s["n"])
            k.put("y", i, k.get("x", (o * s["n"] + index) * s["inner"] + c))
    return k.function()


def gather_nd(name: str, kind: str, depth: int) -> Any:
    """``y[j, i] = x[index[j, 0], index[j, 1], ..., i]``."""
    sizes = [f"n{a}" for a in range(depth)]
    with Threads(name, {"x": kind, "index": "int32", "y": kind, "status": "int32"}, [*sizes, "count", "width"]) as k:
        T, s = k.T, k.sizes
        with k.elements(s["count"] * s["width"]) as i:
            j, c = k.split(i, [s["count"], s["width"]])
            at: Any = T.int32(0)
            for axis, size in enumerate(sizes):
                index = k.get("index", j * depth + axis)
                at = at * s[size] + k.checked(T.bind(T.if_then_else(index < 0, index + s[size], index)), s[size])
            k.put("y", i, k.get("x", at * s["width"] + c))
    return k.function()


def decode_rows(name: str, words: Words, rows: int, columns: int) -> Any:
    """Rows of a quantized weight as floats."""
    pointers = {**words.pointers, "index": "int32", "y": "float32", "status": "int32"}
    with Threads(name, pointers, ("count",)) as k:
        T, value = k.T, words.flat(k.get, rows, columns)
        with k.elements(k.sizes["count"] * columns) as i:
            j, c = k.split(i, [k.sizes["count"], T.int32(columns)])
            index = k.get("index", j)
            row = k.checked(T.bind(T.if_then_else(index < 0, index + rows, index)), T.int32(rows))
            k.put("y", i, value(row, c))
    return k.function()


def gather_elements(name: str, kind: str, rank: int, axis: int) -> Any:
    """``y[i, j, ...] = x[i, index[i, j, ...], ...]``. Integers: the size of the axis, the shape of y, strides of x."""
    shape, strides = [f"n{a}" for a in range(rank)], [f"s{a}" for a in range(rank)]
    pointers = {"x": kind, "index": "int32", "y": kind, "status": "int32"}
    with Threads(name, pointers, ("size", *shape, *strides)) as k:
        T, s = k.T, k.sizes
        total = T.int32(1)
        for n in shape:
            total = total * s[n]
        with k.elements(total) as i:
            place = k.split(i, [s[n] for n in shape])
            index = k.get("index", i)
            place[axis] = k.checked(T.bind(T.if_then_else(index < 0, index + s["size"], index)), s["size"])
            k.put("y", i, k.get("x", sum(p * s[stride] for p, stride in zip(place, strides, strict=True))))
    return k.function()
