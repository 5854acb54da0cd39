"""Words of the kernel generators: vectors of one instruction set, as expressions of TVM's TIR.

Every vector is bound to a name when it is made, so that it is computed once. Arrays on the stack are allocated with
scope ``global``: with a constant size LLVM turns them into registers, while ``local`` would become a heap allocation.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qc.backends.tvm.isa import Isa

__all__ = ["ERF", "ERF_BELOW", "LOWEST", "Kernel", "Vectors"]

LOWEST = -3.4028234663852886e38
"""The lowest number of float32, which some masks add: where all of a row have it, all count alike."""

if TYPE_CHECKING:
    from typing_extensions import Self

Expr = Any

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Polynomial of ``exp`` on [-ln 2 / 2, ln 2 / 2], of the Cephes library: relative error 2e-7."""

ERF = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
    -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
ERF_BELOW = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02,
)  # fmt: skip
"""``erf(x) = x p(x^2) / q(x^2)`` on [-4, 4], of the Eigen library; beyond, erf is 1 to seven digits."""


_LOOK_UP = {
    ("x86_64", 16): "llvm.x86.avx512.pshuf.b.512",
    ("x86_64", 8): "llvm.x86.avx2.pshuf.b",
    ("x86_64", 4): "llvm.x86.ssse3.pshuf.b.128",
    ("aarch64", 4): "llvm.aarch64.neon.tbl1",
}

_LINE, _PAGE = 64, 4096
"""Bytes of a cache line, and of a page."""

_BYTES = {"float32": 4, "int32": 4, "float16": 2, "uint16": 2, "uint8": 1}


