"""Products with quantized weights: bytes of weights times bytes of activations, or the exact float form.

The weight lies in records (`qc.backends.tvm.kernels.records`); a thread reads one sequential stream.

Integer form, in the order that makes it equal on every processor, bit for bit::

    t = float(sum(u * q) - z * sum(q)) * s_x[0]                      the first block of a group
    t = fma(float(sum(u * q) - z * sum(q)), s_x[b], t)              its other blocks, in order
    y = fma(t, s_w, y)     for each group, in order, starting at 0;  then bias, residual, activation

The level without fused products rounds each product too; its integers are the same.
"""

from __future__ import annotations

import functools
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.code_products import ExactProduct, Product
from qc.backends.tvm.kernels.code_tiles import TiledProduct
from qc.backends.tvm.kernels.epilogue import Epilogue
from qc.backends.tvm.kernels.records import Codes
from qc.backends.tvm.kernels.table_products import ExactTableProduct, TableProduct
from qc.backends.tvm.kernels.vectors import Kernel, Vectors

__all__ = ["exact_product", "integer_product", "quantize_rows"]


def quantize_rows(isa: Isa, name: str, block: int) -> Any:
    """``q = rint(x * 127 / max|x|)`` per block of columns; its scale ``max|x| / 127`` and the sum of its codes.

    Units are rows. Columns beyond ``k`` up to the next whole group of ``kp`` are zeros. Of a block, rows follow each
    other: ``q[kp / block, m, block]``, and as many scales and sums.
    """
    v = Vectors(isa)
    T, L = v.T, v.L
    pointers = {"x": "float32", "q": "int8", "s": "float32", "z": "int32"}
    with Kernel(name, v, pointers, ("m", "ld", "k", "kp")) as kernel:
        m, ld, k, kp = (kernel.sizes[n] for n in ("m", "ld", "k", "kp"))
        x, q, s, z = (kernel.buffers[n] for n in pointers)
        with kernel.units() as row, T.serial(0, kp // block) as b:
            place = T.bind(b * m + row)
            here = T.alloc_buffer((block,), "float32", scope="global")
            with T.If((b + 1) * block <= k):
                with T.Then():
                    for i in range(0, block, L):
                        v.store(here, i, v.load(x, row * ld + b * block + i))
                with T.Else(), T.serial(0, block) as i:
                    T.buffer_store(
                        here,
                        T.if_then_else(b * block + i < k, x[row * ld + b * block + i], T.float32(0)),
                        [i],
                    )
            parts = [v.load(here, i) for i in range(0, block, L)]
            top = v.largest_lane(functools.reduce(v.maximum, [v.absolute(part) for part in parts]))
            inverse = v.spread(T.bind(T.Select(top > T.float32(0), T.float32(127) / top, T.float32(0))))
            codes = [T.bind(T.cast(v.nearest(part * inverse), v.i32())) for part in parts]
            for i, found in enumerate(codes):
                v.store(q, place * block + i * L, T.cast(found, f"int8x{L}"))
            T.buffer_store(s, top * T.float32(1 / 127), [place])
            total = functools.reduce(lambda a, b: T.bind(a + b), codes)
            T.buffer_store(z, v.intrinsic("llvm.vector.reduce.add", "int32", total), [place])
    return kernel.function()


def integer_product(
    isa: Isa, name: str, codes: Codes, bias: bool, residual: bool, activation: str, near: bool = False
) -> Any:
    """``y[m, n] = activation(sum_k x[m, k] w[n, k] + bias[n] + r[m, n])`` on quantized activations.

    Units are vectors of rows of the weight, ``lanes`` output channels each. A weight that is `near` is in a cache.
    Where the level has tiles, the last size says whether this processor and system do: 1 or 0.
    """
    v = Vectors(isa, near=near)
    pointers = {"q": "int8", "s": "float32", "z": "int32", "w": "uint8", **Epilogue.pointers(bias, residual)}
    integers = ("m", "n", "groups", "ldy", "ldr", *(["tiles"] if isa.tiles else []))
    with Kernel(name, v, pointers, integers) as kernel:
        product = TableProduct if codes.entry > 1 else TiledProduct if TiledProduct.takes(codes, isa) else Product
        product(v, kernel, codes, bias, residual, activation).emit()
    return kernel.function()


def exact_product(
    isa: Isa, name: str, codes: Codes, bias: bool, residual: bool, activation: str, near: bool = False
) -> Any:
    """``y[m, n] = activation(sum_k x[m, k] (u - z)[n, k] s[n, k] + bias[n] + r[m, n])`` on float activations.

    Where codes are looked up, ``u - z`` is an entry. Units are vectors of rows of the weight. Rows of x hold whole
    groups: `ldx` columns, zeros behind the last. A weight that is `near` is in a cache.
    """
    v = Vectors(isa, near=near)
    pointers = {"x": "float32", "w": "uint8", **Epilogue.pointers(bias, residual)}
    integers = ("m", "n", "groups", "ldx", "ldy", "ldr")
    with Kernel(name, v, pointers, integers) as kernel:
        product = ExactTableProduct if codes.entry > 1 else ExactProduct
        product(v, kernel, codes, bias, residual, activation).emit()
    return kernel.function()
