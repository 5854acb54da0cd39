"""Rounding with feedback against the published algorithm, its invariants, and edge cases of second moments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.ir.errors import InputError
from qc.ir.quant import Format, QuantizedTensor
from qc.passes.quantize._refit import refit
from qc.passes.quantize.assign import assign
from qc.passes.quantize.gptq import Hessian, gptq, output_sqnr_db

SPELLINGS = ["int4:g32", "uint4:g16", "uint2:g32:f16", "int8", "uint4:f16"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(columns: int, samples: int = 2000, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that share factors and differ in size, as activations do."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    x = rng.standard_normal((samples, columns)) @ (np.eye(columns) + 0.05 * factors)
    return x.T @ x / samples


def damped(gram: np.ndarray, damping: float = 0.01) -> np.ndarray:
    return gram + damping * np.diagonal(gram).mean() * np.eye(len(gram))


def loss(weight: np.ndarray, tensor: QuantizedTensor, gram: np.ndarray) -> float:
    difference = weight.astype(np.float64) - tensor.decode()
    return float(np.einsum("nk,nk->", difference @ gram, difference))


def published(weight: np.ndarray, tensor: QuantizedTensor, gram: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Decoded weights by the algorithm as published: errors are spread with the inverse of the matrix."""
    work, width = weight.astype(np.float64), tensor.format.group or weight.shape[1]
    upper = np.linalg.cholesky(np.linalg.inv(damped(gram)[np.ix_(order, order)])).T
    scale, zero = tensor.params["scale"].astype(np.float64), tensor.params.get("zero_point")
    decoded = np.empty_like(work)
    for place, k in enumerate(order):
        s, z = scale[:, k // width], 0.0 if zero is None else zero[:, k // width].astype(np.float64)
        codes = np.clip(np.rint(work[:, k] / s) + z, tensor.format.values.low, tensor.format.values.high)
        decoded[:, k] = (codes - z) * s
        error = (work[:, k] - decoded[:, k]) / upper[place, place]
        work[:, order[place:]] -= np.outer(error, upper[place, place:])
    return decoded


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("order_by_size", [False, True])
def test_codes_are_those_of_the_published_algorithm(spelling: str, order_by_size: bool) -> None:
    weight, gram = normal(24, 300), correlated(300)
    hessian = Hessian(gram, order_by_size=order_by_size)
    tensor = gptq(weight, Format.parse(spelling), hessian)
    expected = published(weight, tensor, gram, hessian.order)
    agree = np.abs(tensor.decode() - expected) <= 1e-4 * np.abs(expected) + 1e-6
    assert agree.mean() > 0.999  # a tie in float32 may fall to the other side in float64


def test_columns_are_taken_by_falling_second_moment() -> None:
    assert Hessian(np.diag([1.0, 3.0, 2.0, 3.0])).order.tolist() == [1, 3, 2, 0]
    assert Hessian(np.diag([1.0, 3.0, 2.0]), order_by_size=False).order.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 100, 600])
def test_the_factor_gives_the_matrix(size: int) -> None:
    gram = correlated(size)
    hessian = Hessian(gram)
    unit = np.triu(hessian.feedback, 1) + np.eye(size)
    factor = unit * hessian.pivots
    expected = damped(gram)[np.ix_(hessian.order, hessian.order)]
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_inputs_that_do_not_correlate_leave_nothing_to_make_up_for(spelling: str) -> None:
    weight, format = normal(12, 96), Format.parse(spelling)
    nearest, rounded = assign(weight, format), gptq(weight, format, Hessian(np.eye(96)))
    assert np.array_equal(nearest.codes, rounded.codes)
    assert np.array_equal(nearest.params["scale"], rounded.params["scale"])