class Vectors:
    """Vector expressions at one instruction set.

    Weights that are `near` are in a cache, as those that a loop reads in each turn: nothing is asked for ahead of them.
    """

    def __init__(self, isa: Isa, *, near: bool = False) -> None:
        from tvm.script.ir_builder import tirx

        self.isa, self.T, self.L, self.near = isa, tirx, isa.lanes, near

    def intrinsic(self, name: str, dtype: str, *arguments: Expr) -> Expr:
        """A call of an LLVM intrinsic, bound."""
        T = self.T
        call = T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *arguments, dtype=dtype)
        return T.bind(call)

    def f32(self, lanes: int | None = None) -> str:
        """The type of a vector of floats."""
        return f"float32x{lanes or self.L}"

    def i32(self, lanes: int | None = None) -> str:
        """The type of a vector of integers."""
        return f"int32x{lanes or self.L}"

    def load(self, buffer: Any, start: Expr, lanes: int | None = None) -> Expr:
        """``lanes`` consecutive elements."""
        if isinstance(buffer, list):
            buffer, start = buffer[start // self.L], 0
        return self.T.bind(buffer[self.T.ramp(start, 1, lanes or self.L)])

    def store(self, buffer: Any, start: Expr, value: Expr, lanes: int | None = None) -> None:
        """Writes consecutive elements."""
        if isinstance(buffer, list):
            buffer, start = buffer[start // self.L], 0
        self.T.buffer_store(buffer, value, [self.T.ramp(start, 1, lanes or self.L)])

    def spread(self, value: Expr, lanes: int | None = None) -> Expr:
        """One number in every lane."""
        if isinstance(value, float):
            value = self.T.float32(value)
        return self.T.broadcast(value, lanes or self.L)

    def prefetch(self, buffer: Any, index: Expr) -> None:
        """Asks for the cache line of an element that is read later. It need not exist."""
        T = self.T
        pointer, name = T.address_of(buffer[index]), T.llvm_lookup_intrinsic_id("llvm.prefetch")
        read, near, data = T.int32(0), T.int32(2), T.int32(1)
        T.evaluate(T.call_llvm_intrin(name, pointer, read, near, data, dtype="void"))

    def stream(self, buffer: Any, start: Expr, elements: int) -> None:
        """Asks for what lies a page behind `elements` that are read now, of a buffer that is read once and in order.

        Processors do that by themselves, but stop at the ends of pages: it makes decoding 1.35 times as fast.
        """
        if self.near:
            return
        size = _BYTES[str(buffer.dtype)]
        for line in range(0, elements * size, _LINE):
            self.prefetch(buffer, self.T.bind(start + (_PAGE + line) // size))

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """``a * b + c``, rounded once where the processor can."""
        if not self.isa.fma:
            return self.T.bind(a * b + c)
        return self.intrinsic("llvm.fma", self.f32(), a, b, c)

    def divide(self, a: Expr, b: Expr, inverse: Expr) -> Expr:
        """``a / b`` as a division rounds it; `inverse` is ``1 / b``, rounded, and no number is too small or too large.

        A division takes as long as ten sums. The product with the inverse lacks what is left of a, found without
        rounding (Markstein, IBM J. Res. Dev. 34, 1990): once to come within the last digit, once to round.
        """
        if not self.isa.fma:
            return self.T.bind(a / b)
        negative = self.T.bind(self.spread(0.0) - b)
        q = self.T.bind(a * inverse)
        for _ in range(2):
            q = self.fma(self.fma(q, negative, a), inverse, q)
        return q

    def maximum(self, a: Expr, b: Expr) -> Expr:
        """The larger number of each lane; no lane is NaN."""
        return self._choose(self.T.max, "llvm.maxnum", a, b)

    def minimum(self, a: Expr, b: Expr) -> Expr:
        """The smaller number of each lane; no lane is NaN."""
        return self._choose(self.T.min, "llvm.minnum", a, b)

    def _choose(self, compared: Callable[[Expr, Expr], Expr], name: str, a: Expr, b: Expr) -> Expr:
        """One instruction: on x86 of a comparison, whose NaN is that of the instruction, on arm of the intrinsic."""
        return self.T.bind(compared(a, b)) if self.isa.arch == "x86_64" else self.intrinsic(name, self.f32(), a, b)

    def absolute(self, a: Expr) -> Expr:
        """Absolute values."""
        return self.intrinsic("llvm.fabs", self.f32(), a)

    def nearest(self, a: Expr) -> Expr:
        """Rounded to integers, ties to even, still float."""
        return self.intrinsic("llvm.rint", self.f32(), a)

    def add_lanes(self, a: Expr) -> Expr:
        """The sum of all lanes."""
        return self.fold_lanes(operator.add, a)

    def fold_lanes(self, join: Callable[[Expr, Expr], Expr], a: Expr) -> Expr:
        """All lanes joined to one, halves with halves: one defined order on every processor."""
        width = self.L
        while width > 1:
            width //= 2
            low, high = (self.pick([a], range(i, i + width)) for i in (0, width))
            a = self.T.bind(join(low, high))
        return a

    def largest_lane(self, a: Expr) -> Expr:
        """The largest lane, for which arm has an instruction; LLVM makes of it a long chain on x86, lane by lane."""
        if self.isa.arch == "aarch64":
            return self.intrinsic("llvm.vector.reduce.fmax", "float32", a)
        return self.fold_lanes(self.T.max, a)

    def keep(self, value: Expr, dtype: str = "") -> Expr:
        """A vector behind a slot on the stack, which becomes a register.

        TVM copies pure expressions to wherever their name is used, which takes minutes where one is as deep as a
        polynomial of a polynomial. What was stored and loaded it leaves alone.
        """
        element, _, lanes = (dtype or self.f32()).partition("x")
        slot = self.T.alloc_buffer((int(lanes),), element, scope="global")
        self.store(slot, 0, value, int(lanes))
        return self.load(slot, 0, int(lanes))

    def polynomial(self, x: Expr, coefficients: Sequence[float]) -> Expr:
        """Horner's scheme, the highest power first."""
        p = self.spread(coefficients[0])
        for c in coefficients[1:]:
            p = self.fma(p, x, self.spread(c))
        return self.keep(p)

    def exp(self, x: Expr) -> Expr:
        """``e^x`` with a relative error of 2e-7; arguments beyond what float32 holds are clamped."""
        T = self.T
        x = self.keep(self.minimum(self.maximum(x, self.spread(-87.0)), self.spread(88.0)))
        n = self.keep(self.nearest(x * self.spread(1.4426950408889634)))
        r = self.keep(self.fma(n, self.spread(2.12194440e-4), self.fma(n, self.spread(-0.693359375), x)))
        p = self.fma(self.polynomial(r, _EXP), r * r, r + self.spread(1.0))
        power = (T.cast(n, self.i32()) + T.broadcast(T.int32(127), self.L)) << T.broadcast(T.int32(23), self.L)
        return self.keep(p * T.reinterpret(self.f32(), power))

    def sigmoid(self, x: Expr) -> Expr:
        """``1 / (1 + e^-x)``."""
        return self.keep(self.spread(1.0) / (self.spread(1.0) + self.exp(self.spread(0.0) - x)))

    def tanh(self, x: Expr) -> Expr:
        """``2 sigmoid(2 x) - 1``; absolute error 2e-7."""
        return self.T.bind(self.spread(2.0) * self.sigmoid(x + x) - self.spread(1.0))

    def erf(self, x: Expr) -> Expr:
        """The error function, relative error 5e-7."""
        x = self.keep(self.minimum(self.maximum(x, self.spread(-4.0)), self.spread(4.0)))
        z = self.keep(x * x)
        return self.keep(x * self.polynomial(z, ERF) / self.polynomial(z, ERF_BELOW))

    def dot(self, total: Expr, weights: Expr, activations: Expr) -> Expr:
        """Adds four byte products to each lane of `total`, exactly.

        Args:
            total: Integers, one per lane.
            weights: ``4 * lanes`` bytes: unsigned, at most 128 with ``maddubs``; below 128 with ``sdot``.
            activations: As many signed bytes.
        """
        T, isa, wide = self.T, self.isa, 4 * self.L
        if isa.dot == "vnni512":
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.512", self.i32(), total, weights, activations)
        if isa.dot == "maddubs":
            pairs = self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", weights, activations)
            ones = T.broadcast(T.int16(1), 16)
            return T.bind(total + self.intrinsic("llvm.x86.avx2.pmadd.wd", self.i32(), pairs, ones))
        if isa.dot == "sdot":
            return self.intrinsic(
                "llvm.aarch64.neon.sdot", self.i32(), total, T.reinterpret(f"int8x{wide}", weights), activations
            )
        if isa.dot == "usdot":
            return self.intrinsic("llvm.aarch64.neon.usdot", self.i32(), total, weights, activations)
        words = T.bind(T.reinterpret(self.i32(), weights))
        signed = T.bind(T.reinterpret(self.i32(), activations))
        for byte in range(4):
            w = (words >> T.broadcast(T.int32(8 * byte), self.L)) & T.broadcast(T.int32(255), self.L)
            x = (signed << T.broadcast(T.int32(24 - 8 * byte), self.L)) >> T.broadcast(T.int32(24), self.L)
            total = total + w * x
        return T.bind(total)

    def dot_bytes(self, total: Expr, weights: Expr, activations: Expr) -> Expr:
        """Like `dot`, for weights of all eight bits.

        ``maddubs`` adds pairs of products in 16 bits, which saturate; there a byte is cut into halves of four bits,
        whose sums of products fit, and the upper one counts 16 times.
        """
        T = self.T
        if self.isa.dot != "maddubs":
            return self.dot(total, weights, activations)
        mask = T.broadcast(T.uint8(15), 32)
        low = T.bind(weights & mask)
        shifted = T.reinterpret("uint16x16", weights) >> T.broadcast(T.uint16(4), 16)
        high = T.bind(T.reinterpret("uint8x32", shifted) & mask)
        total = self.dot(total, low, activations)
        pairs = self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", high, activations)
        return T.bind(total + self.intrinsic("llvm.x86.avx2.pmadd.wd", self.i32(), pairs, T.broadcast(T.int16(16), 16)))

    def dot_words(self, total: Expr, a: Expr, b: Expr) -> Expr:
        """Adds two products of integers of 16 bits to each lane of `total`, exactly; which two depends on the level.

        All are of the same 16 bytes.
        """
        T, L = self.T, self.L
        if self.isa.arch == "aarch64":
            for half in (range(L), range(L, 2 * L)):
                total = total + T.cast(self.pick([a], half), self.i32()) * T.cast(self.pick([b], half), self.i32())
            return T.bind(total)
        if self.isa.dot == "vnni512":
            return self.intrinsic("llvm.x86.avx512.vpdpwssd.512", self.i32(), total, a, b)
        name = {8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}[L]
        return T.bind(total + self.intrinsic(name, self.i32(), a, b))

    def constants(self, table: Sequence[int]) -> Expr:
        """A table of 16 bytes as `look_up` takes it."""
        T = self.T
        words = [int.from_bytes(bytes(table[i : i + 4]), "little", signed=True) for i in range(0, 16, 4)]
        slot = T.alloc_buffer((self.L,), "int32", scope="global")
        for i in range(self.L):
            T.buffer_store(slot, T.int32(words[i % 4]), [i])
        return T.reinterpret(f"uint8x{4 * self.L}", self.load(slot, 0))

    def look_up(self, tables: Expr, codes: Expr) -> Expr:
        """The bytes that bytes below 16 stand for: every 16 bytes of `tables` are the table of the 16 codes there."""
        T, wide = self.T, 4 * self.L
        signed = [T.reinterpret(f"int8x{wide}", a) for a in (tables, codes)]
        found = self.intrinsic(_LOOK_UP[self.isa.arch, self.L], f"int8x{wide}", *signed)
        return T.bind(T.reinterpret(f"uint8x{wide}", found))

    def pick(self, parts: Sequence[Expr], lanes: Sequence[int]) -> Expr:
        """Lanes of vectors that are laid end to end, by number."""
        from tvm import tirx

        return self.T.bind(tirx.Shuffle(list(parts), list(lanes)))

    def repeat(self, value: Expr, lanes: int) -> Expr:
        """A short vector of `lanes`, of 16 bytes, as often as a register holds it."""
        times = self.L // 4
        return self.pick([value] * times, range(times * lanes))

    def interleave(self, a: Expr, b: Expr, dtype: str) -> tuple[Expr, Expr]:
        """``a0 b0 a1 b1 ...`` of the lower halves of every 16 bytes of a and b, and of the upper halves, as `dtype`."""
        whole = int(dtype.rpartition("x")[2]) * 2
        half = whole // self.L * 2
        order = [start + i + side for start in range(0, whole, 2 * half) for i in range(half) for side in (0, whole)]
        places = (order, [i + half for i in order])
        lower, upper = (self.keep(self.T.reinterpret(dtype, self.pick([a, b], p)), dtype) for p in places)
        return lower, upper

    def add_turned(self, parts: Any) -> Expr:
        """Lane ``4 j + t`` of the result is the sum of lanes ``4 j`` to ``4 j + 3`` of part t of a buffer of four."""
        L = self.L
        even = [start + i for start in range(0, L, 4) for i in (0, 2, L, L + 2)]

        def add(a: Expr, b: Expr) -> Expr:
            return self.T.bind(self.pick([a, b], even) + self.pick([a, b], [i + 1 for i in even]))

        a, b, c, d = (self.load(parts, turn * L) for turn in range(4))
        return add(add(a, b), add(c, d))

    def activate(self, kind: str, x: Expr) -> Expr:
        """An activation function by name; ``none`` is x."""
        T = self.T
        match kind:
            case "none":
                return x
            case "relu":
                return self.maximum(x, self.spread(0.0))
            case "gelu":
                return T.bind(self.spread(0.5) * x * (self.spread(1.0) + self.erf(x * self.spread(0.7071067811865476))))
            case "gelu_tanh":
                inner = self.spread(0.7978845608028654) * self.fma(x * x * x, self.spread(0.044715), x)
                return T.bind(self.spread(0.5) * x * (self.spread(1.0) + self.tanh(T.bind(inner))))
            case "silu":
                return T.bind(x * self.sigmoid(x))
            case "quick_gelu":
                return T.bind(x * self.sigmoid(x * self.spread(1.702)))
            case "tanh":
                return self.tanh(x)
            case "sigmoid":
                return self.sigmoid(x)
        raise ValueError(kind)


class Kernel:
    """A C function under construction: pointer and integer parameters, the last two the range of units to do.

    ```python
    with Kernel("name", v, pointers={"x": "float32", "y": "float32"}, integers=["n"]) as k:
        with k.units() as i:
            ...
    ```

    Pointers differ, but with `overwrites`, where an element is computed of those that lie at its own place.
    """

    def __init__(
        self, name: str, v: Vectors, pointers: dict[str, str], integers: Sequence[str] = (), *, overwrites: bool = False
    ) -> None:
        self.name, self.v, self._overwrites = name, v, overwrites
        self._pointers, self._integers = pointers, integers
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        from tvm.script.ir_builder import IRBuilder

        T = self.v.T
        self._builder = self._stack.enter_context(IRBuilder())
        self._stack.enter_context(T.prim_func(s_tir=True))
        T.func_name(self.name)
        T.func_attr({"tirx.noalias": not self._overwrites, "global_symbol": self.name})
        handles = {n: (T.arg(n, T.handle(d)), d) for n, d in self._pointers.items()}
        self.sizes = {n: T.arg(n, T.int32()) for n in self._integers}
        self.begin, self.end = T.arg("begin", T.int32()), T.arg("end", T.int32())
        # No alignment is assumed: rows of any width follow each other, and a caller's arrays lie anywhere.
        self.buffers = {n: T.decl_buffer((1 << 30,), d, data=h, align=1) for n, (h, d) in handles.items()}
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    @contextlib.contextmanager
    def units(self) -> Iterator[Expr]:
        """The loop over the units of this call."""
        with self.v.T.serial(self.begin, self.end) as i:
            yield i

    def ahead(
        self, buffer: Any, unit: Expr, size: Expr, tiles: Expr, steps: Expr
    ) -> Callable[[Expr, Expr], None] | None:
        """Asks for the next unit of a weight while one is multiplied: it comes from far away.

        A line is asked for in so many steps that all tiles together ask for all of it, and not faster.

        Args:
            buffer: The weight.
            unit: The unit at hand.
            size: Elements of a unit.
            tiles: How many tiles a unit is multiplied in.
            steps: Steps of a tile.

        Returns:
            What a tile calls in each step, with its number and that of the step; None if weights are near.
        """
        if self.v.near:
            return None
        T = self.v.T
        line = _LINE // _BYTES[str(buffer.dtype)]
        lines, start = T.bind(size // line), T.bind((unit + 1) * size)
        pace = T.bind(sum(T.cast(tiles * steps >= lines * (1 << i), "int32") for i in range(1, 6)))

        def ask(tile: Expr, step: Expr) -> None:
            self.v.prefetch(buffer, T.bind(start + T.min((tile * steps + step) >> pace, lines - 1) * line))

        return ask

    def registers(self, count: int, dtype: str = "float32") -> Any:
        """Numbers of 32 bits on the stack that become registers.

        One array; or, where that would exceed what TVM puts there (1 KiB, else it calls for heap), a list of vectors,
        which `Vectors.load` and `store` take at constant multiples of one.
        """
        v = self.v
        if count * 4 < 1024:
            return v.T.alloc_buffer((count,), dtype, scope="global")
        return [v.T.alloc_buffer((v.L,), dtype, scope="global") for _ in range(count // v.L)]

    def stack(self, count: int, dtype: str) -> Any:
        """An array on the stack that stays there, of any size."""
        T, size = self.v.T, _BYTES[dtype]
        place = T.bind(T.tvm_stack_alloca("shape", count * size // 8))
        return T.decl_buffer((count,), dtype, data=place, align=1)

    def function(self) -> Any:
        """The finished function."""
        return self._builder.get()
