"""Errors of formats on normal weights, with the parameters that the rules of their papers give, against known ones.

The known errors are ``|w - decoded|^2 / |w|^2`` of 512 x 4096 standard normal numbers, with scales in half precision,
computed without this code. What our own search finds is measured beside the rules: it must not be worse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from qc.ir.quant import Format, QuantizedTensor
from qc.passes.quantize.assign import assign

WEIGHT = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32)[:64]


def error(decoded: np.ndarray, weight: np.ndarray = WEIGHT) -> float:
    return float(np.sum((weight - decoded.astype(np.float64)) ** 2) / np.sum(weight.astype(np.float64) ** 2))


@functools.cache
def ours(spelling: str) -> float:
    return error(assign(WEIGHT, Format.parse(spelling)).decode())


def decoded(spelling: str, **params: np.ndarray) -> np.ndarray:
    """What the nearest codes under some parameters decode to."""
    format = Format.parse(spelling)
    stored = format.scale.encode(params.pop("scale").astype(np.float32)) if "scale" in params else {}
    held = stored | params
    return QuantizedTensor(format, format.nearest(WEIGHT, held), held).decode()


def grouped(width: int) -> np.ndarray:
    return WEIGHT.reshape(len(WEIGHT), -1, width)


def largest(width: int) -> np.ndarray:
    return np.abs(grouped(width)).max(axis=2)


def symmetric(bits: int, width: int) -> np.ndarray:
    return decoded(f"int{bits}:g{width}:f16", scale=largest(width) / (2 ** (bits - 1) - 1))


def asymmetric(bits: int, width: int) -> np.ndarray:
    low, high = np.minimum(grouped(width).min(2), 0), np.maximum(grouped(width).max(2), 0)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, 2**bits - 1).astype(np.uint8)
    return decoded(f"uint{bits}:g{width}:f16", scale=scale, zero_point=zero)


@pytest.mark.parametrize(
    ("bits", "width", "of_symmetric", "of_asymmetric"),
    [
        (4, 32, 0.00941, 0.00653), (4, 64, 0.01159, 0.00830), (4, 128, 0.01376, 0.01011), (4, 4096, 0.0249, 0.0195),
        (3, 128, 0.0749, 0.0464), (3, 32, None, 0.0300), (3, 64, None, 0.0381), (2, 128, 0.587, 0.253),
    ],
)  # fmt: skip
def test_integers_with_the_range_of_their_group(
    bits: int, width: int, of_symmetric: float | None, of_asymmetric: float
) -> None:
    assert error(asymmetric(bits, width)) == pytest.approx(of_asymmetric, rel=0.02)
    if of_symmetric is not None:
        assert error(symmetric(bits, width)) == pytest.approx(of_symmetric, rel=0.02)


def test_8_bits_have_an_error_of_four_hundred_thousandths() -> None:
    assert round(error(symmetric(8, 128)), 5) == round(error(asymmetric(8, 128)), 5) == 0.00004


@pytest.mark.parametrize(
    ("spelling", "known"),
    [
        ("uint4:g128:f16", 0.00903),
        ("uint3:g128:f16", 0.0348),
        ("uint2:g128:f16", 0.136),
        ("mid2:g128:f16", 0.116),
        ("mid1:f16", 0.3635),
    ],
)
def test_integers_with_a_searched_range(spelling: str, known: float) -> None:
    assert 0.96 * known < ours(spelling) < 1.02 * known


def bitmod(bits: int) -> np.ndarray:
    """Each special value with the scale that reaches the largest weight; the best of the four per group."""
    name = f"bitmod{bits}:g128:f16"
    tables = Format.parse(name).values.values  # type: ignore[attr-defined]
    tried = []
    for kind, table in enumerate(tables):
        kinds = np.full(largest(128).shape, kind, np.uint8)
        tried.append(decoded(name, scale=largest(128) / np.abs(table).max(), kind=kinds).reshape(grouped(128).shape))
    best = np.argmin([((t - grouped(128)) ** 2).sum(2) for t in tried], axis=0)
    return np.choose(best[..., None], tried).reshape(WEIGHT.shape)


def power(exponent: float) -> np.ndarray:
    """Integers of powers, scaled to the largest of each row (PowerQuant)."""
    format = Format.parse("pow4:f16")
    raised = np.abs(WEIGHT) ** np.float32(exponent)
    step = raised.max(1, keepdims=True) / 7
    codes = (np.sign(WEIGHT) * np.rint(raised / step)).astype(np.int8)
    params = format.scale.encode(step ** np.float32(1 / exponent))
    return QuantizedTensor(format, codes, params | {"exponent": np.float32([exponent])}).decode()


def planes(count: int) -> np.ndarray:
    """Signs of what is left, times their mean, one plane after the other."""
    left, total = WEIGHT.copy(), np.zeros_like(WEIGHT)
    for _ in range(count):
        plane = np.sign(left) * np.abs(left).mean(1, keepdims=True)
        left, total = left - plane, total + plane
    return total


def bell() -> np.ndarray:
    """A sign and a mean of magnitudes for either side of a threshold (BiLLM), as tables of four values per row."""
    inner = np.abs(WEIGHT) < 0.98
    means = [(np.abs(WEIGHT) * zone).sum(1) / zone.sum(1) for zone in (inner, ~inner)]
    table = np.stack([-means[1], -means[0], means[0], means[1]], axis=1)[:, None]
    return decoded("lut2", table=table.astype(np.float16))


def flexible() -> np.ndarray:
    """Two planes of zeros and ones that start as symmetric 2-bit integers (DB-LLM)."""
    scale = largest(64) / 2
    return decoded("fdb2:g64", plane_scale=np.stack([2 * scale, -scale], axis=-1).astype(np.float16))


def ternary(start: float, *, refit: bool) -> np.ndarray:
    found = decoded("ternary:tensor", scale=np.float32([[start]]))
    return found * (np.vdot(WEIGHT, found) / np.vdot(found, found)) if refit else found


def threshold_ternary() -> np.ndarray:
    """Signs above 0.7 of the mean magnitude, times the mean of what is above (TWN)."""
    limit = 0.7 * np.abs(WEIGHT).mean()
    level = np.abs(WEIGHT)[np.abs(WEIGHT) > limit].mean()
    return np.sign(WEIGHT) * level * (np.abs(WEIGHT) > limit)


MEAN, MEDIAN = float(np.abs(WEIGHT).mean()), float(np.median(np.abs(WEIGHT)))


@pytest.mark.parametrize(
    ("rule", "known", "spelling"),
    [
        (lambda: bitmod(3), 0.0380, "bitmod3:g128:f16"),
        (lambda: bitmod(4), 0.00958, "bitmod4:g128:f16"),
        (lambda: power(0.5), 0.0207, "pow4:f16"),
        (lambda: power(0.55), 0.0195, "pow4:f16"),
        (lambda: power(0.7), 0.0183, "pow4:f16"),
        (lambda: power(1), 0.0249, "pow4:f16"),
        (lambda: planes(1), 0.3635, "bin1"),
        (lambda: planes(2), 0.1306, "bin2"),
        (bell, 0.1179, "lut2"),
        (flexible, 0.169, "fdb2:g64"),
        (lambda: ternary(MEAN, refit=False), 0.264, "ternary:tensor"),
        (lambda: ternary(MEAN, refit=True), 0.213, "ternary:tensor"),
        (lambda: ternary(MEDIAN, refit=False), 0.318, "ternary:tensor"),
        (lambda: ternary(MEDIAN, refit=True), 0.228, "ternary:tensor"),
        (threshold_ternary, 0.192, "ternary:tensor"),
    ],
)
def test_rules_of_papers_have_the_known_errors_and_our_choice_is_no_worse(
    rule: Callable[[], np.ndarray], known: float, spelling: str
) -> None:
    found = error(rule())
    assert found == pytest.approx(known, rel=0.02)
    assert ours(spelling) < 1.005 * found


@pytest.mark.parametrize(
    ("spelling", "known"),
    [("lut1", 0.363), ("lut2", 0.1175), ("lut3", 0.0344), ("bin2", 0.1177), ("fdb2:g64", 0.131),
     ("shift2:tensor", 0.1586), ("shift3:tensor", 0.0441), ("shift4:tensor", 0.0377)],
)  # fmt: skip
def test_values_that_are_fitted_have_the_known_errors(spelling: str, known: float) -> None:
    assert ours(spelling) == pytest.approx(known, rel=0.02)


def test_tables_of_many_values_fit_each_row_a_little_better_than_the_normal_distribution() -> None:
    tensor = assign(WEIGHT, Format.parse("nested3-5"))
    found = {"lut4": ours("lut4")}
    for bits in (3, 4, 5):
        codes = (tensor.codes >> (5 - bits)).astype(np.int64)
        values = np.take_along_axis(tensor.params[f"table{bits}"][:, 0].astype(np.float32), codes, axis=1)
        found[f"nested {bits}"] = error(values)
    for name, known in {"lut4": 0.0095, "nested 3": 0.0344, "nested 4": 0.0095, "nested 5": 0.0025}.items():
        assert 0.96 * known < found[name] < 1.02 * known, name


def test_signed_low_rank_blocks_have_the_known_errors() -> None:
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    found = [error(assign(weight, Format.parse(f"bitstack{n}x16")).decode(), weight) for n in range(1, 6)]
    assert found == pytest.approx([0.324, 0.105, 0.040, 0.017, 0.0087], rel=0.03)  # two digits
