"""Reassembly on graphs small enough to see every channel."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from qc.ir.channels import find_groups
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.ir.text import parse
from qc.passes.base import Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline
from qc.passes.transform._matching import Matching
from qc.passes.transform.actions import Merge, Reassemble, Split
from qc.passes.transform.fold import fold

NORM = """g (float[n,8] x) => (float[n,6] a, float[n,4] b) {
  h = LayerNormalization (x, gain, bias)  a = qc.Linear (h, w1)  b = qc.Linear (h, w2)
}"""
GATED = """g (float[n,4] x) => (float[n,5] y) {
  p = qc.Linear (x, gate)  s = qc.Swish <alpha=1.0> (p)  u = qc.Linear (x, up)  z = Mul (s, u)
  y = qc.Linear (z, down)
}"""
CHAIN = "g (float[n,8] x) => (float[n,5] y) { h = qc.Linear:bias (x, w1, b1)  y = qc.Linear:bias (h, w2, b2) }"
SHAPES = {
    NORM: {"gain": (8,), "bias": (8,), "w1": (6, 8), "w2": (4, 8)},
    GATED: {"gate": (32, 4), "up": (32, 4), "down": (5, 32)},
    CHAIN: {"w1": (8, 8), "b1": (8,), "w2": (5, 8), "b2": (5,)},
}


def build(text: str) -> Model:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES[text].items()}
    if "gain" in weights:
        factors = np.array([1, 1, 20, 1, 1, 1, 12, 1], np.float32)
        weights |= {"gain": factors, "w1": weights["w1"] / factors, "w2": weights["w2"] / factors}
    if "up" in weights:
        weights["up"][3] *= 30
        weights["down"][:, 3] /= 30
    return parse(text, weights=weights)


def inputs(model: Model, seed: int = 1) -> np.ndarray:
    width = model.graph.inputs[0].shape[1]
    return np.random.default_rng(seed).standard_normal((64, width)).astype(np.float32)


def outputs(model: Model) -> np.ndarray:
    return np.concatenate(list(Session(model).run({"x": inputs(model, 2)}).values()), axis=1)


def reassembled(text: str, options: str) -> tuple[Model, PassReport]:
    model = build(text)
    calibration = [{"x": inputs(model)}]
    steps = parse_pipeline(f"reassemble{{optional=true,{options}}}")
    model, reports = PassManager(steps).run(model, calibration=calibration, probe=calibration)
    return model, reports[-1]


def tensors(model: Model) -> dict[str, object]:
    return {n: v.const_value for n, v in model.graph.initializers.items()}


def operators(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("text", SHAPES)
def test_a_threshold_above_every_channel_changes_no_bit(text: str) -> None:
    before, (after, report) = build(text), reassembled(text, "theta=1e6")
    assert not report.modified
    assert {s.outcome for s in report.sites} <= {Outcome.MATCHED, Outcome.SKIPPED}
    assert operators(after) == operators(before)
    for name, tensor in tensors(before).items():
        assert tensor.tobytes() == after.graph.initializers[name].const_value.tobytes()


@pytest.mark.parametrize(("text", "theta", "added"), [(NORM, 20, ["Gather"]), (GATED, 60, [])])
def test_without_merging_the_function_stays_the_same_and_no_channel_is_larger(
    text: str, theta: float, added: list[str]
) -> None:
    before, (after, report) = build(text), reassembled(text, f"theta={theta},merge=false,ratio=0.5")
    site = next(s for s in report.sites if s.outcome is Outcome.CHANGED)
    assert [a["operator"] for a in site.details["added"]] == added
    assert sorted(operators(after)) == sorted(operators(before) + added)
    np.testing.assert_allclose(outputs(after), outputs(before), rtol=1e-4, atol=1e-4)
    product = next(n for n in after.graph if n.op_type == "Linear" and n.inputs[1].name in ("w1", "down"))
    after.graph.outputs[:] = [product.inputs[0]]
    (channels,) = Session(after).run({"x": inputs(after)}).values()
    assert np.abs(channels).max() <= theta * (1 + 1e-6)
    assert channels.shape[1] == site.details["width"]


def test_behind_a_norm_the_width_is_kept_and_its_gain_takes_the_factors_up() -> None:
    after, report = reassembled(NORM, "theta=30,ratio=0.5")
    (site,) = report.sites
    assert site.outcome is Outcome.CHANGED
    assert (site.details["width"], site.details["merged"] > 0) == (8, True)
    assert operators(after) == ["LayerNormalization", "Gather", "Gather", "ReduceSum", "Concat", "Linear", "Linear"]
    normed = (inputs(after) - inputs(after).mean(1, keepdims=True)) / inputs(after).std(1, keepdims=True)
    copies = np.ceil(np.abs(normed * build(NORM).graph.initializers["gain"].const_value.numpy()).max(0)[2] / 30)
    gain, bias = (after.graph.initializers[n].const_value.numpy() for n in ("gain", "bias"))
    assert gain[2] == pytest.approx(20 / copies)
    assert bias[2] == pytest.approx(build(NORM).graph.initializers["bias"].const_value.numpy()[2] / copies)


def test_a_threshold_that_takes_too_many_copies_is_declined_with_the_reason() -> None:
    model, report = reassembled(NORM, "theta=0.5")
    assert not report.modified
    assert "more copies than the ratio" in report.sites[0].reason
    assert operators(model) == operators(build(NORM))


@pytest.mark.parametrize("text", SHAPES)
def test_the_searched_reassembly_is_no_worse_on_samples(text: str) -> None:
    _, report = reassembled(text, "bits=4,weights=int8,ratio=0.5,merge=false")
    assert all(s.details["error"] <= 1 for s in report.sites if "error" in s.details)
    if text is not CHAIN:
        assert any(s.details["error"] < 0.8 for s in report.sites if s.outcome is Outcome.CHANGED)


def test_in_front_of_a_static_range_one_addition_splits_the_codes_of_copies() -> None:
    steps = "reassemble{theta=60,ratio=0.5},quantize-activations{mode=static,range=minmax,float_weights=true}"
    model = build(GATED)
    calibration = [{"x": inputs(model)}]
    after, (first, last) = PassManager(parse_pipeline(steps)).run(model, calibration=calibration, probe=calibration)
    (site,) = [s for s in first.sites if s.outcome is Outcome.CHANGED]
    (rounded,) = [s for s in last.sites if s.details.get("split_codes")]
    assert site.details["added"] == []
    assert rounded.details["added"] == [{"operator": "Add", "operations": site.details["width"]}]
    assert operators(after).count("Add") == 1
    shift = next(n for n in after.graph if n.op_type == "Add")
    assert shift.inputs[1].const_value.numpy().sum() == pytest.approx(0, abs=1e-4), "the offsets cancel"
    exact = outputs(build(GATED))
    alike = Model.of(after.clone())
    node = next(n for n in alike.graph if n.op_type == "Add")
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    errors = [np.square(outputs(m) - exact).mean() for m in (after, alike)]
    assert errors[0] < errors[1]


def test_operators_at_run_time_and_weights_do_the_same() -> None:
    action = Reassemble(np.array([3, 1, 1, 1, 1, 1, 1, 1]), np.array([0, 1, 2, 2, 2, 3, 4, 4, 5, 6]))
    folded, inserted = build(CHAIN), build(CHAIN)
    group, other = (next(g for g in find_groups(m) if g.producers and g.consumers) for m in (folded, inserted))
    fold(folded, group, action, Store())
    result = fold(inserted, dataclasses.replace(other, admits=frozenset({"scale"})), action, Store(), runtime=True)
    assert [operator for operator, _ in result.added] == ["Gather", "Gather", "ReduceSum", "Concat"]
    np.testing.assert_allclose(outputs(inserted), outputs(folded), rtol=1e-4, atol=1e-5)
    assert np.abs(outputs(folded) - outputs(build(CHAIN))).max() > 0.1, "a merge changes the function"


def test_a_reassembly_is_a_split_and_then_a_merge() -> None:
    copies, clusters = np.array([2, 1, 3, 1]), np.array([0, 1, 2, 1, 3, 4, 5])
    rows = np.random.default_rng(0).standard_normal((4, 3))
    both, split, merge = Reassemble(copies, clusters), Split(copies), Merge(clusters)
    np.testing.assert_allclose(both.made(rows, 1.0), merge.made(split.made(rows, 1.0), 1.0))
    np.testing.assert_allclose(both.read(rows), merge.read(split.read(rows)))


def test_columns_of_merged_channels_are_corrected_by_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((400, 6)), rng.standard_normal((3, 6))
    copies, clusters = np.ones(6, int), np.array([0, 1, 2, 2, 3, 4])
    sums, corrected = (Reassemble(copies, clusters, samples) for samples in (None, x))
    new = sums.made(x.T, 1.0).T
    errors = [np.square(new @ action.read(weight.T) - x @ weight.T).sum() for action in (sums, corrected)]
    assert errors[1] < errors[0]
    others = [0, 1, 3, 4]
    assert np.array_equal(corrected.read(weight.T)[others], sums.read(weight.T)[others])
    rest = x @ weight.T - np.delete(new, 2, axis=1) @ np.delete(sums.read(weight.T), 2, axis=0)
    best = np.linalg.lstsq(new[:, [2]], rest, rcond=None)[0][0]
    # Damping leaves 1 / 1.05 of the way from the sums to the least squares.
    expected = sums.read(weight.T)[2] + (best - sums.read(weight.T)[2]) / 1.05
    np.testing.assert_allclose(corrected.read(weight.T)[2], expected)


def test_the_errors_of_merging_are_those_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((50, 9)), [rng.standard_normal((3, 9)), rng.standard_normal((4, 9))]
    matching = Matching(9)
    for w in weights:
        matching.add(x, w)
    for i, j in itertools.product(range(0, 9, 2), range(1, 9, 2)):
        merged = x.copy()
        merged[:, [i, j]] = x[:, [i, j]].mean(axis=1, keepdims=True)
        error = 0.0
        for w in weights:
            summed = w.copy()
            summed[:, [i, j]] = w[:, [i, j]].sum(axis=1, keepdims=True) / 2
            error += np.square(merged @ summed.T - x @ w.T).sum()
        assert matching.errors[i // 2, j // 2] == pytest.approx(error, rel=1e-4)


def test_the_cheapest_channels_are_merged_and_those_with_copies_are_not() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((50, 8)), rng.standard_normal((3, 8))
    x[:, 4] = x[:, 1] + 1e-3
    x[:, 6] = x[:, 3] + 1e-3
    matching = Matching(8)
    matching.add(x, weight)
    clusters = matching.clusters(np.array([1, 1, 1, 2, 1, 1, 1, 1]))
    assert clusters is not None
    assert clusters[4] == clusters[1]
    assert np.bincount(clusters).tolist().count(2) == 1, "channel 3 has copies, so 6 keeps its own"
    assert len(np.unique(clusters)) == 8
    assert matching.clusters(np.full(8, 2)) is None


@pytest.mark.parametrize("options", ["theta=0", "theta=most", "ratio=0.9", "bits=1", "granularity=row", "weights=four"])
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(InputError, match="Expected"):
        parse_pipeline(f"reassemble{{{options}}}")
