"""Words of the generators of GPU kernels: blocks of threads, their memory, and where a parameter's elements lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

__all__ = ["BLOCK", "Threads"]

if TYPE_CHECKING:
    from typing_extensions import Self

Expr = Any

BLOCK = 64
"""Threads of a block: every device has so many."""


class Threads:
    """A kernel under construction.

    Its parameters are buffers, integers, and for each buffer another integer, ``at_NAME``: elements in front of the
    first. Elements are ``float32``, ``int32`` or ``uint32``, which every language has.

    ```python
    with Threads("name", {"x": "float32", "y": "float32"}, ["n"]) as k:
        with k.elements(k.sizes["n"]) as i:
            k.put("y", i, k.get("x", i))
    ```
    """

    def __init__(self, name: str, pointers: Mapping[str, str], integers: Sequence[str]) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as builder

        self.name, self.T, self.x = name, builder, tirx
        self._pointers, self._integers = pointers, integers
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        from tvm.script.ir_builder import IRBuilder

        T = self.T
        self._builder = self._stack.enter_context(IRBuilder())
        self._stack.enter_context(T.prim_func(s_tir=True))
        T.func_name(self.name)
        T.func_attr({"tirx.noalias": True, "global_symbol": self.name})
        self._buffers = {n: T.arg(n, T.buffer((1 << 30,), d)) for n, d in self._pointers.items()}
        names = [*self._integers, *(f"at_{n}" for n in self._pointers)]
        self.sizes = {n: T.arg(n, T.int32()) for n in names}
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def function(self) -> Any:
        """The finished function."""
        return self._builder.get()

    @contextlib.contextmanager
    def elements(self, count: Expr) -> Iterator[Expr]:
        """One thread for each of `count` elements."""
        T = self.T
        with (
            T.launch_thread("blockIdx.x", T.truncdiv(count + (BLOCK - 1), BLOCK)) as block,
            T.launch_thread("threadIdx.x", BLOCK) as thread,
        ):
            i = T.bind(block * BLOCK + thread)
            with T.If(i < count), T.Then():
                yield i

    @contextlib.contextmanager
    def blocks(self, *counts: Expr) -> Iterator[tuple[Expr, ...]]:
        """One block for each place in a grid of up to two axes; yields the places and the thread's number."""
        T = self.T
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(T.launch_thread(f"blockIdx.{a}", c)) for a, c in zip("xy", counts)]  # noqa: B905
            yield (*found, stack.enter_context(T.launch_thread("threadIdx.x", BLOCK)))

    def get(self, name: str, index: Expr) -> Expr:
        """An element of a parameter."""
        return self.T.bind(self._buffers[name][self.sizes[f"at_{name}"] + index])

    def put(self, name: str, index: Expr, value: Expr) -> None:
        """Writes an element."""
        self.T.buffer_store(self._buffers[name], value, [self.sizes[f"at_{name}"] + index])

    def own(self, count: int, dtype: str = "float32") -> Any:
        """Numbers of a thread."""
        return self.T.alloc_buffer((count,), dtype, scope="local")

    def common(self, count: int, dtype: str = "float32") -> Any:
        """Numbers of a block."""
        return self.T.alloc_buffer((count,), dtype, scope="shared")

    def wait(self) -> None:
        """Until all threads of the block are here."""
        self.T.evaluate(self.T.tvm_storage_sync("shared"))

    def set(self, buffer: Any, index: Expr, value: Expr) -> None:
        """Writes a number of a thread or a block."""
        self.T.buffer_store(buffer, value, [index])

    def split(self, index: Expr, sizes: Sequence[Expr]) -> list[Expr]:
        """The place of an element along axes of these sizes."""
        T, found = self.T, []
        for size in reversed(sizes[1:]):
            found.append(T.bind(T.truncmod(index, size)))
            index = T.bind(T.truncdiv(index, size))
        return [index, *reversed(found)]

    def strided(self, thread: Expr, count: Expr) -> Any:
        """A loop in which the threads of a block take turns: ``with k.strided(thread, n) as j``, inside of n."""
        return _Strided(self, thread, count)

    def fold(self, thread: Expr, value: Expr, combine: Callable[[Expr, Expr], Expr], dtype: str = "float32") -> Expr:
        """What all threads of a block hold, combined."""
        T, held = self.T, self.common(BLOCK, dtype)
        self.set(held, thread, value)
        self.wait()
        step = BLOCK // 2
        while step:
            with T.If(thread < step), T.Then():
                self.set(held, thread, combine(held[thread], held[thread + step]))
            self.wait()
            step //= 2
        return T.bind(held[0])

    def checked(self, index: Expr, end: Expr) -> Expr:
        """An index in ``[0, end)``; one that is not is counted in the parameter ``status``, and replaced."""
        T, x = self.T, self.x
        with T.If(x.Or(index < 0, index >= end)), T.Then():
            self.put("status", 0, T.int32(1))
        return T.bind(T.max(T.min(index, end - 1), 0))


class _Strided:
    def __init__(self, k: Threads, thread: Expr, count: Expr) -> None:
        self._k, self._thread, self._count = k, thread, count
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Expr:
        T = self._k.T
        turn = self._stack.enter_context(T.serial(0, T.truncdiv(self._count + (BLOCK - 1), BLOCK)))
        index = T.bind(turn * BLOCK + self._thread)
        self._stack.enter_context(T.If(index < self._count))
        self._stack.enter_context(T.Then())
        return index

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)
