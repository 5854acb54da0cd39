"""Cross-layer equalization on small convolutional networks: one scale per tensor serves channels of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models are exported by torch")
pytest.importorskip("transformers", reason="the models are those of transformers")

from architectures import canonical
from planting import plant_outliers

from qc.ir.model import Model
from qc.ir.probe import probe_inputs
from qc.ir.runtime import Session
from qc.ir.verify import sqnr
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours

ROUND = "quantize-weights{format=int8:tensor,convolution=int8:tensor}"


def run(model: Model, pipeline: str) -> np.ndarray:
    model, _ = PassManager(parse_pipeline(pipeline)).run(model.clone())
    return Session(model).run(probe_inputs(model)[0])["logits"]


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet", "convnext"])
def test_equalization_gives_back_what_uneven_channels_cost_a_scale_per_tensor(name: str, models: Path) -> None:
    model = canonical(name, models)
    expected = Session(model).run(probe_inputs(model)[0])["logits"]
    plain = sqnr(expected, run(model, ROUND))
    kinds = ("features", "hidden", "normalized")
    assert plant_outliers(model, 64.0, 4, np.random.default_rng(0), kinds=kinds)
    uneven, even = (sqnr(expected, run(model, p)) for p in (ROUND, f"equalize,{ROUND}"))
    print(f"{name}: {plain:.1f} dB, with uneven channels {uneven:.1f} dB, equalized {even:.1f} dB")
    assert uneven < plain - 15
    assert even > plain - 3
