from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from qc.backends.tvm.kernels.attention import Heads, attend_few, attend_many, rotate
from qc.backends.tvm.kernels.float_products import float_product
from qc.backends.tvm.kernels.rows import activation, normalize, softmax
from qc.backends.tvm.pack import pack_columns


@pytest.mark.parametrize("stored", ["f32", "bf16"])
def test_a_float_product_is_that_of_numpy(isa, call, rng, stored):
    m, n, k, wide = 13, 50, 37, isa.tile[1]
    x, w, bias, r = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (n, k), (n,), (m, n)))
    held = w.astype(ml_dtypes.bfloat16) if stored == "bf16" else w
    y = np.full((m + 1, n), np.nan, np.float32)
    packed = pack_columns(held, wide * isa.lanes)
    units = -(-n // (wide * isa.lanes))
    call(isa, float_product, (stored, wide, True, True, "none"), [x, packed, y, bias, r], (m, n, k, k, n, n), units)
    np.testing.assert_allclose(y[:m], x @ held.astype(np.float32).T + bias + r, rtol=1e-4, atol=1e-4)
    assert np.isnan(y[m]).all()


def softmax_of(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("generator", "s"), [(attend_few, 2), (attend_many, 11)])
def test_causal_attention_sees_the_cache_and_what_is_before_it(isa, call, rng, generator, s, window):
    batch, kv, share, width, past, room = 2, 2, 2, 32, 9, 64
    q = rng.standard_normal((batch, s, kv * share, width)).astype(np.float32)
    k, v = (rng.standard_normal((batch, kv, room, width)).astype(np.float32) for _ in range(2))
    pasts = np.array([past, 4], np.int32)
    heads = Heads(width, width, share, True, window, False, 0.2)
    work = np.zeros(batch * kv * room * (width + isa.tile[0]), np.float32)
    y = np.zeros_like(q)
    strides = [t // 4 for a, axes in ((q, (0, 2, 1)), (k, (0, 1, 2)), (v, (0, 1, 2)), (y, (0, 2, 1)))
               for t in (a.strides[i] for i in axes)]  # fmt: skip
    call(isa, generator, (heads,), [q, k, v, y, work, pasts], (kv, s, past + s, room, *strides), batch * kv)
    for b in range(batch):
        for h in range(kv * share):
            for i in range(s):
                high = pasts[b] + i + 1
                low = max(0, high - window) if window else 0
                p = softmax_of(0.2 * (k[b, h // share, low:high] @ q[b, i, h]))
                np.testing.assert_allclose(y[b, i, h], p @ v[b, h // share, low:high], rtol=1e-4, atol=1e-5)


def test_a_bias_and_odd_widths_of_heads(isa, call, rng):
    s, t, width, values, room = 5, 19, 12, 20, 64
    q, k = (rng.standard_normal((n, width)).astype(np.float32) for n in (s, t))
    v = rng.standard_normal((t, values)).astype(np.float32)
    bias = rng.standard_normal((s, t)).astype(np.float32)
    bias[:, 3] = -np.inf
    heads = Heads(width, values, 1, False, 0, True, 0.5)
    work = np.zeros(room * (width + isa.tile[0] + 32), np.float32)
    y, past = np.zeros((s, values), np.float32), np.zeros(1, np.int32)
    strides = (0, 0, width, 0, 0, width, 0, 0, values, 0, 0, values)
    call(isa, attend_many, (heads,), [q, k, v, y, work, past, bias], (1, s, t, room, *strides, 0, 0, t), 1)
    np.testing.assert_allclose(y, softmax_of(0.5 * q @ k.T + bias) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_pairs_of_channels(isa, call, rng, interleaved):
    s, heads, width, rotated = 3, 2, 20, 12
    x = rng.standard_normal((1, s, heads, width)).astype(np.float32)
    angles = rng.random((8, rotated // 2)).astype(np.float32)
    positions = np.array([4, 5, 6])
    y = np.zeros_like(x)
    arrays = [x, y, np.cos(angles), np.sin(angles), positions]
    integers = (heads, s, 0, 0, width, heads * width, 0, width, heads * width)
    call(isa, rotate, (width, rotated, interleaved, False), arrays, integers, s)
    turned = x[..., :rotated].reshape(1, s, heads, -1, 2) if interleaved else None
    a, b = (turned[..., 0], turned[..., 1]) if interleaved else (x[..., : rotated // 2], x[..., rotated // 2 : rotated])
    c = (a + 1j * b) * np.exp(1j * angles[positions])[None, :, None]
    parts = [c.real, c.imag]
    expected = np.stack(parts, -1).reshape(1, s, heads, -1) if interleaved else np.concatenate(parts, -1)
    np.testing.assert_allclose(y[..., :rotated], expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(y[..., rotated:], x[..., rotated:])


@pytest.mark.parametrize("n", [5, 33])
def test_rows_are_normalized(isa, call, rng, n):
    m = 3
    x, w, b = rng.standard_normal((m, n)).astype(np.float32) + 1, *rng.standard_normal((2, n)).astype(np.float32)
    eps = np.array([1e-5], np.float32)
    y = np.zeros_like(x)
    call(isa, normalize, ("layer", True, True), [x, y, eps, w, b], (n, n, n), m)
    centred = x - x.mean(1, keepdims=True)
    np.testing.assert_allclose(y, centred / np.sqrt(x.var(1, keepdims=True) + 1e-5) * w + b, rtol=1e-4, atol=1e-5)
    call(isa, softmax, (), [x, y], (n, n, n), m)
    np.testing.assert_allclose(y, softmax_of(x), rtol=1e-5)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "quick_gelu", "tanh"])
def test_activation_functions(isa, call, kind):
    x = np.concatenate([np.linspace(-12, 12, 5001), [-200.0, 200.0, 0.0]]).astype(np.float32)
    y, n = np.zeros_like(x), x.size
    call(isa, activation, (kind,), [x, y], (n, n, n), 1)
    wide = x.astype(np.float64)
    expected = {
        "gelu": [0.5 * t * (1 + math.erf(t / math.sqrt(2))) for t in wide],
        "gelu_tanh": 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
        "silu": wide / (1 + np.exp(-wide)),
        "quick_gelu": wide / (1 + np.exp(-1.702 * wide)),
        "tanh": np.tanh(wide),
    }[kind]
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-6)
