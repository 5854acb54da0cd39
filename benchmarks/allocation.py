"""What choosing a format per weight gives, against one format for all of them in as many stored bits.

    python benchmarks/allocation.py [MODEL] [--calib FILE] [--uniform FORMAT ...] [--bits 3.5 4.0] [--json]

For each uniform format, such as ``uint4:g128:f16``, its row is followed by that of an allocation within the same number
of bits, and all of it is done with nearest codes and with feedback. `--bits` adds allocations with other budgets. A
language model shows perplexity above that of the float model and divergence from it, over 32 windows; others the cosine
of their outputs. Everything runs in the verifying runtime with float activations.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.data import Data, read_data
from qc.frontend import load
from qc.ir.model import Model
from qc.passes.allocate.allocate import Allocate
from qc.passes.base import Context, Pass
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.quantize._sites import weight_uses
from qc.passes.quantize.weights import QuantizeWeights

UNIFORM = ("int4:f16", "uint4:g128:f16")


def stored_bits(model: Model) -> float:
    """Bits per weight over all quantized weights."""
    weights = {u.weight.data: u.weight for u in weight_uses(model) if u.weight is not None and u.weight.format}
    return 8 * sum(w.stored_bytes for w in weights.values()) / sum(w.shape[0] * w.shape[1] for w in weights.values())


def measure(model: Model, reference: ModelRunner, data: Data, passes: list[Pass], threads: int) -> dict[str, float]:
    """Bits, accuracy and processor seconds of a pipeline."""
    began = time.process_time()
    context = Context(threads=threads)
    done, _ = PassManager(passes, verify=False).run(model.clone(), calibration=data.calibration, context=context)
    seconds = time.process_time() - began
    runner = ModelRunner(done)
    if data.tokens is not None:
        found = evaluate(runner, reference, text_tokens=data.tokens, windows=32)
        figures = {"above": 100 * (found["ppl"] / found["ppl_reference"] - 1), "kl": found["kl"]}
    else:
        found = evaluate(runner, reference, inputs=data.batches)
        figures = {"cosine": found["cosine"], "cosine_min": found["cosine_min"]}
    return {"bits": stored_bits(done), **figures, "seconds": seconds}


def main() -> int:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:tiny-llama")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--uniform", nargs="+", default=UNIFORM, metavar="FORMAT")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.5, 4.0])
    parser.add_argument("--metric", choices=("moment", "fisher"), default="moment", help="what plans count errors by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, _ = PassManager(canonicalize_passes(), verify=False).run(load(options.model))
    reference, rows = ModelRunner(model), []

    def row(name: str, codes: str, *before: Pass, **choices: object) -> float:
        last = QuantizeWeights(assign=codes, sweeps=2 if codes == "gptq" else 0, **choices)  # type: ignore[arg-type]
        data = read_data(model, options.calib, tokens=max(p.calibration_tokens for p in (*before, last)))
        found = measure(model, reference, data, [*before, last], options.threads)
        rows.append({"weights": name, "codes": codes, **found})
        if not options.json:
            if len(rows) == 1:
                print("".join(f"{key:>18}" if key == "weights" else f"{key:>12}" for key in rows[0]))
            cells = (f"{v:>12.5f}" if isinstance(v, float) else f"{v:>12}" for v in list(rows[-1].values())[1:])
            print(f"{name:>18}" + "".join(cells), flush=True)
        return found["bits"]

    for codes in ("search", "gptq"):
        for uniform in options.uniform:
            bits = row(uniform, codes, format=uniform)
            row("allocated", codes, Allocate(bits=bits, assign=codes, metric=options.metric))
        for bits in options.bits:
            row("allocated", codes, Allocate(bits=bits, assign=codes, metric=options.metric))
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
