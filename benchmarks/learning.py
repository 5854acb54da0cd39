"""What learning weights block by block gives: perplexity above float, divergence, time.

    python benchmarks/learning.py [--windows 128] [--threads 1] [--text FILE] [--calib FILE] [--json] PIPELINE [...]

Each pipeline, such as ``quantize-weights{format=uint2,group=64,head=float,embedding=float},tune``, is run on the
built-in decoder with that many windows of 256 tokens, from the beginning of the text to calibrate on, else the end of
the other, and measured on 64 windows of the rest in the verifying runtime. Prints the perplexity above that of the
float model in percent, the divergence from it, processor and wall seconds of the pipeline, and the signal to noise
ratio of each block's outputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qc.backends.evaluate import evaluate
from qc.backends.inputs import text_inputs
from qc.backends.reference import ModelRunner
from qc.backends.tokenizer import Tokenizer
from qc.frontend import load
from qc.ir.model import Model
from qc.passes.base import Context
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

WINDOW = 256


def measure(
    model: Model, learned: Sequence[int], held_out: Sequence[int], pipeline: str, threads: int
) -> dict[str, object]:
    """Runs one pipeline on a copy of `model`, with some tokens to learn from and others to measure on."""
    rows = np.array(learned).reshape(-1, 1, WINDOW)
    batches = [text_inputs(model.signature, row) for row in rows]
    began, used = time.perf_counter(), time.process_time()
    manager = PassManager(parse_pipeline(pipeline), verify=False)
    quantized, reports = manager.run(model.clone(), calibration=batches, context=Context(threads=threads))
    seconds = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used}
    found = evaluate(ModelRunner(quantized), ModelRunner(model), text_tokens=held_out)
    excess = 100 * (found["ppl"] / found["ppl_reference"] - 1)
    blocks = {b.label: b.after for b in reports[-1].blocks if b.after is not None}
    return {"pipeline": pipeline, "excess_percent": excess, "kl": found["kl"], **seconds, "blocks_db": blocks}


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", metavar="PIPELINE")
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
    rows = []
    for pipeline in options.pipelines:
        found = measure(model, learned, held_out, pipeline, options.threads)
        rows.append(found)
        if not options.json:
            print(f"{pipeline}\n  {found['excess_percent']:.2f} % above float, KL {found['kl']:.4f}, "
                  f"{found['processor_seconds']:.0f} s of processor, {found['seconds']:.0f} s", flush=True)  # fmt: skip
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
