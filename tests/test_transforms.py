"""Transforms on the built-in decoder: what outlier channels cost, they give back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planting import plant_outliers

from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.backends.target import backend_for
from qc.data import Data, read_data
from qc.frontend import load
from qc.ir.model import Model
from qc.passes.base import Outcome
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline, steps_of
from qc.recipes import load_recipe

WINDOWS = 4
Source = tuple[Model, ModelRunner, Data]


@pytest.fixture(scope="module")
def source() -> Source:
    """The canonical model, its runner and its text."""
    model = load("builtin:tiny-llama")
    data = read_data(model, None)
    for action in canonicalize_passes():
        model = Model.of(action(model).model)
    return model, ModelRunner(model.clone()), data


def quantized(source: Source, recipe: str, factor: float) -> tuple[float, PassReport]:
    """The divergence from the float model after a recipe, with planted outliers; and the report of the first pass."""
    original, reference, data = source
    model = original.clone()
    plant_outliers(model, factor, 8, np.random.default_rng(0))
    manager = PassManager(steps_of(load_recipe(recipe).passes), verify=False)
    model, reports = manager.run(model, calibration=data.calibration)
    found = evaluate(ModelRunner(model), reference, text_tokens=data.tokens, windows=WINDOWS)
    return found["kl"], reports[0]


@pytest.mark.slow
def test_smoothing_gives_back_most_of_what_outliers_cost_eight_bits(source: Source) -> None:
    without = quantized(source, "w8a8-dynamic", 1)[0]
    planted = quantized(source, "w8a8-dynamic", 20)[0]
    smoothed, report = quantized(source, "smooth-w8a8", 20)
    print(f"KL: {without:.4f}, with outliers {planted:.4f}, smoothed {smoothed:.4f}")
    assert planted > 4 * without, "the outliers cost something"
    assert smoothed - without < 0.1 * (planted - without)
    assert report.count(Outcome.CHANGED) == len(report.sites) == 25
    assert {name for s in report.sites for name in s.details.get("state", ())} == {
        f"past_key_values.{i}.value" for i in range(6)
    }


@pytest.mark.slow
def test_scaling_weights_gives_back_most_of_what_outliers_cost_four_bits(source: Source) -> None:
    planted = quantized(source, "w4", 20)[0]
    scaled, report = quantized(source, "awq-w4", 20)
    print(f"KL: with outliers {planted:.4f}, scaled {scaled:.4f}")
    assert scaled < 0.5 * planted
    assert all(s.details["error"] <= 1 for s in report.sites if s.outcome is Outcome.CHANGED)


FOUR_BITS = (
    "quantize-weights{format=int4,group=0,embedding=float,head=float},quantize-activations{bits=4,granularity=token}"
)


@pytest.mark.slow
def test_rotation_makes_four_bits_indifferent_to_outliers(source: Source) -> None:
    without = rounded(source, FOUR_BITS, 100)
    smoothed = rounded(source, f"smooth,{FOUR_BITS}", 100)
    rotated = rounded(source, f"rotate{{online-hidden=true,online-heads=true}},{FOUR_BITS}", 100)
    print(f"perplexity above float: {without:.1%}, smoothed {smoothed:.1%}, rotated {rotated:.1%}")
    assert without > 1
    assert rotated < smoothed < 0.2


@pytest.mark.slow
def test_reassembly_alone_brings_outliers_within_reach_of_four_bits(source: Source) -> None:
    reassembly = "reassemble{bits=4,granularity=token,weights=int4,exclude=[lm_head]}"
    without, reassembled = rounded(source, FOUR_BITS, 20), rounded(source, f"{reassembly},{FOUR_BITS}", 20)
    print(f"perplexity above float: {without:.1%}, reassembled {reassembled:.1%}")
    assert without > 1
    assert reassembled < 0.35


@pytest.mark.slow
def test_reassembly_takes_from_static_eight_bits_what_smoothing_leaves(source: Source) -> None:
    original, reference, _ = source
    data = read_data(original, None, tokens=8192)
    static = "quantize-weights{format=int8,group=0,embedding=float,head=float},quantize-activations{mode=static}"
    reassembly = "reassemble{granularity=tensor,weights=int8,exclude=[lm_head,q_proj,gate_proj]}"
    smoothed, reassembled = (
        measured((original, reference, data), f"smooth,{more}{static}", 20)["kl"] for more in ("", f"{reassembly},")
    )
    print(f"KL: smoothed {smoothed:.4f}, reassembled {reassembled:.4f}")
    assert reassembled < 0.9 * smoothed


def rounded(source: Source, pipeline: str, factor: float) -> float:
    """By how much the perplexity is above that of the float model, with planted outliers."""
    found = measured(source, pipeline, factor)
    return found["ppl"] / found["ppl_reference"] - 1


def measured(source: Source, pipeline: str, factor: float) -> dict[str, float]:
    """How far the model is from the float one after a pipeline, with planted outliers."""
    original, reference, data = source
    model = original.clone()
    plant_outliers(model, factor, 8, np.random.default_rng(0))
    model, _ = PassManager(parse_pipeline(pipeline), verify=False).run(model, calibration=data.calibration)
    return evaluate(ModelRunner(model), reference, text_tokens=data.tokens, windows=WINDOWS)


@pytest.mark.slow
def test_an_artifact_continues_a_cache_that_holds_rotated_keys_and_values(source: Source, tmp_path: Path) -> None:
    original, reference, data = source
    pipeline = "rotate{online-hidden=true,online-heads=true,online-keys=true}"
    model, _ = PassManager(parse_pipeline(pipeline), verify=False).run(original.clone())
    backend = backend_for("ort-cpu")
    lowered, _ = PassManager(backend.lowering(), stage="lowering", verify=False).run(model)
    backend.emit(lowered, tmp_path)
    prompt = list(data.tokens[:12])
    tokens = list(backend.open(tmp_path).generate(prompt, 12))
    assert tokens == list(reference.generate(prompt, 12))
    assert (tmp_path / "genai_config.json").is_file()
