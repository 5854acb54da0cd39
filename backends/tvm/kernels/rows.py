"""Kernels on rows: normalization, softmax, gated activations, and look-ups in tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.vectors import LOWEST, Kernel, Vectors

__all__ = ["across", "activation", "gated", "normalize", "softmax"]


def normalize(isa: Isa, name: str, kind: str, weight: bool, bias: bool) -> Any:
    """``rms``: ``x / sqrt(mean(x^2) + eps)``; ``layer``: the mean is subtracted first; times weight, plus bias.

    Units are rows. The variance is that of the centred row: two passes, as accurate as float32 allows.
    """
    v = Vectors(isa)
    T, L = v.T, v.L
    pointers = {"x": "float32", "y": "float32", "eps": "float32"}
    pointers |= {n: "float32" for n, used in (("weight", weight), ("bias", bias)) if used}
    with Kernel(name, v, pointers, ("n", "ldx", "ldy")) as kernel:
        n, ldx, ldy = (kernel.sizes[s] for s in ("n", "ldx", "ldy"))
        b = kernel.buffers
        with kernel.units() as row:
            whole = T.bind(n // L)
            mean: Any = T.float32(0)
            count = T.bind(T.cast(n, "float32"))
            if kind == "layer":
                mean = T.bind(_sum(kernel, whole, n, lambda i, lanes: _get(v, b["x"], row * ldx + i, lanes)) / count)

            def squared(i: Any, lanes: int) -> Any:
                x = _get(v, b["x"], row * ldx + i, lanes)
                x = T.bind(x - _wide(v, mean, lanes)) if kind == "layer" else x
                return T.bind(x * x)

            variance = T.bind(_sum(kernel, whole, n, squared) / count)
            inverse = T.bind(T.float32(1) / v.intrinsic("llvm.sqrt", "float32", variance + b["eps"][0]))

            def scaled(i: Any, lanes: int) -> Any:
                x = _get(v, b["x"], row * ldx + i, lanes)
                x = T.bind(x - _wide(v, mean, lanes)) if kind == "layer" else x
                x = T.bind(x * _wide(v, inverse, lanes))
                if weight:
                    x = T.bind(x * _get(v, b["weight"], i, lanes))
                if bias:
                    x = T.bind(x + _get(v, b["bias"], i, lanes))
                return x

            _map(kernel, whole, n, b["y"], row * ldy, scaled)
    return kernel.function()


def softmax(isa: Isa, name: str) -> Any:
    """``exp(x - max x) / sum``; units are rows."""
    v = Vectors(isa)
    T, L = v.T, v.L
    with Kernel(name, v, {"x": "float32", "y": "float32"}, ("n", "ldx", "ldy")) as kernel:
        n, ldx, ldy = (kernel.sizes[s] for s in ("n", "ldx", "ldy"))
        x, y = kernel.buffers["x"], kernel.buffers["y"]
        with kernel.units() as row:
            vectors = T.bind((n + L - 1) // L)
            top, tail, sums = (kernel.registers(L) for _ in range(3))
            v.store(top, 0, v.spread(LOWEST))
            v.store(sums, 0, v.spread(0.0))

            def get(i: Any, buffer: Any, base: Any) -> Any:
                """The vector at i, the lowest number beyond the row."""
                with T.If((i + 1) * L <= n):
                    with T.Then():
                        v.store(tail, 0, v.load(buffer, base + i * L))
                    with T.Else():
                        v.store(tail, 0, v.spread(LOWEST))
                        with T.serial(0, n - i * L) as j:
                            T.buffer_store(tail, buffer[base + i * L + j], [j])
                return v.load(tail, 0)

            with T.serial(0, vectors) as i:
                v.store(top, 0, v.maximum(v.load(top, 0), get(i, x, row * ldx)))
            m = v.largest_lane(v.load(top, 0))
            with T.serial(0, vectors) as i:
                shifted = T.bind(get(i, x, row * ldx) - T.broadcast(m, L))
                # exp() clamps at -87: what a mask put far below must be nothing, not e^-87
                e = T.bind(T.Select(shifted > v.spread(-87.0), v.exp(shifted), v.spread(0.0)))
                with T.If((i + 1) * L <= n):
                    with T.Then():
                        v.store(sums, 0, v.load(sums, 0) + e)
                        v.store(y, row * ldy + i * L, e)
                    with T.Else():
                        v.store(tail, 0, e)
                        with T.serial(0, n - i * L) as j:
                            T.buffer_store(y, tail[j], [row * ldy + i * L + j])
                            T.buffer_store(sums, sums[0] + tail[j], [0])
            inverse = T.bind(T.float32(1) / v.add_lanes(v.load(sums, 0)))
            _map(
                kernel, T.bind(n // L), n, y, row * ldy,
                lambda i, lanes: T.bind(_get(v, y, row * ldy + i, lanes) * _wide(v, inverse, lanes)),
            )  # fmt: skip
    return kernel.function()


def activation(isa: Isa, name: str, kind: str) -> Any:
    """An activation function on rows, which may be written where they are read."""
    v = Vectors(isa)
    with Kernel(name, v, {"x": "float32", "y": "float32"}, ("n", "ldx", "ldy"), overwrites=True) as kernel:
        n, ldx, ldy = (kernel.sizes[s] for s in ("n", "ldx", "ldy"))
        x, y = kernel.buffers["x"], kernel.buffers["y"]
        with kernel.units() as row:
            across(kernel, n, lambda get, put: put(y, row * ldy, v.activate(kind, get(x, row * ldx))))
    return kernel.function()


def gated(isa: Isa, name: str, kind: str) -> Any:
    """``activation(x) * g`` on rows."""
    v = Vectors(isa)
    with Kernel(name, v, {"x": "float32", "g": "float32", "y": "float32"}, ("n", "ldx", "ldg", "ldy")) as kernel:
        n, ldx, ldg, ldy = (kernel.sizes[s] for s in ("n", "ldx", "ldg", "ldy"))
        b = kernel.buffers
        with kernel.units() as row:

            def multiply(get: Callable[..., Any], put: Callable[..., None]) -> None:
                value = v.activate(kind, get(b["x"], row * ldx))
                put(b["y"], row * ldy, v.T.bind(value * get(b["g"], row * ldg)))

            across(kernel, n, multiply)
    return kernel.function()


def _get(v: Vectors, buffer: Any, at: Any, lanes: int) -> Any:
    return v.load(buffer, at) if lanes > 1 else v.T.bind(buffer[at])


def _wide(v: Vectors, value: Any, lanes: int) -> Any:
    return v.T.broadcast(value, v.L) if lanes > 1 else value


def _sum(kernel: Kernel, whole: Any, n: Any, get: Callable[[Any, int], Any]) -> Any:
    """The sum of a row: whole vectors, then what is left."""
    v = kernel.v
    T, L = v.T, v.L
    lanes, rest = kernel.registers(L), kernel.registers(1)
    v.store(lanes, 0, v.spread(0.0))
    T.buffer_store(rest, T.float32(0), [0])
    with T.serial(0, whole) as i:
        v.store(lanes, 0, v.load(lanes, 0) + get(i * L, L))
    with T.serial(whole * L, n) as i:
        T.buffer_store(rest, rest[0] + get(i, 1), [0])
    return T.bind(v.add_lanes(v.load(lanes, 0)) + rest[0])


def _map(kernel: Kernel, whole: Any, n: Any, y: Any, base: Any, get: Callable[[Any, int], Any]) -> None:
    v = kernel.v
    T, L = v.T, v.L
    with T.serial(0, whole) as i:
        v.store(y, base + i * L, get(i * L, L))
    with T.serial(whole * L, n) as i:
        T.buffer_store(y, get(i, 1), [base + i])


def across(kernel: Kernel, n: Any, body: Callable[[Callable[..., Any], Callable[..., None]], None]) -> None:
    """Calls ``body(get, put)`` for each vector of rows of n numbers; what is left over is padded to one.

    ``get(buffer, start)`` reads the vector of the row that begins there, ``put(buffer, start, value)`` writes it.
    """
    v = kernel.v
    T, L = v.T, v.L
    whole = T.bind(n // L)
    with T.serial(0, whole) as i:
        body(
            lambda buffer, start: v.load(buffer, start + i * L),
            lambda buffer, start, value: v.store(buffer, start + i * L, value),
        )
    with T.If(whole * L < n), T.Then():

        def get(buffer: Any, start: Any) -> Any:
            pad = kernel.registers(L)
            v.store(pad, 0, v.spread(0.0))
            with T.serial(0, n - whole * L) as j:
                T.buffer_store(pad, buffer[start + whole * L + j], [j])
            return v.load(pad, 0)

        def put(buffer: Any, start: Any, value: Any) -> None:
            pad = kernel.registers(L)
            v.store(pad, 0, value)
            with T.serial(0, n - whole * L) as j:
                T.buffer_store(buffer, pad[j], [start + whole * L + j])

        body(get, put)