@pytest.mark.parametrize("sweeps", [0, 2])
def test_a_weight_that_the_format_holds_is_kept(sweeps: int) -> None:
    format = Format.parse("int4:g16")
    weight = assign(normal(8, 64), format).decode()
    tensor = gptq(weight, format, Hessian(correlated(64)), sweeps=sweeps)
    np.testing.assert_allclose(tensor.decode(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_outputs_are_closer_than_by_search_and_closer_still_after_sweeps(spelling: str) -> None:
    weight, gram, format = normal(32, 256), correlated(256), Format.parse(spelling)
    hessian = Hessian(gram)
    by_search = loss(weight, assign(weight, format, np.diagonal(gram)), gram)
    by_feedback = loss(weight, gptq(weight, format, hessian), gram)
    polished = loss(weight, gptq(weight, format, hessian, sweeps=4), gram)
    assert polished < by_feedback < by_search


@given(spelling=st.sampled_from(SPELLINGS), columns=st.integers(20, 90), seed=st.integers(0, 100))
@settings(max_examples=30)
def test_no_sweep_increases_the_error(spelling: str, columns: int, seed: int) -> None:
    weight, gram, format = normal(6, columns, seed=seed), correlated(columns, seed=seed), Format.parse(spelling)
    hessian = Hessian(gram)
    errors = [loss(weight, gptq(weight, format, hessian, sweeps=n), damped(gram)) for n in range(4)]
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 5e-3)  # scales are rounded to half precision, and pulls summed in float32


def test_after_sweeps_no_single_code_can_be_improved() -> None:
    weight, gram, format = normal(6, 48), correlated(48), Format.parse("uint4:g16")
    tensor = gptq(weight, format, Hessian(gram), sweeps=30)
    least = loss(weight, tensor, damped(gram))
    for row, column in np.ndindex(6, 48):
        for step in (-1, 1):
            codes = tensor.codes.astype(np.int16)
            codes[row, column] += step
            if 0 <= codes[row, column] <= format.values.high:
                other = QuantizedTensor(format, codes, tensor.params)
                assert loss(weight, other, damped(gram)) >= least * (1 - 1e-6)


def test_neither_threads_nor_neighbouring_rows_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qc.passes.quantize.gptq.ROWS", 16)
    weight, hessian, format = normal(64, 128), Hessian(correlated(128)), Format.parse("uint4:g32")
    one, three = (gptq(weight, format, hessian, sweeps=1, threads=n) for n in (1, 3))
    part = gptq(weight[16:32], format, hessian, sweeps=1)
    assert np.array_equal(one.codes, three.codes)
    assert np.array_equal(one.codes[16:32], part.codes)
    assert np.array_equal(one.params["scale"], three.params["scale"])


def test_dead_channels_are_rounded_to_nearest() -> None:
    weight, gram, format = normal(16, 64), correlated(64), Format.parse("int4:g16")
    gram[:, 10:14] = gram[10:14, :] = 0
    hessian = Hessian(gram)
    tensor = gptq(weight, format, hessian)
    assert hessian.dead == 4
    assert "4 of 64" in str(hessian.remarks()["inputs"])
    scale = tensor.params["scale"][:, [0]]
    expected = np.clip(np.rint(weight[:, 10:14] / scale), -8, 7)
    assert np.array_equal(tensor.codes[:, 10:14], expected)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_fewer_samples_than_channels_are_enough(rank: int) -> None:
    x = np.random.default_rng(0).standard_normal((rank, 64))
    weight, gram = normal(16, 64), x.T @ x
    hessian = Hessian(gram)
    tensor = gptq(weight, Format.parse("int4:g16"), hessian, sweeps=1)
    assert np.isfinite(tensor.decode()).all()
    assert hessian.damping == 0.01
    assert rank == 0 or "fewer samples than channels" in str(hessian.remarks()["directions"])
    nearest = assign(weight, Format.parse("int4:g16"), np.diagonal(gram))
    assert loss(weight, tensor, gram) <= loss(weight, nearest, gram)


def test_an_ill_conditioned_matrix_is_no_obstacle() -> None:
    scales = 10.0 ** np.linspace(-12, 12, 64)
    gram = correlated(64) * np.outer(scales, scales)
    hessian = Hessian(gram)
    tensor = gptq(normal(16, 64), Format.parse("int4:g16"), hessian, sweeps=1)
    assert np.isfinite(tensor.decode()).all()
    assert "hardly vary in" in str(hessian.remarks()["directions"])


def test_second_moments_of_enough_samples_need_no_remark() -> None:
    assert Hessian(correlated(64)).remarks() == {}


def test_damping_is_raised_until_the_matrix_is_positive_definite() -> None:
    gram = correlated(64)
    gram -= 1.3 * np.linalg.eigvalsh(gram)[-1] / 64 * np.ones((64, 64)) + 0.5 * np.diag(np.diagonal(gram))
    np.fill_diagonal(gram, np.abs(np.diagonal(gram)))
    hessian = Hessian(gram)
    assert hessian.damping > 0.01
    assert "raised" in str(hessian.remarks()["damping"])
    assert np.isfinite(gptq(normal(4, 64), Format.parse("int4:g16"), hessian).decode()).all()


@pytest.mark.parametrize(
    "gram", [np.full((4, 4), np.nan), -np.eye(4), np.ones((4, 3)), 1e6 * (1 - np.eye(4)) + np.eye(4)]
)
def test_what_cannot_be_second_moments_is_refused(gram: np.ndarray) -> None:
    with pytest.raises(InputError, match="second moments"):
        Hessian(gram)


def test_the_error_of_outputs_is_that_of_their_samples() -> None:
    x, weight = normal(500, 48), normal(20, 48)
    tensor = assign(weight, Format.parse("int4:g16"))
    signal, noise = x @ weight.T, x @ (weight - tensor.decode()).T
    expected = 10 * np.log10(np.sum(signal**2) / np.sum(noise**2))
    assert output_sqnr_db(weight, tensor, x.T @ x / 500) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "spelling",
    [
        "nf4:g32:f16", "mxfp4", "bitmod3:g32:f16", "lut3", "lut3c4:f16", "mid2:g32", "zint3:g32:f16", "uint3:g32:q6",
        "fdb2:g64", "pow3", "lut3+sparse1", "uint3:g32+lowrank4", "uint3:g32+order", "mid1+columns25:int4",
    ],
)  # fmt: skip
def test_any_format_with_a_code_per_element_gains_from_feedback(spelling: str) -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((512, 128)) @ rng.standard_normal((128, 128)) * np.geomspace(1, 0.1, 128)
    gram = (mixed.T @ mixed / len(mixed)).astype(np.float32)
    weight, format = rng.standard_normal((64, 128)).astype(np.float32), Format.parse(spelling)
    hessian = Hessian(gram)
    found, plain = gptq(weight, format, hessian), assign(weight, format, hessian.diagonal)
    assert output_sqnr_db(weight, found, gram) > output_sqnr_db(weight, plain, gram) + 0.5
    assert found.stored_bits == plain.stored_bits


