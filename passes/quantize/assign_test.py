"""Range search against published errors, its invariants, and the edges of float arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.ir.errors import InputError
from qc.ir.quant import Format, QuantizedTensor
from qc.passes.quantize.assign import Search, assign, sqnr_db

SPELLINGS = [
    f"{name}{group}" for name in ("int2", "uint2", "int4", "uint4", "int8", "uint8") for group in (":g16", ":g32", "")
]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def heavy_tailed(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def error(weight: np.ndarray, tensor: QuantizedTensor) -> float:
    difference = weight.astype(np.float64) - tensor.decode()
    return float(np.sum(difference**2) / np.sum(weight.astype(np.float64) ** 2))


def absmax(weight: np.ndarray, format: Format) -> QuantizedTensor:
    """The rule that range search competes with: the range of a group is that of its entries."""
    rows, columns = weight.shape
    width = columns if format.group is None else format.group
    padded = np.pad(weight, ((0, 0), (0, -columns % width))).reshape(rows, -1, width)
    low, high = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
    bits, zero = format.values.bits, np.float32(0)
    if format.values.symmetric:
        scale = np.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        scale = (high - low) / (2**bits - 1)
    scale = np.where(scale == 0, 1, scale).astype(format.scale.dtype.numpy())
    if not format.values.symmetric:
        zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, 2**bits - 1)[..., None]
    codes = np.rint(padded / scale[..., None].astype(np.float32)) + zero
    codes = np.clip(codes, format.values.low, format.values.high).reshape(rows, -1)[:, :columns]
    params = {"scale": scale} | ({} if format.values.symmetric else {"zero_point": zero[..., 0].astype(np.uint8)})
    return QuantizedTensor(format, codes.astype(np.int16), params)


@pytest.mark.parametrize(
    ("spelling", "absmax_error", "search_error"),
    [
        ("int4:g32:f16", 0.00941, 0.00656),
        ("int4:g64:f16", 0.01159, 0.00809),
        ("int4:g128:f16", 0.01376, 0.00935),
        ("int4:f16", 0.0249, 0.01170),
        ("uint4:g32:f16", 0.00653, 0.00589),
        ("uint4:g64:f16", 0.00830, 0.00758),
        ("uint4:g128:f16", 0.01011, 0.00903),
        ("uint4:f16", 0.0195, 0.01162),
        ("int2:g128:f16", 0.587, 0.1360),
        ("uint2:g128:f16", 0.253, 0.1320),
        ("int8:g128:f16", 4.2e-5, 3.87e-5),
        ("uint8:g128:f16", 3.6e-5, 3.30e-5),
    ],
)
def test_errors_on_normal_weights_are_the_known_ones(spelling: str, absmax_error: float, search_error: float) -> None:
    weight, format = normal(512, 4096)[:64], Format.parse(spelling)
    assert error(weight, absmax(weight, format)) == pytest.approx(absmax_error, rel=0.04)
    assert error(weight, assign(weight, format)) == pytest.approx(search_error, rel=0.02)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_weight_matrix_comes_out_worse_than_by_absmax(spelling: str) -> None:
    format = Format.parse(spelling)
    outlier = normal(8, 96)
    outlier[3, 5] = 1000.0
    for weight in (normal(8, 96), heavy_tailed(8, 96), outlier, np.abs(normal(8, 96)) + 3):
        assert error(weight, assign(weight, format)) <= error(weight, absmax(weight, format)) * (1 + 1e-5) + 1e-13


@given(
    spelling=st.sampled_from(SPELLINGS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1000),
    scale_type=st.sampled_from(["", ":f16"]),
)
@settings(max_examples=150, deadline=None)
def test_codes_are_the_nearest_ones_for_the_stored_scale(
    spelling: str, rows: int, columns: int, seed: int, scale_type: str
) -> None:
    weight, format = heavy_tailed(rows, columns, seed=seed), Format.parse(spelling + scale_type)
    tensor = assign(weight, format)
    width = columns if format.group is None else format.group
    scale = np.repeat(tensor.params["scale"].astype(np.float32), width, axis=1)[:, :columns]
    inside = (tensor.codes > format.values.low) & (tensor.codes < format.values.high)
    gap = np.abs(weight - tensor.decode())
    assert np.all(gap[inside] <= np.abs(scale[inside]) * 0.5001 + 1e-30)
    for step in (-1, 1):
        neighbour = np.clip(tensor.codes.astype(np.int16) + step, format.values.low, format.values.high)
        other = format.decode(neighbour, tensor.params)
        assert np.all(gap <= np.abs(weight - other) + 1e-5 * np.abs(weight))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_encoding_the_decoded_weight_with_its_scale_gives_the_same_codes(spelling: str) -> None:
    format = Format.parse(spelling)
    tensor = assign(heavy_tailed(6, 50), format)
    width = 50 if format.group is None else format.group
    scale, zero = (
        np.repeat(p.astype(np.float32), width, axis=1)[:, :50]
        for p in (tensor.params["scale"], tensor.params.get("zero_point", np.zeros_like(tensor.params["scale"])))
    )
    assert np.array_equal(np.rint(tensor.decode() / scale) + zero, tensor.codes)


@given(spelling=st.sampled_from(SPELLINGS), power=st.integers(-60, 60))
@settings(max_examples=60, deadline=None)
def test_scaling_a_weight_by_a_power_of_two_scales_what_it_decodes_to(spelling: str, power: int) -> None:
    weight, format = normal(3, 40), Format.parse(spelling)
    plain, scaled = assign(weight, format), assign(np.ldexp(weight, power), format)
    assert np.array_equal(plain.codes, scaled.codes)
    assert np.array_equal(np.ldexp(plain.decode(), power), scaled.decode())


@pytest.mark.parametrize("spelling", ["int4:g32", "uint4:g16", "int8", "uint2"])
def test_the_result_depends_on_neither_threads_nor_neighbouring_rows(spelling: str) -> None:
    weight, format = normal(300, 700), Format.parse(spelling)
    one, three = assign(weight, format), assign(weight, format, threads=3)
    part = assign(weight[90:97], format)
    for key in one.params:
        assert np.array_equal(one.params[key], three.params[key])
        assert np.array_equal(one.params[key][90:97], part.params[key])
    assert np.array_equal(one.codes, three.codes)
    assert np.array_equal(one.codes[90:97], part.codes)


@pytest.mark.parametrize("spelling", ["int4:g32", "uint4:g32", "int2:g16", "uint8:g16"])
def test_a_shorter_last_group_is_quantized_as_if_it_stood_alone(spelling: str) -> None:
    weight, format = normal(4, 73), Format.parse(spelling)
    width = format.group
    assert width is not None
    whole, full = assign(weight, format), 73 // width * width
    last = assign(np.pad(weight[:, full:], ((0, 0), (0, width - 73 + full))), format)
    assert np.array_equal(whole.codes[:, :full], assign(weight[:, :full], format).codes)
    assert np.array_equal(whole.codes[:, full:], last.codes[:, : 73 - full])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_groups_of_zeros_have_scale_one_and_decode_to_zero(spelling: str) -> None:
    weight = normal(4, 64)
    weight[1] = 0
    weight[2, :32] = 0
    tensor = assign(weight, Format.parse(spelling))
    assert np.all(tensor.params["scale"][1] == 1)
    assert not tensor.decode()[1].any()
    assert not tensor.decode()[2, :32].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_that_the_format_holds_exactly_is_kept(bits: int, symmetric: bool) -> None:
    format = Format.parse(f"{'' if symmetric else 'u'}int{bits}:g32")
    codes = np.random.default_rng(bits).integers(format.values.low, format.values.high + 1, (8, 64))
    codes[:, ::32], codes[:, 1::32] = format.values.low, format.values.high
    if bits == 8 and symmetric:
        codes = np.maximum(codes, -127)
    params = {"scale": np.full((8, 2), 0.37, np.float32)}
    if not symmetric:
        params["zero_point"] = np.full((8, 2), 1 << (bits - 1), np.uint8)
    weight = format.decode(codes, params)
    assert error(weight, assign(weight, format)) < 1e-12


def test_more_bits_and_shorter_groups_never_hurt() -> None:
    weight = heavy_tailed(16, 512)
    for prefix in ("int", "uint"):
        by_bits = [error(weight, assign(weight, Format.parse(f"{prefix}{b}:g32"))) for b in (2, 4, 8)]
        by_group = [error(weight, assign(weight, Format.parse(f"{prefix}4{g}"))) for g in ("", ":g128", ":g32", ":g16")]
        assert by_bits == sorted(by_bits, reverse=True)
        assert by_group == sorted(by_group, reverse=True)


def test_symmetric_codes_use_the_side_with_one_more_code_for_the_largest_entry() -> None:
    weight = np.zeros((2, 16), np.float32)
    weight[0, :9], weight[1, :9] = np.arange(9), -np.arange(9)
    tensor = assign(weight, Format.parse("int4:g16"))
    assert np.array_equal(tensor.params["scale"], [[-1], [1]])
    assert np.array_equal(tensor.decode(), weight)


@pytest.mark.parametrize("spelling", ["int4:g32", "uint4:g32", "int2", "uint8:g16"])
def test_a_metric_moves_the_error_to_columns_that_matter_less(spelling: str) -> None:
    weight, format = heavy_tailed(32, 96), Format.parse(spelling)
    metric = np.random.default_rng(1).gamma(0.3, size=96).astype(np.float32)
    plain, weighted = (weight - assign(weight, format, m).decode() for m in (None, metric))
    assert np.sum(metric * weighted**2) < np.sum(metric * plain**2)


def test_a_constant_metric_changes_nothing_even_if_it_is_zero() -> None:
    weight, format = normal(4, 70), Format.parse("uint4:g32")
    plain = assign(weight, format)
    for value in (0.0, 1.0, 4.0):
        assert np.array_equal(plain.codes, assign(weight, format, np.full(70, value)).codes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_narrower_and_wider_weights_are_read_as_float32(dtype: type) -> None:
    weight, format = normal(5, 64).astype(dtype), Format.parse("int4:g32")
    assert np.array_equal(assign(weight, format).codes, assign(weight.astype(np.float32), format).codes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spelling", ["int4:g32", "uint4"])
def test_numbers_that_are_not_finite_are_refused_with_the_name_of_the_weight(value: float, spelling: str) -> None:
    weight = normal(40, 64)
    weight[33, 7] = value
    with pytest.raises(InputError, match=r"'layers\.0\.up'.*rows 0 to 39"):
        assign(weight, Format.parse(spelling), name="layers.0.up")


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1e20, 3e37])
@pytest.mark.parametrize("spelling", ["int4:g32", "uint4", "int8", "uint2:g16"])
def test_extreme_magnitudes_neither_overflow_nor_divide_by_zero(magnitude: float, spelling: str) -> None:
    weight = (normal(4, 64) * magnitude).astype(np.float32)
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        tensor = assign(weight, Format.parse(spelling))
    assert np.all(np.isfinite(tensor.decode()))
    assert np.all(tensor.params["scale"] != 0)
    if magnitude > 1e-30:
        bound = {2: 0.25, 4: 0.03, 8: 1e-3}[tensor.format.values.bits]
        assert error(weight / np.float32(magnitude), assign(weight / np.float32(magnitude), tensor.format)) < bound


def test_scales_in_half_precision_never_round_to_zero_and_never_overflow() -> None:
    tiny = assign(normal(2, 32) * 1e-9, Format.parse("int4:g32:f16"))
    assert np.all(np.abs(tiny.params["scale"]) > 0)
    with pytest.raises(InputError, match=r"'head'.*FLOAT16.*f32"):
        assign(normal(2, 32) * 1e7, Format.parse("int4:g32:f16"), name="head")


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 8), (8, 0)])
def test_only_matrices_are_quantized(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"matrix \[N, K\]"):
        assign(np.zeros(shape, np.float32), Format.parse("int4:g32"))


@pytest.mark.parametrize("metric", [np.ones(7), -np.ones(8), np.full(8, np.nan)])
def test_a_metric_must_weigh_every_column(metric: np.ndarray) -> None:
    with pytest.raises(InputError, match="non-negative weights of 8 columns"):
        assign(normal(2, 8), Format.parse("int4:g32"), metric)


def test_a_single_weight_is_exact() -> None:
    for spelling in SPELLINGS:
        assert assign(np.array([[-2.5]], np.float32), Format.parse(spelling)).decode() == pytest.approx(-2.5, rel=1e-6)


def test_a_harder_search_finds_no_more_than_a_percent() -> None:
    weight = heavy_tailed(16, 512)
    for spelling in ("int4:g32", "uint4:g32", "int2:g32", "uint2:g32"):
        format = Format.parse(spelling)
        hard = assign(weight, format, effort=Search(60, (-0.02, -0.01, -0.005, 0.005, 0.01, 0.02), 4))
        assert error(weight, hard) > 0.99 * error(weight, assign(weight, format))


def test_sqnr_is_that_of_the_decoded_weight() -> None:
    weight = normal(100, 1000)
    tensor = assign(weight, Format.parse("uint4:g32"))
    assert sqnr_db(weight, tensor, threads=2) == pytest.approx(-10 * np.log10(error(weight, tensor)), abs=1e-4)
    exact = assign(np.zeros((2, 32), np.float32), Format.parse("int4:g32"))
    assert sqnr_db(np.zeros((2, 32)), exact) == np.inf


@pytest.mark.parametrize(
    "spelling",
    ["uint3:g16", "mid2:g16:f16", "lut2", "lut2:tensor", "uint2:in8", "vq4x2:in", "vq4x2", "bin2", "nf4:f16"],
)
def test_weights_of_elements_that_are_those_of_columns_choose_the_same(spelling: str) -> None:
    weight, metric = normal(16, 64), np.random.default_rng(1).random(64).astype(np.float32)
    by_column = assign(weight, Format.parse(spelling), metric)
    by_element = assign(weight, Format.parse(spelling), np.tile(metric, (16, 1)))
    assert np.array_equal(by_column.codes, by_element.codes)
    assert all(np.array_equal(by_element.params[k], v) for k, v in by_column.params.items())


@pytest.mark.parametrize("spelling", ["uint2:g16", "lut2", "lut2+sparse2", "uint2:in8", "vq4x2", "fdb2:g16",
                                      "uint2:g16+lowrank4", "bin1+columns20:int4"])  # fmt: skip
def test_weights_of_elements_lower_their_weighted_error(spelling: str) -> None:
    weight, metric = normal(32, 64), np.exp(2 * normal(32, 64, seed=1))
    weighted, plain = (
        np.sum(metric * (weight - assign(weight, Format.parse(spelling), m).decode()) ** 2) for m in (metric, None)
    )
    assert weighted < plain
