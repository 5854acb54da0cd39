"""What recurrent layers do beside products: from sums of gates to the next state, for one step of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.rows import across
from qc.backends.tvm.kernels.vectors import Kernel, Vectors

__all__ = ["ACTIVATIONS", "Cell", "recurrent_cell"]

Expr = Any

ACTIVATIONS: dict[str, tuple[tuple[float | None, ...], Callable[..., Expr]]] = {
    "Sigmoid": ((), lambda v, x: v.sigmoid(x)),
    "Tanh": ((), lambda v, x: v.tanh(x)),
    "Relu": ((), lambda v, x: v.maximum(x, v.spread(0.0))),
    "Softsign": ((), lambda v, x: x / (v.spread(1.0) + v.absolute(x))),
    "LeakyRelu": ((0.01,), lambda v, x, a: v.T.Select(x < v.spread(0.0), v.spread(a) * x, x)),
    "ThresholdedRelu": ((None,), lambda v, x, a: v.T.Select(x > v.spread(a), x, v.spread(0.0))),
    "Elu": ((1.0,), lambda v, x, a: v.T.Select(x < v.spread(0.0), v.spread(a) * (v.exp(x) - v.spread(1.0)), x)),
    "Affine": ((None, 0.0), lambda v, x, a, b: v.fma(v.spread(a), x, v.spread(b))),
    "ScaledTanh": ((None, None), lambda v, x, a, b: v.spread(a) * v.tanh(v.spread(b) * x)),
    "HardSigmoid": (
        (0.2, 0.5),
        lambda v, x, a, b: v.minimum(v.maximum(v.fma(v.spread(a), x, v.spread(b)), v.spread(0.0)), v.spread(1.0)),
    ),
}
"""Activation functions by the names that attributes give them: their parameters where none are given, and what they do.
None: some must be given, for runtimes differ."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent layer without its weights.

    Attributes:
        op: ``LSTM``, ``GRU`` or ``RNN``; ``reset`` is the first half of a ``GRU`` whose products follow its reset gate.
        activations: Name and parameters of each activation function, in the order of attributes.
        clip: What the sums of gates are cut at, from both sides; None if they are not. The state of a cell is not cut,
            as in ONNX Runtime.
        coupled: Whether a forget gate is one less the input gate.
        peepholes: Whether gates look at the state of the cell.
        resets: Whether the reset gate scales a product; else the product was of a state that it scaled.
        lengths: Whether rows have lengths of their own.
        whole: Whether each state is wanted, not the last only.
    """

    op: str
    activations: tuple[tuple[str, tuple[float, ...]], ...]
    clip: float | None = None
    coupled: bool = False
    peepholes: bool = False
    resets: bool = False
    lengths: bool = False
    whole: bool = True

    @property
    def pointers(self) -> dict[str, str]:
        """What its kernel reads and writes."""
        wanted = {
            "c": self.op == "LSTM",
            "q": self.op == "GRU" and not self.resets,
            "y": self.whole,
            "peepholes": self.peepholes,
            "lengths": self.lengths,
        }
        found = dict.fromkeys(["x", "p", "h", *(name for name, held in wanted.items() if held)], "float32")
        return found | ({"lengths": "int32"} if self.lengths else {})


def recurrent_cell(isa: Isa, name: str, cell: Cell) -> Any:
    """The state h (and c) behind one step of time, from the sums ``x`` of inputs and ``p`` of states, biases in them.

    Units are rows of a batch. Rows of x and p hold all gates, and those of p follow each other; so do those of ``q``,
    the sums of a state that a reset gate scaled. The new state is written to h, and to y if it is wanted. At a time
    ``t`` beyond the length of a row its state stays, and y is zero.
    """
    v = Vectors(isa)
    T = v.T
    with Kernel(name, v, cell.pointers, ("n", "ldx", "ldh", "ldc", "ldy", "t")) as kernel:
        b, size = kernel.buffers, kernel.sizes
        with kernel.units() as row:

            def step() -> None:
                across(kernel, size["n"], lambda get, put: _STEPS[cell.op](_Row(kernel, cell, row, get, put)))

            if not cell.lengths:
                step()
            else:
                with T.If(size["t"] < b["lengths"][row]):
                    with T.Then():
                        step()
                    with T.Else():
                        if cell.whole:
                            across(kernel, size["n"], lambda _, put: put(b["y"], row * size["ldy"], v.spread(0.0)))
    return kernel.function()


class _Row:
    """Vectors of one row."""

    def __init__(
        self, kernel: Kernel, cell: Cell, row: Expr, get: Callable[..., Expr], put: Callable[..., None]
    ) -> None:
        self.v, self.cell = kernel.v, cell
        self._b, self._size, self._row, self._get, self._put = kernel.buffers, kernel.sizes, row, get, put
        self._gates = {"LSTM": 4, "GRU": 3, "reset": 3, "RNN": 1}[cell.op]

    def x(self, gate: int) -> Expr:
        return self._get(self._b["x"], self._row * self._size["ldx"] + gate * self._size["n"])

    def p(self, gate: int, of: str = "p") -> Expr:
        return self._get(self._b[of], (self._row * self._gates + gate) * self._size["n"])

    def h(self) -> Expr:
        return self._get(self._b["h"], self._row * self._size["ldh"])

    def c(self) -> Expr:
        return self._get(self._b["c"], self._row * self._size["ldc"])

    def gate(self, gate: int, function: int, c: Expr = None, peephole: int = 0) -> Expr:
        """A gate by number, whose sum may look at the cell."""
        total = self.x(gate) + self.p(gate)
        if self.cell.peepholes and c is not None:
            total = self.v.fma(self._get(self._b["peepholes"], peephole * self._size["n"]), c, total)
        return self.activate(function, self.clipped(total))

    def clipped(self, total: Expr) -> Expr:
        v, limit = self.v, self.cell.clip
        return total if limit is None else v.minimum(v.maximum(total, v.spread(-limit)), v.spread(limit))

    def activate(self, function: int, total: Expr) -> Expr:
        name, parameters = self.cell.activations[function]
        return self.v.keep(ACTIVATIONS[name][1](self.v, self.v.keep(total), *parameters))

    def end(self, h: Expr) -> None:
        """The new state."""
        h = self.v.keep(h)
        self._put(self._b["h"], self._row * self._size["ldh"], h)
        if self.cell.whole:
            self.give(h)

    def give(self, y: Expr) -> None:
        self._put(self._b["y"], self._row * self._size["ldy"], y)

    def hold(self, c: Expr) -> None:
        """The new state of the cell."""
        self._put(self._b["c"], self._row * self._size["ldc"], c)


def _rnn(row: _Row) -> None:
    row.end(row.gate(0, 0))


def _lstm(row: _Row) -> None:
    """Gates lie as input, output, forget, cell; peepholes as input, output, forget."""
    v, before = row.v, row.c()
    taken = row.gate(0, 0, before, 0)
    kept = v.keep(v.spread(1.0) - taken) if row.cell.coupled else row.gate(2, 0, before, 2)
    c = v.keep(kept * before + taken * row.gate(3, 1))
    row.hold(c)
    row.end(row.gate(1, 0, c, 1) * row.activate(2, c))


def _reset(row: _Row) -> None:
    """``y = r h``: what the second product of a GRU is of."""
    row.give(row.v.keep(row.gate(1, 0) * row.h()))


def _gru(row: _Row) -> None:
    """Gates lie as update, reset, hidden."""
    v, update = row.v, row.gate(0, 0)
    product = row.gate(1, 0) * row.p(2) if row.cell.resets else row.p(2, "q")
    hidden = row.activate(1, row.clipped(row.x(2) + product))
    row.end((v.spread(1.0) - update) * hidden + update * row.h())


_STEPS = {"LSTM": _lstm, "GRU": _gru, "reset": _reset, "RNN": _rnn}