@pytest.mark.parametrize("spelling", ["bitstack1x4", "int8:tensor"])
def test_formats_whose_codes_depend_on_one_another_otherwise_are_refused(spelling: str) -> None:
    with pytest.raises(InputError, match="by columns alone"):
        gptq(np.ones((16, 16), np.float32), Format.parse(spelling), Hessian(np.eye(16, dtype=np.float32)))


VECTORS = [
    "vq4x4",
    "vq4x4:in",
    "vq5x2:g8",
    "aq4x4x2",
    "aq4x4x2:in",
    "aq5x4:g16:f16",
    "uint2:in8",
    "lut2:in",
    "nf3:in:f16",
]


@pytest.mark.parametrize("spelling", VECTORS)
def test_vectors_and_groups_along_n_gain_from_feedback_and_from_sweeps(spelling: str) -> None:
    weight, gram, format = normal(48, 96), correlated(96), Format.parse(spelling)
    by_search = loss(weight, assign(weight, format, np.diagonal(gram)), gram)
    by_feedback = loss(weight, gptq(weight, format, Hessian(gram)), gram)
    assert loss(weight, gptq(weight, format, Hessian(gram), sweeps=2), gram) < by_feedback < 0.9 * by_search


@pytest.mark.parametrize("spelling", VECTORS)
def test_inputs_that_do_not_correlate_leave_vectors_the_nearest_codes(spelling: str) -> None:
    weight, format = normal(16, 48), Format.parse(spelling)
    assert np.array_equal(assign(weight, format).codes, gptq(weight, format, Hessian(np.eye(48))).codes)


