from __future__ import annotations

import numpy as np

from qc.backends.tvm.kernels.recurrent import Cell, recurrent_cell


def test_a_step_of_a_cell_is_that_of_numpy_and_leaves_rows_that_ended(isa, call, rng):
    batch, n = 3, 21
    x, p = (rng.standard_normal((batch, 4 * n)).astype(np.float32) for _ in range(2))
    h, c = (rng.standard_normal((batch, n)).astype(np.float32) for _ in range(2))
    peepholes, lengths = rng.standard_normal(3 * n).astype(np.float32), np.array([5, 4, 6], np.int32)
    cell = Cell("LSTM", (("Sigmoid", ()), ("Tanh", ()), ("Tanh", ())), peepholes=True, lengths=True)
    taken, shown, kept, new = (x + p).reshape(batch, 4, n).swapaxes(0, 1)
    i, o, f = peepholes.reshape(3, n)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    held = sigmoid(kept + f * c) * c + sigmoid(taken + i * c) * np.tanh(new)
    state = sigmoid(shown + o * held) * np.tanh(held)
    goes_on = (lengths > 4)[:, None]
    expected = [np.where(goes_on, a, b) for a, b in ((state, h), (held, c), (state, 0))]
    y = np.full((batch, n), np.nan, np.float32)
    call(isa, recurrent_cell, (cell,), [x, p, h, c, y, peepholes, lengths], (n, 4 * n, n, n, n, 4), batch)
    for found, wanted in zip((h, c, y), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
