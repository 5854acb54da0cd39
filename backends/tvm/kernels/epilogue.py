"""What every product does with its sums: stores them, then adds bias and residual and applies the activation.

The second step runs over the columns of one unit while they are in the nearest cache, as a loop of its own: repeated
for each register of each tile it would be most of a kernel's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qc.backends.tvm.kernels.vectors import Kernel

__all__ = ["Epilogue"]


class Epilogue:
    """``y[row, start:start+lanes] = activation(total + bias + r)``, without a write beyond column n."""

    def __init__(self, kernel: Kernel, bias: bool, residual: bool, activation: str) -> None:
        self._kernel, self._bias, self._residual, self._activation = kernel, bias, residual, activation

    @staticmethod
    def pointers(bias: bool, residual: bool) -> dict[str, str]:
        """The parameters that it reads and writes."""
        names = ["y", *(["bias"] if bias else []), *(["r"] if residual else [])]
        return dict.fromkeys(names, "float32")

    def store(self, start: Any, row: Any, totals: Mapping[tuple[int, int], Any], columns: int) -> None:
        """Writes the sums of a tile: `totals` by row and vector; column `start` on, row `row` on."""
        v, y, size = self._kernel.v, self._kernel.buffers["y"], self._kernel.sizes
        T, L = v.T, v.L
        with T.If(start + columns * L <= size["n"]):
            with T.Then():
                for (i, r), total in totals.items():
                    v.store(y, (row + i) * size["ldy"] + start + r * L, total)
            with T.Else():
                slot = self._kernel.registers(L)
                for (i, r), total in totals.items():
                    v.store(slot, 0, total)
                    left = T.bind(T.min(size["n"] - start - r * L, L))
                    with T.serial(0, left) as j:
                        T.buffer_store(y, slot[j], [(row + i) * size["ldy"] + start + r * L + j])

    def finish(self, start: Any, count: Any) -> None:
        """Bias, residual and activation on columns ``[start, start + count)``, cut at n, of all rows."""
        if not self._bias and not self._residual and self._activation == "none":
            return
        v, b, size = self._kernel.v, self._kernel.buffers, self._kernel.sizes
        T, L = v.T, v.L
        end = T.bind(T.min(start + count, size["n"]))
        whole = T.bind((end - start) // L)
        with T.serial(0, size["m"]) as row:
            with T.serial(0, whole) as i:
                at = T.bind(start + i * L)
                y = v.load(b["y"], row * size["ldy"] + at)
                if self._bias:
                    y = T.bind(y + v.load(b["bias"], at))
                if self._residual:
                    y = T.bind(y + v.load(b["r"], row * size["ldr"] + at))
                v.store(b["y"], row * size["ldy"] + at, v.activate(self._activation, y))
            rest = T.bind(start + whole * L)
            with T.If(rest < end), T.Then():
                slot = self._kernel.registers(L)
                v.store(slot, 0, v.spread(0.0))
                with T.serial(0, end - rest) as j:
                    value = b["y"][row * size["ldy"] + rest + j]
                    if self._bias:
                        value = value + b["bias"][rest + j]
                    if self._residual:
                        value = value + b["r"][row * size["ldr"] + rest + j]
                    T.buffer_store(slot, value, [j])
                v.store(slot, 0, v.activate(self._activation, v.load(slot, 0)))
                with T.serial(0, end - rest) as j:
                    T.buffer_store(b["y"], slot[j], [row * size["ldy"] + rest + j])