def test_a_vector_of_columns_gets_the_code_of_least_error_for_what_came_before() -> None:
    """Each tile by brute force: the rest of the row free to make up for it (the Schur complement)."""
    weight, gram = normal(5, 24), correlated(24)
    tensor = gptq(weight, Format.parse("vq3x4"), Hessian(gram))
    book, order = tensor.params["codebooks"][0, 0].astype(np.float64), Hessian(gram, tile=4).order
    matrix = damped(gram)
    error = np.zeros((5, 24))
    for first in range(0, 24, 4):
        tile, seen, later = order[first : first + 4], order[:first], order[first + 4 :]
        known = np.concatenate([seen, tile])
        left = matrix[np.ix_(known, known)]
        if len(later):
            cross = matrix[np.ix_(known, later)]
            left = left - cross @ np.linalg.solve(matrix[np.ix_(later, later)], cross.T)
        for row in range(5):
            tried = weight[row, tile] - book
            whole = np.concatenate([np.tile(error[row, seen], (8, 1)), tried], axis=1)
            costs = np.einsum("ck,ck->c", whole @ left, whole)
            assert tensor.codes[row, tile[0] // 4] == np.argmin(costs)
            error[row, tile] = tried[tensor.codes[row, tile[0] // 4]]


@pytest.mark.parametrize("spelling", ["lut2", "lut2:g16", "bin2:g16", "fdb2", "vq4x4", "vq4x4:in", "aq4x4x2:g16:f16"])
def test_tables_and_codebooks_are_refitted_by_least_squares(spelling: str) -> None:
    weight, gram, format = normal(12, 48), correlated(48).astype(np.float32), Format.parse(spelling)
    tensor = assign(weight, format)
    name = format.values.params[0].name
    found = tensor
    for _ in range(20):  # a few steps of conjugate gradients each
        found = QuantizedTensor(format, found.codes, refit(weight, found, gram))
    flat = tensor.params[name].astype(np.float32).reshape(-1)
    design = []
    for i in range(len(flat)):
        one = np.zeros_like(flat)
        one[i] = 1
        design.append(format.decode(tensor.codes, {**tensor.params, name: one.reshape(tensor.params[name].shape)}))
    root = np.linalg.cholesky(gram.astype(np.float64))
    best = np.linalg.lstsq(np.stack([(d @ root).reshape(-1) for d in design], axis=1), (weight @ root).reshape(-1))
    least = float(best[1][0]) if len(best[1]) else loss(weight, found, gram)
    assert loss(weight, found, gram) < loss(weight, tensor, gram)
    assert loss(weight, found, gram) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("spelling", ["uint2:g16+columns20:int8", "lut2+columns25:lut2", "mid1:f16+columns50:uint2:g16",
                                      "uint1:g16+columns75:uint2:g16+columns33:uint3:g16"])  # fmt: skip
def test_columns_apart_make_up_for_the_others(spelling: str) -> None:
    weight, gram, format = normal(24, 96), correlated(96), Format.parse(spelling)
    found, nearest = loss(weight, gptq(weight, format, Hessian(gram)), gram), assign(weight, format, np.diagonal(gram))
    assert found < 0.85 * loss(weight, nearest, gram)


def test_a_low_rank_term_is_the_best_one_for_what_the_codes_leave() -> None:
    weight, gram = normal(24, 96), correlated(96)
    tensor = gptq(weight, Format.parse("uint2:g16+lowrank3"), Hessian(gram))
    held = tensor.params["lowrank_left"].astype(np.float64) @ tensor.params["lowrank_right"].astype(np.float64)
    left = weight - tensor.decode() + held
    values = np.linalg.eigvalsh(left @ damped(gram) @ left.T)
    assert loss(weight, tensor, damped(gram)) == pytest.approx(values[:-3].sum(), rel=1e-3)  # halves; power method
