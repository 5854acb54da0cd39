"""Transforms on the built-in decoder: what outlier channels cost, they give back."""

from __future__ import annotations

import numpy as np
import pytest
from planting import plant_outliers

from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.frontend import load
from qc.ir.model import Model
from qc.measurement import Data, read_data
from qc.passes.base import Outcome
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import steps_of
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
