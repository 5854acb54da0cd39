"""The planter of outlier channels keeps the function and plants what it says."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models are run in float64 by the torch executor")

from channel_actions import difference, run
from planting import plant_outliers

from qc.frontend import load
from qc.inspection import outliers
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes


@pytest.fixture(scope="module")
def original() -> Model:
    model = load("builtin:tiny-llama")
    for rewrite in canonicalize_passes():
        model = Model.of(rewrite(model).model)
    return model


@pytest.mark.parametrize("factor", [10.0, 300.0])
def test_planting_keeps_the_function_and_makes_outliers(original: Model, factor: float) -> None:
    model = original.clone()
    planted = plant_outliers(model, factor, 8, np.random.default_rng(0), dtype=np.float64)
    assert difference(run(original), run(model)) < 1e-10
    assert planted
    assert all(len(channels) == 8 for channels in planted.values())


def test_planted_channels_stand_out_at_the_input_of_every_product_behind_a_norm(original: Model) -> None:
    model = original.clone()
    planted = plant_outliers(model, 100.0, 8, np.random.default_rng(1))
    worst = [set(row["worst_channels"]) for row in outliers(model)["sites"]]
    assert sum(any(row <= set(channels.tolist()) for channels in planted.values()) for row in worst) >= len(planted)


def test_the_same_generator_plants_the_same_channels(original: Model) -> None:
    first, second = (plant_outliers(original.clone(), 20.0, 4, np.random.default_rng(7)) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[k], second[k]) for k in first)
