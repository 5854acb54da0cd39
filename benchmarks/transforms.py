"""What transforms restore of the accuracy that outlier channels cost: recipes on a model with planted outliers.

    python benchmarks/transforms.py [--recipes w4 awq-w4 ...] [--factors 1 20 100] [--channels 8] [--windows 32]

Plants outliers that leave the function of the built-in decoder unchanged, runs the passes of each recipe, and prints
how far the result is from the float model on the built-in text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from planting import plant_outliers  # pyright: ignore[reportMissingImports]  found through the line above

from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.frontend import load
from qc.ir.model import Model
from qc.measurement import read_data
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import steps_of
from qc.recipes import load_recipe

RECIPES = ("w8a8-dynamic", "smooth-w8a8", "w4", "awq-w4")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 20, 100], help="of the planted channels")
    parser.add_argument("--channels", type=int, default=8, help="planted behind every norm")
    parser.add_argument("--windows", type=int, default=32, help="of text")
    options = parser.parse_args()
    original = load("builtin:tiny-llama")
    data = read_data(original, None)
    assert data.tokens is not None
    reference = ModelRunner(original.clone())
    for action in canonicalize_passes():
        original = Model.of(action(original).model)
    print(f"{'outliers':>8}  {'recipe':<16}{'KL':>9}{'ppl':>9}{'top-1':>8}")
    for factor in options.factors:
        for recipe in options.recipes:
            model = original.clone()
            plant_outliers(model, factor, options.channels, np.random.default_rng(0))
            steps = steps_of(load_recipe(recipe).passes)
            model, _ = PassManager(steps, verify=False).run(model, calibration=data.calibration)
            found = evaluate(ModelRunner(model), reference, text_tokens=data.tokens, windows=options.windows)
            print(
                f"{f'×{factor:g}':>8}  {recipe:<16}{found['kl']:9.4f}{found['ppl']:9.3f}{found['top1']:8.3f}",
                flush=True,
            )
    print(f"float: perplexity {found['ppl_reference']:.3f}")


if __name__ == "__main__":
    main()
