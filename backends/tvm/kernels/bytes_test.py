from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest

from qc.backends.tvm.isa import best_for_host
from qc.backends.tvm.kernels.bytes import PADDING, byte_product, quantize_grid, row_ranges, vectors_of
from qc.backends.tvm.kernels.tiles import configuration
from qc.backends.tvm.pack import bytes_of, pack_bytes
from qc.ir.quant import Format, QuantizedTensor


def weight(text: str, rows: int, columns: int, rng) -> QuantizedTensor:
    format = Format.parse(text)
    codes = rng.integers(format.values.low, format.values.high + 1, (rows, columns))
    params = {"scale": (rng.random((rows, 1)) * 0.1 + 0.01).astype(np.float32)}
    if not format.values.symmetric:
        params["zero_point"] = rng.integers(0, 256, (rows, 1)).astype(np.uint8)
    return QuantizedTensor(format, codes.astype(np.int8 if format.values.symmetric else np.uint8), params)


@pytest.mark.parametrize(("text", "zeros"), [("int8", True), ("uint8", False)])
def test_a_product_of_bytes_equals_its_definition_bit_for_bit(isa, call, rng, text, zeros):
    check_product(isa, call, rng, text, zeros, 11, [0] if isa.tiles else [])


@pytest.mark.parametrize(("text", "zeros"), [("int8", True), ("uint8", False)])
def test_a_product_in_tiles_has_the_same_bits(tiles, call, rng, text, zeros):
    check_product(best_for_host(), call, rng, text, zeros, 51, [tiles])


def test_tiles_are_left_as_they_were(tiles, call, rng, tmp_path):
    """Libraries that set theirs up once, as llama.cpp does, find them again."""
    source = tmp_path / "tiles.c"
    source.write_text(
        "#include <immintrin.h>\n"
        "void set(const void *at) { _tile_loadconfig(at); }\nvoid get(void *at) { _tile_storeconfig(at); }\n"
        "void release(void) { _tile_release(); }\n"
    )
    place = tmp_path / "tiles.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-mamx-tile", "-o", place, source], check=True)
    other = ctypes.CDLL(str(place))
    for wanted in (bytes(64), configuration({2: (5, 32)})):
        found = ctypes.create_string_buffer(64)
        other.set(wanted)
        check_product(best_for_host(), call, rng, "int8", True, 51, [tiles])
        other.get(found)
        other.release()
        assert found.raw == wanted


def check_product(isa, call, rng, text, zeros, m, tiles):
    n, k = 53, 70
    w, padded = weight(text, n, k, rng), PADDING * 2
    q = rng.integers(-128, 128, (m, k)).astype(np.int8)
    z = rng.integers(-128, 128, m).astype(np.int32) * zeros
    s, y = rng.random(m).astype(np.float32), np.full((m + 1, n), np.nan, np.float32)
    wide = np.zeros((m, padded), np.int8)
    wide[:, :k] = q
    t = (q.astype(np.int32).sum(1) - k * z).astype(np.int32)
    unit = vectors_of(isa) * isa.lanes
    packed = pack_bytes(w, unit, isa)
    assert packed.nbytes == bytes_of(n, k, unit)
    arrays = [wide, s, t, *([z] if zeros else []), packed, y]
    options = (zeros, False, False, "none")
    call(isa, byte_product, options, arrays, (m, n, padded, n, 0, *tiles), -(-n // unit))
    v = w.params.get("zero_point", np.zeros((n, 1))).astype(np.int64)
    exact = (q.astype(np.int64) - z[:, None]) @ (w.codes.astype(np.int64) - v).T
    assert np.array_equal(y[:m], exact.astype(np.float32) * s[:, None] * w.params["scale"].T)
    assert np.isnan(y[m]).all(), "it wrote beyond its rows"


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 15)])
def test_rows_are_put_on_their_grids(isa, call, rng, low, high):
    m, k, padded = 5, 37, PADDING
    x = rng.standard_normal((m, k)).astype(np.float32)
    lows, highs = np.zeros((2, m), np.float32)
    call(isa, row_ranges, (), [x, lows, highs], (k, k), m)
    assert np.array_equal(lows, x.min(1))
    assert np.array_equal(highs, x.max(1))
    s = ((highs - lows) / (high - low) * 0.7).astype(np.float32)
    z = np.rint(low - lows / s).astype(np.int32)
    half = (rng.integers(low, high, (m, k // 3)) - z[:, None] + 0.5).astype(np.float32) * s[:, None]
    for part, towards in enumerate((-np.inf, half, np.inf)):  # what is nearly, or just, between two codes
        x[:, part * (k // 3) : (part + 1) * (k // 3)] = np.nextafter(half, np.float32(towards))
    x[0, :4] = np.inf, -np.inf, 1e30, -0.0
    q, t = np.ones((m, padded), np.int8), np.zeros(m, np.int32)
    call(isa, quantize_grid, (low, high), [x, s, z, q, t], (k, k, padded), m)
    expected = np.clip(np.rint(x / s[:, None]) + z[:, None], low, high).astype(np.int64)
    assert np.array_equal(q[:, :k], expected)
    assert not q[:, k:].any()
    assert np.array_equal(t, expected.sum(1) - k * z)
