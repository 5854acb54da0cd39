"""Default assignments of every format: reference errors on normal weights, exactness, equivalences, the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.ir.quant import Format, Planes, QuantizedTensor
from qc.passes.quantize.assign import assign

NORMAL = np.random.default_rng(0).standard_normal((48, 4096)).astype(np.float32)

EVERY = [
    "mid1", "mid2:g32", "uint1:g16", "int3:g32:f16", "uint5", "zint4:g32:f16", "uint4:tensor", "int8:in", "uint4:in16",
    "mxfp4", "mxfp6", "mxfp8", "mxint8", "nvfp4", "nf4-dq", "uint4:g16:q6x8", "int4:g16:s6", "nf3:g32:bf16",
    "iq4nl:g32", "bnb4:g64", "e3m0:g32", "e5m2", "shift3", "ternary:tensor", "fpx4:g32", "bitmod3:g32:f16", "bitmod4",
    "lut1", "lut4:g64", "lut3:tensor", "lut3c4:f16", "lut2c2:g16", "nested2-5",
    "bin2:g64", "fdb2:g64", "pow4", "vq4x4", "vq4x2:in", "aq4x4x2",
    "bitstack2x4",
    "lut3+sparse1", "int2:g32+lowrank4", "mid1+columns10:int8", "uint4:g32+order",
]  # fmt: skip


def error(weight: np.ndarray, tensor: QuantizedTensor) -> float:
    return float(np.sum((weight - tensor.decode().astype(np.float64)) ** 2) / np.sum(weight.astype(np.float64) ** 2))


def by_range(spelling: str, weight: np.ndarray = NORMAL) -> float:
    """The error with scales that just reach the largest element of each group, of formats that map 0 to 0."""
    format = Format.parse(spelling)
    assert format.group is not None
    groups = weight.reshape(len(weight), -1, format.group)
    low, high = format.values.reach({})
    scale = np.maximum(groups.max(axis=2) / high, groups.min(axis=2) / low)
    if spelling.endswith("e8m0"):  # the rule of the OCP: the floor of both logarithms
        top = np.abs(groups).max(axis=2)
        scale = np.exp2(np.floor(np.log2(top)) - np.floor(np.log2(high))).astype(np.float32)
    params = format.scale.encode(scale.astype(np.float32))
    return error(weight, QuantizedTensor(format, format.nearest(weight, params), params))


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("nf4:g32:f16", 0.00762), ("nf4:g64:f16", 0.00846), ("nf4:g128:f16", 0.00914), ("e2m1:g32:f16", 0.0102),
        ("e2m1:g64:f16", 0.0112), ("e2m1:g128:f16", 0.0119), ("bnb4:g64:f16", 0.0149), ("e2m1:g32:e8m0", 0.0132),
        ("e2m1:g16:e4m3", 0.00903),
    ],
)  # fmt: skip
def test_fixed_tables_have_the_known_errors_and_search_is_better(spelling: str, expected: float) -> None:
    assert by_range(spelling) == pytest.approx(expected, rel=0.02)
    assert error(NORMAL, assign(NORMAL, Format.parse(spelling))) < expected


@given(spelling=st.sampled_from(EVERY), seed=st.integers(0, 99), kind=st.sampled_from(["normal", "tails", "outlier"]))
@settings(max_examples=60)
def test_any_weight_becomes_finite_numbers_no_further_away_than_zero(spelling: str, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(2, (16, 72)) if kind == "tails" else rng.standard_normal((16, 72))
    if kind == "outlier":
        weight[3, 5] = 1000
    weight = (weight * 10.0 ** rng.integers(-3, 2)).astype(np.float32)
    weight[7] = 0
    tensor = assign(weight, Format.parse(spelling), rng.random(72).astype(np.float32))
    decoded = tensor.decode()
    assert tensor.shape == weight.shape == decoded.shape
    assert np.all(np.isfinite(decoded))
    # One scale cannot serve an outlier and the rest, so only weights without one are sure to come close.
    assert np.sum((weight - decoded) ** 2) <= np.sum(weight**2) * (1.001 if kind == "normal" else 1.2)


@pytest.mark.parametrize("spelling", [s for s in EVERY if not s.startswith(("vq", "aq", "bitstack", "pow"))])
def test_what_the_format_holds_already_is_kept(spelling: str) -> None:
    weight = np.array([[0.5, -0.5], [-0.5, 0.5]], np.float32).repeat(32, axis=1).repeat(4, axis=0)
    if "columns" in spelling:
        spelling = spelling.replace("columns10", "columns50")
    found = assign(weight, Format.parse(spelling)).decode()
    assert np.abs(found - weight).max() < (0.3 if spelling == "uint1:g16" else 0.02)


@pytest.mark.parametrize(("narrow", "wide"), [("uint2:g32", "uint3:g32"), ("lut2", "lut3"), ("bin1", "bin2"),
                                          ("bitstack1x8", "bitstack2x8"), ("nf3:g32", "nf4:g32"),
                                          ("vq4x2", "vq6x2"), ("pow3", "pow4")])  # fmt: skip
def test_more_bits_are_never_worse(narrow: str, wide: str) -> None:
    weight = np.random.default_rng(3).standard_t(4, (32, 128)).astype(np.float32)
    assert error(weight, assign(weight, Format.parse(wide))) <= error(weight, assign(weight, Format.parse(narrow)))


def test_two_binary_planes_are_the_half_offset_grid_of_two_bits() -> None:
    scales = np.array([[0.5, 0.25]], np.float16)
    grid = Format.parse("mid2").decode(np.array([[-2, -1, 0, 1]]), {"scale": np.full((1, 1), 0.5, np.float32)})
    planes = Planes(2).decode(np.array([[0, 2, 1, 3]]), {"plane_scale": scales})
    assert np.array_equal(grid, planes)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_nested_codes_are_read_at_every_width(bits: int) -> None:
    weight = NORMAL[:8, :512]
    nested = assign(weight, Format.parse("nested3-5"))
    values = nested.format.values
    codes, params = values.narrowed(bits, nested.codes, nested.params)  # type: ignore[attr-defined]
    narrow = QuantizedTensor(Format.parse(f"lut{bits}"), codes, {"table": params["table"][:, 0]})
    direct = assign(weight, Format.parse(f"lut{bits}"))
    assert error(weight, narrow) < 1.1 * error(weight, direct)


def test_sparse_places_hold_what_the_dense_part_misses() -> None:
    weight = np.random.default_rng(0).standard_t(2, (64, 256)).astype(np.float32)
    tensor = assign(weight, Format.parse("lut3+sparse0.5"))
    places = np.argsort(-np.abs(weight), axis=None)[: round(weight.size * 0.005)]
    miss = np.abs(weight - tensor.decode()).reshape(-1)[places]
    assert np.all(miss <= np.abs(weight).reshape(-1)[places] * 2**-10)


def test_rows_that_are_distributed_alike_share_a_table() -> None:
    """As good as a table for each row where there are a few kinds of rows, whatever their order and size."""
    rng = np.random.default_rng(0)
    kinds = [rng.standard_t(4, 512), rng.uniform(-1, 1, 512), rng.standard_normal(512)]
    rows = [rng.permutation(kinds[i % 3]) * np.exp(rng.normal()) for i in range(48)]
    weight = np.stack(rows).astype(np.float32)
    shared, alone, one = (assign(weight, Format.parse(s)) for s in ("lut3c3:f16", "lut3", "lut3c1:f16"))
    assert error(weight, shared) < 1.02 * error(weight, alone) < 0.95 * error(weight, one)
    assert shared.stored_bits < 0.98 * alone.stored_bits
    clusters = shared.params["cluster"][:, 0]
    assert [len(set(clusters[k::3].tolist())) for k in range(3)] == [1, 1, 1]


def test_weights_of_columns_change_tables() -> None:
    metric = np.zeros(4096, np.float32)
    metric[:64] = 1
    for spelling in ("lut2", "nf4:f16", "fdb2", "mid2:f16", "vq4x2", "uint2+lowrank2"):
        found = assign(NORMAL[:8], Format.parse(spelling), metric).decode()
        plain = assign(NORMAL[:8], Format.parse(spelling)).decode()
        assert np.sum((found - NORMAL[:8])[:, :64] ** 2) < np.sum((plain - NORMAL[:8])[:, :64] ** 2), spelling


def test_low_rank_takes_up_what_is_of_low_rank() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((64, 3)) @ rng.standard_normal((3, 96))).astype(np.float32)
    assert error(weight, assign(weight, Format.parse("uint2:g32+lowrank3"))) < 1e-5


def test_a_searched_float_is_as_good_as_the_best_of_its_kinds() -> None:
    weight = np.random.default_rng(0).standard_t(3, (32, 256)).astype(np.float32)
    found = error(weight, assign(weight, Format.parse("fpx4:f16")))
    kinds = [error(weight, assign(weight, Format.parse(f"{name}:f16"))) for name in ("e1m2", "e2m1", "e3m0")]
    assert found == pytest.approx(min(kinds), rel=1e-3)
