"""How fast a C library computes recurrent layers, beside ONNX Runtime.

    python benchmarks/recurrent.py [--op LSTM] [--hidden 256] [--layers 2] [--steps 100] [--batch 1] [--both]
        [--format float] [--rounds 21]

Layers of random weights, each as wide as its input, one behind the other; `--both` makes them bidirectional. A format
is that of weights of the C library: those of ONNX Runtime stay in float, for it would decode them in each run. Both
sides have one thread and take turns; processor time. Prints the medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from qc.backends.ort.backend import OrtCpu
from qc.backends.tvm.backend import TvmCpu
from qc.ir.model import Model
from qc.ir.recurrent import GATES
from qc.ir.text import parse
from qc.passes.canonicalize.recurrent import RecogniseRecurrent
from qc.passes.quantize.weights import QuantizeWeights

RNG = np.random.default_rng(0)


def network(op: str, hidden: int, layers: int, *, both: bool) -> Model:
    """The layers; between two of them, directions become neighbours."""
    count, weights, lines = 1 + both, {}, []
    wide, gates = count * hidden, GATES[op] * hidden
    for i in range(layers):
        for name, shape in {"w": (gates, wide), "r": (gates, hidden), "b": (2 * gates,)}.items():
            numbers = RNG.standard_normal((count, *shape)) / np.sqrt(hidden)
            weights[f"{name}{i}"] = numbers.astype(np.float32)
        rest = ", linear_before_reset = 1" if op == "GRU" else ""
        direction = "bidirectional" if both else "forward"
        lines.append(
            f'y{i} = {op} <hidden_size = {hidden}, direction = "{direction}"{rest}> (x{i}, w{i}, r{i}, b{i})  '
            f"t{i} = Transpose <perm = [0, 2, 1, 3]> (y{i})  s{i} = Constant <value_ints = [0, 0, {wide}]> ()  "
            f"x{i + 1} = Reshape (t{i}, s{i})"
        )
    text = f"f (float[t,b,{wide}] x0) => (float[t,b,{wide}] x{layers}) {{ {'  '.join(lines)} }}"
    model = parse(text, weights=weights)
    RecogniseRecurrent()(model)
    return Model.of(model)


def main() -> None:
    """Prints one line per side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=sorted(GATES), default="LSTM")
    for name, default in {"hidden": 256, "layers": 2, "steps": 100, "batch": 1, "rounds": 21}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--format", default="float", help="of the C library's weights, such as int4:g32")
    parser.add_argument("--both", action="store_true", help="bidirectional layers")
    given = parser.parse_args()
    model = network(given.op, given.hidden, given.layers, both=given.both)
    narrow = model
    if given.format != "float":
        narrow = Model.of(QuantizeWeights(format=given.format, metric="none")(model.clone()).model)
    x = RNG.standard_normal((given.steps, given.batch, given.hidden * (1 + given.both))).astype(np.float32)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        runners = {}
        for backend, source in ((TvmCpu(), narrow), (OrtCpu(), model)):
            place = Path(work) / backend.target.name
            place.mkdir()
            backend.emit(source, place)
            runners[backend.target.name] = backend.open(place, threads=1)
        for _ in range(given.rounds + 1):
            for name, runner in runners.items():
                started = time.process_time()
                runner.run({"x0": x})
                times.setdefault(name, []).append(time.process_time() - started)
    for name, taken in times.items():
        print(f"{name:8} {statistics.median(taken[1:]) * 1e3:>7.2f} ms")
    ours, theirs = (taken[1:] for taken in times.values())
    print(f"ratio    {statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):>7.2f}")


if __name__ == "__main__":
    main()
