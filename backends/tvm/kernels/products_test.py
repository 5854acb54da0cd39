from __future__ import annotations

import numpy as np
import pytest

from qc.backends.integers import integers_of
from qc.backends.tvm.isa import best_for_host
from qc.backends.tvm.kernels.products import exact_product, integer_product, quantize_rows
from qc.backends.tvm.pack import codes_of, groups_of, pack_records, record_bytes
from qc.ir.quant import Format, QuantizedTensor
from qc.passes.quantize.assign import assign


def weight(text: str, rows: int, columns: int, rng) -> QuantizedTensor:
    format = Format.parse(text)
    low, high, groups = format.values.low, format.values.high, format.groups(columns)
    codes = rng.integers(low, high + 1, (rows, columns)).astype(np.int8 if format.values.symmetric else np.uint8)
    scale_type = np.float16 if str(format.scale) == "f16" else np.float32
    params = {"scale": (rng.random((rows, groups)) * 0.1 + 0.01).astype(scale_type)}
    if not format.values.symmetric:
        params["zero_point"] = rng.integers(low, high + 1, (rows, groups)).astype(np.uint8)
    return QuantizedTensor(format, codes, params)


def quantized(x, block):
    """Codes and scales of activations, as the definition in `quantize_rows` says."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    top = np.abs(blocks).max(-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(top > 0, np.float32(127) / top, np.float32(0)).astype(np.float32)
    codes = np.rint(blocks * inverse[..., None]).astype(np.int64)
    return codes, top * np.float32(1 / 127)


def fma(a, b, c):
    """``a * b + c`` of float32, rounded once: the product is exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def reference(x, w, codes):
    """The integer product, operation for operation."""
    groups, width = groups_of(codes, x.shape[1]), codes.block * codes.blocks
    padded = np.zeros((len(x), groups * width), np.float32)
    padded[:, : x.shape[1]] = x
    q, s = quantized(padded, codes.block)
    u = np.zeros((len(w.codes), groups * width), np.int64)
    per = w.format.group or w.codes.shape[1]
    zero = w.params.get("zero_point", np.zeros_like(w.params["scale"])).astype(np.int64)
    u[:, : w.codes.shape[1]] = w.codes - np.repeat(zero, per, 1)[:, : w.codes.shape[1]]
    u = u.reshape(len(u), -1, codes.block)
    y = np.zeros((len(x), len(u)), np.float32)
    for g in range(groups):
        total = None
        for b in range(g * codes.blocks, (g + 1) * codes.blocks):
            exact = (q[:, b] @ u[:, b].T).astype(np.float32)
            total = exact * s[:, b, None] if total is None else fma(exact, s[:, b, None], total)
        scale = w.params["scale"][:, min(g * width // per, w.params["scale"].shape[1] - 1)].astype(np.float32)
        y = fma(total, scale[None], y)
    return y


@pytest.mark.parametrize("text", ["uint4:g32", "int8:g32"])
def test_an_integer_product_equals_its_definition_bit_for_bit(isa, call, rng, text):
    check_integer_product(isa, call, rng, text)


@pytest.mark.parametrize("text", ["uint4:g32", "uint8:g32"])
def test_an_integer_product_has_the_same_bits_on_other_levels_of_arm(other_arm, call, rng, text):
    check_integer_product(other_arm, call, rng, text)


@pytest.mark.parametrize("text", ["int4:g64:f16", "uint8:g128", "int2:g16", "int3:g32", "int8"])
def test_an_integer_product_of_every_kind_of_format(call, rng, text):
    check_integer_product(best_for_host(), call, rng, text)


@pytest.mark.parametrize("text", ["int4:g32:f16", "uint4:g128", "uint2:g16", "int8:g32", "int4"])
def test_an_integer_product_in_tiles_has_the_same_bits(tiles, call, rng, text):
    check_integer_product(best_for_host(), call, rng, text, rows=37, tiles=tiles)


@pytest.mark.parametrize("text", ["mxfp4", "bitmod3:g32"])
def test_an_integer_product_of_a_table_of_integers(isa, call, rng, text):
    check_table_of_integers(isa, call, rng, text)


@pytest.mark.parametrize("text", ["mxfp4", "bitmod3:g32"])
def test_an_integer_product_of_a_table_in_tiles(tiles, call, rng, text):
    check_table_of_integers(best_for_host(), call, rng, text, rows=21, tiles=tiles)


def check_table_of_integers(isa, call, rng, text, rows=5, tiles=0):
    x = rng.standard_normal((rows, 128)).astype(np.float32)
    w = assign(rng.standard_normal((37, 128)).astype(np.float32), Format.parse(text))
    codes = codes_of(w.format, 128, isa, exact=False)
    records = pack_records(w, codes, isa)
    assert (codes.bits, codes.table is not None) == (4, text == "mxfp4")
    integers = integers_of(w.format.values)
    scale = w.format.scale.decode(w.params) / np.float32(integers.multiple)
    same = QuantizedTensor(Format.parse("int8:g32"), integers.of(w), {"scale": scale})
    check_bits(isa, product_of_rows(isa, call, x, codes, records, 37, tiles), reference(x, same, codes))


def test_an_integer_product_of_tables_of_floats(isa, call, rng):
    check_tables(isa, call, rng, "nf4:g64")


def test_an_integer_product_of_tables_has_the_same_bits_on_other_levels_of_arm(other_arm, call, rng):
    check_tables(other_arm, call, rng, "nf4:g64")


@pytest.mark.parametrize("text", ["lut3", "lut4:g32"])
def test_an_integer_product_of_tables_of_rows_and_of_groups(call, rng, text):
    check_tables(best_for_host(), call, rng, text)


def check_tables(isa, call, rng, text):
    m, n, k = 6, 37, 160
    x = rng.standard_normal((m, k)).astype(np.float32)
    w = assign(rng.standard_normal((n, k)).astype(np.float32), Format.parse(text))
    codes = codes_of(w.format, k, isa, exact=False)
    records = pack_records(w, codes, isa)
    assert records.nbytes == record_bytes(codes, n, k, isa)
    assert (codes.table_bytes(isa.lanes) == 0) == (not w.format.values.params), "a fixed table is stored"
    values, groups = (w.format.values, w.format.groups(k))
    tables = w.params["table"].astype(np.float32) if "table" in w.params else values.values.reshape(1, 1, -1)
    peak = np.abs(tables).max(2, keepdims=True)
    step = peak / np.float32(32767)
    whole = np.rint(tables / step.astype(np.float64)).astype(np.int64)
    assert np.abs(whole * step - tables).max() <= peak.max() * 2.0**-15.99
    whole = np.broadcast_to(whole, (n, groups, whole.shape[2]))
    parts = np.array_split(w.codes.astype(np.int64), groups, axis=1)
    found = np.concatenate([np.take_along_axis(whole[:, g], p, 1) for g, p in enumerate(parts)], axis=1)
    scale = np.broadcast_to(w.format.scale.decode(w.params) * step[..., 0], (n, groups))
    same = QuantizedTensor(w.format, found, {"scale": scale})
    check_bits(isa, product_of_rows(isa, call, x, codes, records, n), reference(x, same, codes))


def product_of_rows(isa, call, x, codes, records, n, tiles=0):
    """Rows of x, quantized by the kernel that does it, times a weight."""
    (m, k), groups = x.shape, groups_of(codes, x.shape[1])
    padded = groups * codes.block * codes.blocks
    q, s = np.zeros((m, padded), np.int8), np.zeros((m, padded // codes.block), np.float32)
    z, y = np.zeros(s.shape, np.int32), np.full((m + 1, n), np.nan, np.float32)
    call(isa, quantize_rows, (codes.block,), [x, q, s, z], (m, k, k, padded), m)
    units = -(-n // isa.lanes)
    integers = (m, n, groups, n, 0, *([tiles] if isa.tiles else []))
    call(isa, integer_product, (codes, False, False, "none"), [q, s, z, records, y], integers, units)
    assert np.isnan(y[m]).all(), "it wrote beyond its rows"
    return y[:m]


def check_integer_product(isa, call, rng, text, rows=7, tiles=0):
    n, k = 37, {"int8": 150, "int4": 250}.get(text, 160)
    w, x = weight(text, n, k, rng), rng.standard_normal((rows, k)).astype(np.float32)
    x[2] = 0
    codes = codes_of(w.format, k, isa, exact=False)
    records = pack_records(w, codes, isa)
    assert records.nbytes == record_bytes(codes, n, k, isa)
    check_bits(isa, product_of_rows(isa, call, x, codes, records, n, tiles), reference(x, w, codes))


def check_bits(isa, found, expected):
    if isa.fma:
        assert np.array_equal(found, expected)
    else:  # products are rounded before they are added there
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_exact_product_multiplies_with_the_decoded_weight(isa, call, rng):
    check_exact_product(isa, call, rng, "int8:g128")


def test_an_exact_product_looks_floats_up(isa, call, rng):
    check_exact_product(isa, call, rng, "nf4:g64")


def test_an_exact_product_reads_codes_in_two_planes(call, rng):
    check_exact_product(best_for_host(), call, rng, "int3:g64")


def check_exact_product(isa, call, rng, text):
    m, n, k = 6, 35, 128
    x = rng.standard_normal((m, k)).astype(np.float32)
    w = assign(rng.standard_normal((n, k)).astype(np.float32), Format.parse(text))
    bias, r = (rng.standard_normal(shape).astype(np.float32) for shape in ((n,), (m, n)))
    codes = codes_of(w.format, k, isa, exact=True)
    y = np.zeros((m, n), np.float32)
    arrays = [x, pack_records(w, codes, isa), y, bias, r]
    integers = (m, n, groups_of(codes, k), k, n, n)
    call(isa, exact_product, (codes, True, True, "relu"), arrays, integers, -(-n // isa.lanes))
    expected = np.maximum(x.astype(np.float64) @ w.decode().T.astype(np.float64) + bias + r, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
