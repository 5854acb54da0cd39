"""Every supported architecture through the one command: an artifact computes what its model, or its weights, say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qc.backends.inputs import text_inputs
from qc.backends.reference import ModelRunner
from qc.backends.sampling import GREEDY
from qc.backends.target import Runner
from qc.compiler import CompileResult
from qc.compiler import compile as compile_model
from qc.ir.model import Model
from qc.ir.probe import probe_inputs
from qc.ir.quant import read_weight
from qc.ir.verify import Difference, compare
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import steps_of
from qc.recipes import load_recipe

pytest.importorskip("torch", reason="the reference is torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from architectures import exported
from test_frontend_architectures import reference_of, run_torch
from tiny_models import ARCHITECTURES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours

EXACT = 1e-4
KERNELS = 25.0
"""Decibels that an artifact keeps against its own decoded weights: its kernels round activations to int8 per block,
which costs 30 to 48 here. A wrong kernel, axis or zero point keeps less than 10."""

ON_TOP = 1.0
"""Decibels by which that rounding may add to the error of the weights, which is 10 to 20 times larger; found: 0.3."""

WEIGHTS = 18.0
"""Decibels of a 4-bit weight in groups of 32; normally distributed ones have 21 to 22."""

LARGE = 4096

OTHER_RECIPES = ("w8", "w2", "w8a8-dynamic")

Batch = Mapping[str, np.ndarray]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_artifacts_compute_what_the_model_says(name: str, models: Path, tmp_path: Path) -> None:
    directory, model = exported(name, models)
    # Prefill of two rows, one decode step (of decoders), and several tokens on top of a cache.
    batches = [*probe_inputs(model, 1), probe_inputs(model, 2, {"batch": 1, "seq": 5, "past": 3})[0]]
    expected = torch_outputs(directory, model, batches)

    exact = artifact_of(model, "float", tmp_path)
    for difference in worst(expected, [runner_of(exact).run(b) for b in batches]):
        assert difference.max_abs <= EXACT * difference.scale

    small = artifact_of(model, "w4", tmp_path)
    found = [runner_of(small).run(b) for b in batches]
    decoded = [quantized(model, "w4").run(b) for b in batches]
    for difference in worst(decoded, found):
        assert difference.sqnr > KERNELS
    for ours, explained in zip(worst(expected, found), worst(expected, decoded), strict=True):
        assert ours.sqnr > explained.sqnr - ON_TOP
    check_sites(small.report, model)

    other = OTHER_RECIPES[list(ARCHITECTURES).index(name) % len(OTHER_RECIPES)]
    results = runner_of(artifact_of(model, other, tmp_path)).run(batches[0])
    assert all(np.isfinite(v).all() for v in results.values())

    if model.signature.is_decoder:
        check_cache(runner_of(exact))
        check_genai(tmp_path / "w4", runner_of(small))


def artifact_of(model: Model, recipe: str, directory: Path) -> CompileResult:
    return compile_model(model.clone(), directory / recipe, recipe=recipe)


def runner_of(result: CompileResult) -> Runner:
    assert result.artifact is not None
    return result.artifact.runner(threads=1)


def torch_outputs(directory: Path, model: Model, batches: Sequence[Batch]) -> list[Batch]:
    names = [p.name for p in model.signature.outputs]
    reference = reference_of(directory)
    return [dict(zip(names, run_torch(reference, dict(batch), names), strict=True)) for batch in batches]


def quantized(model: Model, recipe: str) -> ModelRunner:
    """The model after the recipe and before lowering, its weights decoded and its activations in float."""
    steps = [*canonicalize_passes(), *steps_of(load_recipe(recipe).passes)]
    done, _ = PassManager(steps, verify=False).run(model.clone())
    return ModelRunner(Model.of(done), threads=1)


def worst(expected: Sequence[Batch], found: Sequence[Batch]) -> list[Difference]:
    """The largest difference of each output over all batches."""
    each = [compare(e, f) for e, f in zip(expected, found, strict=True)]
    return [min(same, key=lambda d: d.sqnr) for same in zip(*each, strict=True)]


def check_sites(report: Mapping[str, Any], model: Model) -> None:
    """Every large weight is a site, and well quantized."""
    sites = [s for s in report["sites"] if s["pass"] == "quantize-weights"]
    parameters = [v.const_value for v in model.graph.initializers.values() if read_weight(v) is not None]
    large = sum(math.prod(t.shape) for t in parameters if t.dtype.is_floating_point() and math.prod(t.shape) >= LARGE)
    assert sum(s["elements"] for s in sites) >= large
    assert all(s["sqnr_db"] > WEIGHTS for s in sites if s["outcome"] == "changed")
    assert not {s["reason"] for s in sites if s["outcome"] == "skipped"}


def check_cache(runner: Runner) -> None:
    """Text generated with the cache is that of running the whole text for each token."""
    text = [3, 1, 4]
    generated = list(runner.generate(text, 6))
    logits = runner.signature.output("logits")
    assert logits is not None
    for token in generated:
        assert token == GREEDY.chooser()(runner.run(text_inputs(runner.signature, np.array([text])))[logits.name])
        text.append(token)
    assert len(generated) == 6


def check_genai(directory: Path, runner: Runner) -> None:
    """The folder runs in onnxruntime-genai, where that is installed."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return
    prompt = [3, 1, 4]
    model = genai.Model(str(directory))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 6, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(t) for t in generator.get_sequence(0)][len(prompt) :]
    assert found
    assert found == list(runner.generate(prompt, 6))[: len(found)]
