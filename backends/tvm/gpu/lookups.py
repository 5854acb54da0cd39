"""GPU kernels that read or write numbers by indices. An index counts from the end if it is negative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qc.backends.tvm.c_loops import UPDATES
from qc.backends.tvm.gpu.expressions import parse
from qc.backends.tvm.gpu.threads import Threads
from qc.backends.tvm.gpu.weights import Words

__all__ = ["decode_rows", "gather", "gather_elements", "gather_nd", "scatter_elements", "scatter_nd"]


def gather(name: str, kind: str) -> Any:
    """``y[o, j, i] = x[o, index[j], i]``."""
    with Threads(name, _pointers(kind), ("outer", "n", "count", "inner")) as k:
        s = k.sizes
        with k.elements(s["outer"] * s["count"] * s["inner"]) as i:
            o, j, c = k.split(i, [s["outer"], s["count"], s["inner"]])
            index = _index(k, j, s["n"])
            k.put("y", i, k.get("x", (o * s["n"] + index) * s["inner"] + c))
    return k.function()


def gather_nd(name: str, kind: str, depth: int) -> Any:
    """``y[j, i] = x[index[j, 0], index[j, 1], ..., i]``."""
    sizes = [f"n{a}" for a in range(depth)]
    with Threads(name, _pointers(kind), [*sizes, "count", "width"]) as k:
        s = k.sizes
        with k.elements(s["count"] * s["width"]) as i:
            j, c = k.split(i, [s["count"], s["width"]])
            k.put("y", i, k.get("x", _slice(k, j, sizes) * s["width"] + c))
    return k.function()


def scatter_nd(name: str, kind: str, step: str, depth: int) -> Any:
    """``y[index[j, 0], index[j, 1], ..., i]`` takes ``x[j, i]`` in, for one j after the other; a thread for each i."""
    sizes = [f"n{a}" for a in range(depth)]
    with Threads(name, _pointers(kind), [*sizes, "count", "width"]) as k:
        s = k.sizes
        with k.elements(s["width"]) as c, k.T.serial(0, s["count"]) as j:
            _update(k, step, _slice(k, j, sizes) * s["width"] + c, j * s["width"] + c)
    return k.function()


def decode_rows(name: str, words: Words, rows: int, columns: int) -> Any:
    """Rows of a quantized weight as floats."""
    pointers = {**words.pointers, "index": "int32", "y": "float32", "status": "int32"}
    with Threads(name, pointers, ("count",)) as k:
        T, value = k.T, words.flat(k.get, rows, columns)
        with k.elements(k.sizes["count"] * columns) as i:
            j, c = k.split(i, [k.sizes["count"], T.int32(columns)])
            k.put("y", i, value(_index(k, j, T.int32(rows)), c))
    return k.function()


def gather_elements(name: str, kind: str, rank: int, axis: int) -> Any:
    """``y[i, j, ...] = x[i, index[i, j, ...], ...]``. Integers: the size of the axis, the shape of y, strides of x."""
    shape, strides = _names(rank)
    with Threads(name, _pointers(kind), ("size", *shape, *strides)) as k:
        s = k.sizes
        with k.elements(_product(k, shape)) as i:
            place = k.split(i, [s[n] for n in shape])
            place[axis] = _index(k, i, s["size"])
            k.put("y", i, k.get("x", _at(k, place, strides)))
    return k.function()


def scatter_elements(name: str, kind: str, step: str, rank: int, axis: int) -> Any:
    """``y[i, index[i, j, ...], ...]`` takes ``x[i, j, ...]`` in, in the order of the axis; a thread for all along it.

    Integers: the size of the axis, the shape of x, strides of y.
    """
    shape, strides = _names(rank)
    others = shape[:axis] + shape[axis + 1 :]
    with Threads(name, _pointers(kind), ("size", *shape, *strides)) as k:
        T, s = k.T, k.sizes
        with k.elements(_product(k, others)) as line, T.serial(0, s[shape[axis]]) as j:
            place = k.split(line, [s[n] for n in others])[: len(others)]
            place.insert(axis, j)
            i: Any = T.int32(0)
            for n, p in zip(shape, place, strict=True):
                i = i * s[n] + p
            i = T.bind(i)
            place[axis] = _index(k, i, s["size"])
            _update(k, step, _at(k, place, strides), i)
    return k.function()


def _pointers(kind: str) -> dict[str, str]:
    return {"x": kind, "index": "int32", "y": kind, "status": "int32"}


def _names(rank: int) -> tuple[list[str], list[str]]:
    return [f"n{a}" for a in range(rank)], [f"s{a}" for a in range(rank)]


def _product(k: Threads, names: Sequence[str]) -> Any:
    total: Any = k.T.int32(1)
    for n in names:
        total = total * k.sizes[n]
    return total


def _at(k: Threads, place: Sequence[Any], strides: Sequence[str]) -> Any:
    return k.T.bind(sum(p * k.sizes[stride] for p, stride in zip(place, strides, strict=True)))


def _index(k: Threads, i: Any, size: Any) -> Any:
    """The i-th index, which must lie on an axis of this size."""
    T, index = k.T, k.get("index", i)
    return k.checked(T.bind(T.if_then_else(index < 0, index + size, index)), size)


def _slice(k: Threads, j: Any, sizes: Sequence[str]) -> Any:
    """The number of the slice that the j-th tuple of indices names."""
    at: Any = k.T.int32(0)
    for axis, size in enumerate(sizes):
        at = at * k.sizes[size] + _index(k, j * len(sizes) + axis, k.sizes[size])
    return at


def _update(k: Threads, step: str, at: Any, i: Any) -> None:
    """Lets an element of y take one of x in, as one of `UPDATES` says."""
    at = k.T.bind(at)
    text = UPDATES[step].format(a="a", b="b")
    k.put("y", at, parse(text, {"a": k.get("y", at), "b": k.get("x", i)}))
