"""Rows of a cache are stored as numpy would, bit for bit, and attention reads what they hold."""

from __future__ import annotations

import numpy as np
import pytest

from qc.backends.tvm.kernels.attention import Heads, attend_few, attend_many
from qc.backends.tvm.kernels.caches import CELLS, append, cells
from qc.ir.errors import InputError

NARROW = [c for c in CELLS.values() if c.narrow]
narrow = pytest.mark.parametrize("held", NARROW, ids=lambda c: c.name)


@pytest.mark.parametrize("held", CELLS.values(), ids=lambda c: c.name)
def test_what_is_read_back_is_within_half_a_step(rng, held):
    x = rng.standard_normal((3, 2, 5, 32)).astype(np.float32)
    rows = held.encode(x)
    assert rows.shape == (3, 2, 5, held.row_bytes(32))
    error = np.abs(held.decode(rows) - x).max(-1)
    span = x.max(-1) - x.min(-1)
    bound = {32: 0 * span, 16: np.abs(x).max(-1) * 2.0**-11}.get(held.bits, 0.5001 * span / (held.levels or 1))
    assert (error <= bound).all()


@narrow
def test_a_row_of_one_number_and_numbers_out_of_range(held):
    same = np.full((1, 32), -3.5, np.float32)
    np.testing.assert_array_equal(held.decode(held.encode(same)), same)
    large = np.array([[1e6, *[0.0] * 30, -1e6]], np.float32)
    assert np.isfinite(held.decode(held.encode(large))).all()


@narrow
def test_heads_are_stored_at_their_positions(isa, call, rng, held):
    batch, s, heads, width, room = 2, 3, 2, 32, 7
    x = rng.standard_normal((batch, s, heads, width)).astype(np.float32) * 3
    x[0, 0, 0] = 2.5  # a row of one number
    positions = np.array([[2, 3, 4], [0, 1, 5]], np.int64)
    y = np.full((batch, heads, room, held.row_bytes(width)), 7, np.uint8)
    expected = y.copy()
    for b in range(batch):
        expected[b, :, positions[b]] = held.encode(x[b])
    steps = [x.strides[i] // 4 for i in (0, 2, 1)] + list(y.strides[:3])
    call(isa, append, (width, held), [x, y, positions], (heads, s, s, *steps), batch * s)
    np.testing.assert_array_equal(y, expected)


@narrow
@pytest.mark.parametrize(("generator", "s"), [(attend_few, 2), (attend_many, 9)])
def test_attention_reads_what_rows_hold(isa, call, rng, generator, s, held):
    kv, share, width, past, room = 2, 2, 32, 9, 64
    q = rng.standard_normal((s, kv * share, width)).astype(np.float32)
    rows = [held.encode(rng.standard_normal((kv, room, width)).astype(np.float32)) for _ in range(2)]
    k, v = (held.decode(r) for r in rows)
    heads = Heads(width, width, share, True, 0, False, 0.2, cells=held)
    assert heads.fits_few(isa)
    per_key, more = heads.scratch(isa, generator is attend_many, past + s)
    work = np.zeros(kv * (room * per_key + more), np.float32)
    y = np.zeros_like(q)
    steps = [0, q.strides[1] // 4, q.strides[0] // 4, *[0, rows[0].strides[0], rows[0].strides[1]] * 2]
    steps += [0, y.strides[1] // 4, y.strides[0] // 4]
    pasts = np.array([past], np.int32)
    call(isa, generator, (heads,), [q, *rows, y, work, pasts], (kv, s, past + s, room, *steps), kv)
    for h in range(kv * share):
        for i in range(s):
            scores = 0.2 * (k[h // share, : past + i + 1] @ q[i, h])
            p = np.exp(scores - scores.max())
            np.testing.assert_allclose(y[i, h], p / p.sum() @ v[h // share, : past + i + 1], rtol=1e-4, atol=1e-5)


def test_an_unknown_format_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=r"float16, uint8, uint4, found 'int5'"):
        cells("int5")
