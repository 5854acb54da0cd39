from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.packing import pack_codes, pack_tensor, unpack_codes
from qc.ir.quant import Affine


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b00_00_00_11]),
        (4, [0x1, 0x2, 0xF], [0x21, 0x0F]),
        (8, [0x00, 0x80, 0xFF], [0x00, 0x80, 0xFF]),
    ],
)
def test_codes_fill_a_byte_from_its_lowest_bits(bits, codes, expected):
    assert pack_codes(np.array([codes]), bits).tolist() == [expected]


def test_a_row_is_padded_with_zeros_to_its_width():
    assert pack_codes(np.array([[7], [9]]), 4, width=4).tolist() == [[7, 0], [9, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 16, 33])
def test_unpacking_returns_the_codes_that_were_packed(bits, columns):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, columns)).astype(np.uint8)
    assert np.array_equal(unpack_codes(pack_codes(codes, bits, 64), bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 50])
def test_a_stored_tensor_packs_like_its_codes_above_the_lowest(bits, symmetric, columns):
    values = Affine(bits, symmetric)
    codes = np.random.default_rng(0).integers(values.low, values.high + 1, (5, columns))
    stored = ir.tensor(codes.astype(np.int8 if symmetric else np.uint8), dtype=values.dtype)
    packed = pack_tensor(stored, values, 64)
    assert packed.dtype == np.uint8
    assert np.array_equal(packed, pack_codes(codes - values.low, bits, 64))


def test_a_symmetric_code_is_offset_to_the_implicit_zero_point_of_the_kernel():
    stored = ir.tensor(np.array([[-8, -1, 0, 7]], np.int8), dtype=ir.DataType.INT4)
    assert pack_tensor(stored, Affine(4), 4).tolist() == [[0x70, 0xF8]]
