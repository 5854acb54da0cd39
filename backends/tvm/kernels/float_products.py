"""Products in float: packed constant weights, perhaps stored in half the bits, and products of two computed values."""

from __future__ import annotations

from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.epilogue import Epilogue
from qc.backends.tvm.kernels.vectors import Kernel, Vectors

__all__ = ["float_product"]

_UNROLL = 4
"""Columns of x per step for a single row, each with sums of its own: one sum would wait for itself."""

STORED = {"f32": ("float32", 1), "bf16": ("uint16", 1), "f16": ("float16", 1)}


def float_product(
    isa: Isa, name: str, stored: str, columns: int, bias: bool, residual: bool, activation: str, near: bool = False
) -> Any:
    """``y[m, n] = activation(sum_k x[m, k] w[n, k] + bias[n] + r[m, n])``, the weight packed and read once per tile.

    The weight lies as ``[units, k, columns * lanes]``: a unit is `columns` vectors of output channels.
    Units are units of the weight. One that is `near` is in a cache.
    """
    v = Vectors(isa, near=near)
    T, L = v.T, v.L
    pointers = {"x": "float32", "w": STORED[stored][0], **Epilogue.pointers(bias, residual)}
    with Kernel(name, v, pointers, ("m", "n", "k", "ldx", "ldy", "ldr")) as kernel:
        m, k, ldx = (kernel.sizes[n] for n in ("m", "k", "ldx"))
        x, w = kernel.buffers["x"], kernel.buffers["w"]
        epilogue = Epilogue(kernel, bias, residual, activation)

        def weight(unit: Any, at: Any, r: int) -> Any:
            raw = v.load(w, (unit * k + at) * (columns * L) + r * L)
            if stored == "f16":
                return T.bind(T.cast(raw, v.f32()))
            if stored == "bf16":
                return T.bind(T.reinterpret(v.f32(), T.cast(raw, f"uint32x{L}") << T.broadcast(T.uint32(16), L)))
            return raw

        def step(unit: Any, row: Any, at: Any, rows: int, sums: Any, offset: int) -> None:
            weights = [weight(unit, at, r) for r in range(columns)]
            for i in range(rows):
                xb = T.bind(T.broadcast(x[(row + i) * ldx + at], L))
                for r in range(columns):
                    place = offset + (i * columns + r) * L
                    v.store(sums, place, v.fma(xb, weights[r], v.load(sums, place)))

        def tile(unit: Any, number: Any, row: Any, rows: int, ask: Any) -> None:
            copies = _UNROLL if rows == 1 else 1
            size = rows * columns * L
            sums = kernel.registers(copies * size)
            for i in range(copies * rows * columns):
                v.store(sums, i * L, v.spread(0.0))
            steps = T.bind(k // copies) if copies > 1 else k
            with T.serial(0, steps) as s:
                for c in range(copies):
                    step(unit, row, s * copies + c, rows, sums, c * size)
                if ask is not None:
                    ask(number, s)
                elif rows == 1:
                    v.stream(w, (unit * k + s * copies) * (columns * L), copies * columns * L)
            if copies > 1:
                with T.serial(steps * copies, k) as s:
                    step(unit, row, s, rows, sums, 0)
            totals = {}
            for i in range(rows):
                for r in range(columns):
                    total = v.load(sums, (i * columns + r) * L)
                    for c in range(1, copies):
                        total = T.bind(total + v.load(sums, c * size + (i * columns + r) * L))
                    totals[i, r] = total
            epilogue.store(T.bind(unit * columns * L), row, totals, columns)

        with kernel.units() as unit:
            done: Any = T.int32(0)
            rows = isa.tile[0]
            while rows >= 1:
                count = T.bind((m - done) // rows)
                ask = kernel.ahead(w, unit, k * (columns * L), count, k) if rows == isa.tile[0] else None
                with T.serial(0, count) as i:
                    tile(unit, i, done + i * rows, rows, ask)
                done = T.bind(done + count * rows)
                rows = rows // 2 if rows > 2 else rows - 1
            epilogue.finish(T.bind(unit * columns * L), columns * L)
    return kernel.function()
