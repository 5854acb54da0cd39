"""Time and memory of a sweep against the number of layers and of calibration tokens: both shall grow linearly.

    python benchmarks/sweep.py [--layers 2 4 8] [--samples 8 16 32] [--in-memory MIB] [--passes PIPELINE] [--json]

Quantizes decoders with random weights, layer counts from `--layers` at the largest number of samples, then numbers of
samples of 256 tokens at the largest layer count. Prints processor seconds of the sweep, the peak of anonymous memory
above what the process had before, and both per layer or sample. Activations beyond `--in-memory` go to mapped files.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from memory import Shape, used, write_model

from qc.backends.inputs import text_inputs
from qc.frontend import load
from qc.ir.model import Model
from qc.passes.base import Context
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

LENGTH = 256
WIDTH, HIDDEN, HEADS, VOCABULARY = 256, 704, 8, 1024


def canonical(layers: int, work: Path) -> Path:
    """A decoder with random weights."""
    source, saved = work / f"source-{layers}", work / f"{layers}"
    if not saved.is_dir():
        write_model(source, Shape(layers, WIDTH, HIDDEN, HEADS, HEADS, VOCABULARY), sparse=False)
        model = load(source)
        for action in canonicalize_passes():
            model = Model.of(action(model).model)
        model.save(saved)
    return saved


def measure(source: Path, samples: int, pipeline: str, in_memory: int | None) -> dict[str, float]:
    """Processor seconds, and MiB of anonymous memory, once everything has been loaded and used."""
    model = Model.load(source)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCABULARY, (samples, 1, LENGTH))
    batches = [text_inputs(model.signature, row) for row in rows]
    manager = PassManager(parse_pipeline(pipeline), verify=False)
    manager.run(model.clone(), calibration=batches[:1], context=Context(activations=in_memory))
    with used() as found:
        manager.run(model, calibration=batches, context=Context(activations=in_memory))
    return {"seconds": found.seconds, "mib": found.memory / (1 << 20)}


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--in-memory", type=int, metavar="MIB")
    parser.add_argument("--passes", default="quantize-weights{assign=gptq}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    limit = None if options.in_memory is None else options.in_memory << 20
    cases = [(n, max(options.samples)) for n in options.layers]
    cases += [(max(options.layers), n) for n in options.samples if n != max(options.samples)]
    rows = []
    one = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)  # what one case has freed helps no other
    with tempfile.TemporaryDirectory() as work, one as processes:
        for layers, samples in cases:
            source = canonical(layers, Path(work))
            found = processes.submit(measure, source, samples, options.passes, limit).result()
            rows.append({"layers": layers, "samples": samples, **found})
            if not options.json:
                per = found["seconds"] / layers / samples
                print(
                    f"{layers:3} layers {samples:4} samples: {found['seconds']:7.2f} s, {1e3 * per:6.2f} ms per layer "
                    f"and sample, {found['mib']:7.1f} MiB",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
