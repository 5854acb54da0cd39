"""What methods that learn give, beside those that do not: perplexity and divergence, processor time, peak memory.

    python benchmarks/learning.py [--schemes W2 W4A4 ...] [--methods gptq learned ...] [--factors 1 20]
        [--windows 128] [--threads 1] [--text FILE] [--calib FILE] [--json] [PIPELINE ...]

Each method quantizes the built-in decoder, with embedding and head in float, on that many windows of 256 tokens: from
the beginning of the text to calibrate on, else the end of the other. It is measured on 64 windows of the rest in the
verifying runtime. With a factor above 1, eight channels behind every norm are made so many times as large first, which
leaves the function of the model as it is. A pipeline such as ``quantize-weights{format=uint2,group=64},tune`` is run in
place of the table. Prints the perplexity above that of the float model in percent, the divergence from it, processor
seconds, and the peak of anonymous memory above what the process had before. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from memory import used

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from planting import plant_outliers  # pyright: ignore[reportMissingImports]  found through the line above

from qc.backends.evaluate import evaluate
from qc.backends.inputs import text_inputs
from qc.backends.reference import ModelRunner
from qc.backends.tokenizer import Tokenizer
from qc.frontend import load
from qc.ir import dialect
from qc.ir.model import Model
from qc.passes.base import Context, site_name
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

WINDOW, CHANNELS = 256, 8

SCHEMES = {
    "W4": ("uint4", 128, ""),
    "W3": ("uint3", 128, ""),
    "W2": ("uint2", 64, ""),
    "W8A8": ("int8", 0, ",quantize-activations{mode=static,bits=8}"),
    "W4A8": ("int4", 0, ",quantize-activations{bits=8,granularity=token}"),
    "W4A8-static": ("int4", 0, ",quantize-activations{mode=static,bits=8}"),
    "W4A4": ("int4", 0, ",quantize-activations{bits=4,granularity=token}"),
}
"""Format of the weights, their group (0: a row), and what rounds activations."""

_WEIGHTS = "quantize-weights{format=FORMAT,group=GROUP,head=float,embedding=float"
_PLAIN = f"{_WEIGHTS}}}ACTIVATIONS"
_FEEDBACK = f"{_WEIGHTS},assign=gptq,sweeps=4}}ACTIVATIONS"
_ROTATE = "rotate{online-hidden=true,online-heads=true}"
_REASSEMBLE = "reassemble{bits=BITS,weights=FORMAT,exclude=[HEAD],optional=true}"
_LOW_RANK = "tune{learn=[low-rank],optimizer=adam,steps=60,batch=4}"
_BLOCKS = "tune{learn=[weights,range],optimizer=adam,steps=100,batch=4,rate=0.02}"

METHODS = {
    "nearest": f"{_WEIGHTS},metric=none}}ACTIVATIONS",
    "smoothquant": f"smooth,{_PLAIN}",
    "gptq": _FEEDBACK,
    "quarot": f"{_ROTATE},{_FEEDBACK}",
    "autoround": f"{_PLAIN},tune{{steps=100,batch=4}}",
    "omniquant": f"smooth,{_PLAIN},tune{{learn=[range,transforms],optimizer=adam,steps=60,batch=4,range-rate=0.02}}",
    "mobilequant": f"smooth,{_PLAIN},tune-network{{learn=[range,transforms,activations],range-rate=0.01}}",
    "qllm": f"{_REASSEMBLE},{_PLAIN},{_LOW_RANK}",
    "smooth, qllm": f"smooth,{_REASSEMBLE},{_PLAIN},{_LOW_RANK}",
    "block-ap": f"{_PLAIN},{_BLOCKS}",
    "efficientqat": f"{_PLAIN},{_BLOCKS},tune-network{{learn=[scale]}}",
    "block-ap, learned": f"{_PLAIN},{_BLOCKS},tune-network{{steps=400}}",
    "learned": f"{_FEEDBACK},tune-network",
    "quarot, learned": f"{_ROTATE},{_FEEDBACK},tune-network",
}
"""Pipelines, with words in capitals in place of what the scheme says."""


def measure(
    model: Model, reference: ModelRunner, learned: Sequence[int], held_out: Sequence[int], pipeline: str, threads: int
) -> dict[str, object]:
    """Runs one pipeline on a copy of `model`, with some tokens to learn from and others to measure on."""
    rows = np.array(learned).reshape(-1, 1, WINDOW)
    batches = [text_inputs(model.signature, row) for row in rows]
    manager = PassManager(parse_pipeline(pipeline), verify=False)
    with used() as spent:
        quantized, reports = manager.run(model.clone(), calibration=batches, context=Context(threads=threads))
    found = evaluate(ModelRunner(quantized), reference, text_tokens=held_out)
    excess = 100 * (found["ppl"] / found["ppl_reference"] - 1)
    blocks = {b.label: b.after for b in reports[-1].blocks if b.after is not None}
    figures = {"excess_percent": excess, "kl": found["kl"], "seconds": spent.seconds, "mib": spent.memory / (1 << 20)}
    return {"pipeline": pipeline, **figures, "blocks_db": blocks}


def cases(model: Model, options: argparse.Namespace) -> Iterator[tuple[str, Model, str]]:
    """A title, a model and a pipeline for each row."""
    if options.pipelines:
        yield from ((pipeline, model, pipeline) for pipeline in options.pipelines)
        return
    head = site_name([node for node in model.graph if dialect.is_op(node, "Linear")][-1])
    for factor in options.factors:
        planted = model.clone()
        if factor != 1:
            plant_outliers(planted, factor, CHANNELS, np.random.default_rng(0))
        for scheme in options.schemes:
            format, group, activations = SCHEMES[scheme]
            bits = scheme.rpartition("A")[2] if activations else "8"
            words = {"FORMAT": format, "GROUP": group, "BITS": bits, "HEAD": f"^{re.escape(head)}$"}
            for method in options.methods:
                pipeline = METHODS[method].replace("ACTIVATIONS", activations)
                for word, held in words.items():
                    pipeline = pipeline.replace(word, str(held))
                yield f"{f'×{factor:g}' if factor != 1 else '':>4} {scheme:<5} {method:<16}", planted, pipeline


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", metavar="PIPELINE")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--factors", type=float, nargs="+", default=[1], help="of planted channels")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", type=Path, help="to measure on; default: the sample of the built-in model")
    parser.add_argument("--calib", type=Path, help="to calibrate on; default: the end of the text to measure on")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = load("builtin:tiny-llama")
    text, count = options.text or model.assets["sample.txt"], options.windows * WINDOW
    tokenizer = Tokenizer(model.assets["tokenizer.json"].parent)
    tokens = tokenizer.encode(text.read_text("utf-8"))
    learned, held_out = tokens[-count:], tokens[:-count]
    if options.calib is not None:
        learned, held_out = tokenizer.encode(options.calib.read_text("utf-8"))[:count], tokens
    for action in canonicalize_passes():
        model = Model.of(action(model).model)
    reference, rows = ModelRunner(model.clone()), []
    for title, given, pipeline in cases(model, options):
        found = measure(given, reference, learned, held_out, pipeline, options.threads)
        rows.append(found)
        if not options.json:
            accuracy = f"{found['excess_percent']:7.2f} %, KL {found['kl']:.4f}"
            print(f"{title} {accuracy} {found['seconds']:5.0f} s {found['mib']:6.0f} MiB", flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
