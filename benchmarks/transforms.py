"""What transforms restore of the accuracy that outlier channels cost, for several widths of weights and activations.

    python benchmarks/transforms.py [--text FILE] [--calib FILE] [--model builtin:tiny-llama] [--schemes W8A8 W4A4 ...]
        [--transforms none smooth rotate ...] [--factors 1 20 100] [--channels 8] [--windows 16] [--tokens 16384]

Plants outliers behind every norm that leave the function of the model unchanged, applies a transform, rounds weights
(one scale per output channel) and activations, and prints by how much the perplexity is above that of the float model,
in percent, and the KL divergence to it. The end of the text calibrates, its beginning measures. Embedding and head
stay float; no channels are merged in front of the head. With --calib, that text calibrates instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from planting import plant_outliers  # pyright: ignore[reportMissingImports]  found through the line above

from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.data import Data, read_data
from qc.frontend import load
from qc.ir import dialect
from qc.ir.model import Model
from qc.passes.base import site_name
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

SCHEMES = {
    "W8A8 static": ("int8", 8, "tensor", "static"),
    "W8A8 dynamic": ("int8", 8, "tensor", "dynamic"),
    "W8A8": ("int8", 8, "token", "dynamic"),
    "W6A6": ("int6", 6, "token", "dynamic"),
    "W4A8": ("int4", 8, "token", "dynamic"),
    "W4A4": ("int4", 4, "token", "dynamic"),
}
"""Format of the weights; bits of activations, what shares a range of them, and when it is found."""

_ROTATE = "rotate{online-hidden=true,online-heads=true}"
_SEARCHED = "smooth{alpha=search,bits=BITS,granularity=GRANULARITY,weights=FORMAT}"
_REASSEMBLE = "reassemble{bits=BITS,granularity=GRANULARITY,weights=FORMAT,exclude=[HEAD],optional=true}"

TRANSFORMS = {
    "none": "",
    "smooth": "smooth",
    "awq": "awq{format=FORMAT,group=0}",
    "outlier-tune": "outlier-tune{bits=BITS,optional=true}",
    "reassemble": _REASSEMBLE,
    "smooth, searched": _SEARCHED,
    "smooth, reassemble": f"smooth,{_REASSEMBLE}",
    "searched, reassemble": f"{_SEARCHED},{_REASSEMBLE}",
    "rotate, folded": "rotate",
    "rotate": _ROTATE,
    "rotate, smooth": f"{_ROTATE},smooth",
}
"""Pipelines, with words in capitals in place of what the scheme says; ``rotate`` is with rotations at run time."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny-llama", help="a text decoder")
    parser.add_argument("--text", help="a text file; default: the sample that comes with the model")
    parser.add_argument("--calib", help="another text to calibrate on")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--transforms", nargs="+", default=list(TRANSFORMS), choices=TRANSFORMS)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 20, 100], help="of the planted channels")
    parser.add_argument("--channels", type=int, default=8, help="planted behind every norm")
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens")
    parser.add_argument("--tokens", type=int, default=16384, help="of text that calibrate")
    options = parser.parse_args()
    original = load(options.model)
    data = read_data(original, options.text, tokens=options.tokens)
    if options.calib is not None:
        data = dataclasses.replace(
            data, calibration=read_data(original, options.calib, tokens=options.tokens).calibration
        )
    reference = ModelRunner(original.clone())
    for action in canonicalize_passes():
        original = Model.of(action(original).model)
    width = max(map(len, options.transforms))
    print(f"{'':>5}  {'':<{width}}" + "".join(f"{s:>17}" for s in options.schemes))
    for factor in options.factors:
        planted = original.clone()
        plant_outliers(planted, factor, options.channels, np.random.default_rng(0))
        for transform in options.transforms:
            print(f"{f'×{factor:g}':>5}  {transform:<{width}}", end="", flush=True)
            for scheme in options.schemes:
                found = measure(planted.clone(), transform, scheme, reference, data, options.windows)
                above = 100 * (found["ppl"] / found["ppl_reference"] - 1)
                print(f"{above:8.2f}% {found['kl']:7.4f}", end="", flush=True)
            print()


def measure(
    model: Model, transform: str, scheme: str, reference: ModelRunner, data: Data, windows: int
) -> dict[str, float]:
    """What `evaluate` says of the model after transform and rounding."""
    format, bits, granularity, mode = SCHEMES[scheme]
    transforms = TRANSFORMS[transform]
    head = site_name([node for node in model.graph if dialect.is_op(node, "Linear")][-1])
    words = {"FORMAT": format, "BITS": bits, "GRANULARITY": granularity, "HEAD": f"^{re.escape(head)}$"}
    for word, held in words.items():
        transforms = transforms.replace(word, str(held))
    steps = [
        transforms,
        f"quantize-weights{{format={format},group=0,embedding=float,head=float}}",
        f"quantize-activations{{mode={mode},bits={bits},granularity={granularity}}}",
    ]
    pipeline = ",".join(filter(None, steps))
    model, _ = PassManager(parse_pipeline(pipeline), verify=False).run(model, calibration=data.calibration)
    return evaluate(ModelRunner(model), reference, text_tokens=data.tokens, windows=windows)


if __name__ == "__main__":
    main()
