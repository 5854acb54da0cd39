"""Peak memory of a whole compile, of every process it starts, against what its plan said.

    python benchmarks/memory.py [--shape 1.2B] [--sparse] [--recipe w4] [--work DIR] [--json] [-- OPTIONS]

Writes a decoder of that shape with random weights as bf16 safetensors, compiles it with ``qc compile`` in a process of
its own, and samples the memory of that process and its descendants. What counts is *anonymous* memory: mapped weights
are the kernel's to drop. Prints each line of the compile with the peak since the line before, then the peaks of the
stages, the estimate against the measurement, and the size of the artifact.

A sparse model has its embedding and the first rows of every other matrix filled, and holes for the rest: any size fits
on any disk, and costs the same memory as a full one. OPTIONS go to ``qc compile``. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

INTERVAL = 0.05
FILLED_ROWS = 64
SHARD_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-shaped decoder that decide its size."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 512),
    "150M-wide": Shape(8, 1280, 3328, 10, 5, 2048),
    "200M": Shape(8, 1536, 4096, 12, 4, 2048),
    "150M": Shape(16, 768, 2048, 12, 4, 30522),
    "1.2B": Shape(24, 2048, 5632, 32, 8, 32000),
    "7B": Shape(32, 4096, 11008, 32, 32, 32000),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights, as a checkpoint of the hub has them."""
    kv = shape.width // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.width)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (shape.width,)
        for name, rows in (("q", shape.width), ("k", kv), ("v", kv), ("o", shape.width)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, shape.width)
        yield f"{at}.post_attention_layernorm.weight", (shape.width,)
        yield f"{at}.mlp.gate_proj.weight", (shape.hidden, shape.width)
        yield f"{at}.mlp.up_proj.weight", (shape.hidden, shape.width)
        yield f"{at}.mlp.down_proj.weight", (shape.width, shape.hidden)
    yield "model.norm.weight", (shape.width,)
    yield "lm_head.weight", (shape.vocabulary, shape.width)


def write_model(directory: Path, shape: Shape, *, sparse: bool) -> None:
    """Writes configuration, shards and index; of one weight at most a few rows are in memory."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": shape.width, "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in tensors(shape):
        size += 2 * math.prod(dims)
        if size > SHARD_BYTES:
            shards.append([])
            size = 2 * math.prod(dims)
        shards[-1].append((name, dims))
    rng, places = np.random.default_rng(0), {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= {name: file for name, _ in held}
        _write_shard(directory / file, held, rng, sparse=sparse)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(
    file: Path, held: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator, *, sparse: bool
) -> None:
    header, end = {}, 0
    for name, dims in held:
        begin, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        stream.truncate(start + end)
        for name, dims in held:
            stream.seek(start + header[name]["data_offsets"][0])
            rows = min(dims[0], FILLED_ROWS) if sparse and "embed" not in name and len(dims) == 2 else dims[0]
            for first in range(0, rows, 4096):
                part = (min(4096, rows - first), *dims[1:])
                values = np.ones(part, np.float32) if len(dims) == 1 else rng.standard_normal(part, np.float32) * 0.02
                stream.write(values.astype(ml_dtypes.bfloat16).tobytes())


def tree_memory(root: int) -> tuple[int, int]:
    """Anonymous and all resident memory of a process and its descendants, in bytes."""
    anonymous = resident = 0
    pending = [(root, {})]
    while pending:
        number, parent = pending.pop()
        process = Path("/proc") / str(number)
        try:
            found = dict(re.findall(r"^(RssAnon|VmRSS):\s+(\d+) kB$", (process / "status").read_text(), re.MULTILINE))
            children = [c for task in (process / "task").iterdir() for c in (task / "children").read_text().split()]
        except OSError:  # it has ended meanwhile
            continue
        pending += [(int(child), found) for child in children]
        if found != parent:  # else it is about to become another program, and uses the memory of its parent
            anonymous += int(found.get("RssAnon", 0)) << 10
            resident += int(found.get("VmRSS", 0)) << 10
    return anonymous, resident


@dataclasses.dataclass
class Used:
    """What a piece of work in this process took.

    Attributes:
        seconds: Processor time.
        memory: The peak of anonymous memory above what the process had before, in bytes.
    """

    seconds: float = 0.0
    memory: int = 0


@contextlib.contextmanager
def used() -> Iterator[Used]:
    """Measures what runs inside."""
    found, done, before = Used(), threading.Event(), tree_memory(os.getpid())[0]

    def watch() -> None:
        while not done.wait(INTERVAL):
            found.memory = max(found.memory, tree_memory(os.getpid())[0] - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    try:
        yield found
    finally:
        found.seconds = time.process_time() - began
        done.set()
        watcher.join()


@dataclasses.dataclass
class Peak:
    """The largest values seen between two lines of the compile."""

    stage: str
    line: str = ""
    seconds: float = 0.0
    anonymous: int = 0
    resident: int = 0


def watch(command: list[str], *, quiet: bool) -> tuple[int, list[Peak]]:
    """Runs `command`; returns its exit code and the peaks before each of its lines on standard error."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    peaks, began = [Peak("start")], time.perf_counter()
    assert process.stderr is not None

    def read(lines: Iterator[str]) -> None:
        for line in lines:
            last = peaks[-1]
            last.line, last.seconds = line.rstrip(), time.perf_counter() - began
            stage = re.fullmatch(r"([\w-]+) \.\.\.", last.line)
            peaks.append(Peak(stage[1] if stage else last.stage))
            if not quiet:
                print(_row(last), flush=True)

    reader = threading.Thread(target=read, args=(process.stderr,))
    reader.start()
    while process.poll() is None:
        anonymous, resident = tree_memory(process.pid)
        last = peaks[-1]
        last.anonymous, last.resident = max(last.anonymous, anonymous), max(last.resident, resident)
        time.sleep(INTERVAL)
    reader.join()
    peaks[-1].line, peaks[-1].seconds = "(end)", time.perf_counter() - began
    return process.returncode, peaks


def _row(peak: Peak) -> str:
    return f"{peak.seconds:8.1f} s {peak.anonymous >> 20:7,} MiB {peak.resident >> 20:7,} MiB  {peak.line}"


def stages(peaks: list[Peak]) -> dict[str, int]:
    """The peak of anonymous memory in each stage, in bytes."""
    found: dict[str, int] = {}
    for peak in peaks:
        found[peak.stage] = max(found.get(peak.stage, 0), peak.anonymous)
    return found


def measure(
    shape: str, work: Path, *, sparse: bool, recipe: str, options: list[str], quiet: bool
) -> Mapping[str, object]:
    """Writes the model unless it stands in `work`, compiles it, and returns every figure."""
    source, artifact = work / f"{shape}{'-sparse' if sparse else ''}", work / f"{shape}-{recipe}"
    if not source.is_dir():
        write_model(source, SHAPES[shape], sparse=sparse)
    door = "import sys; from qc.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", door, "compile", str(source), "-o", str(artifact), "--force"]
    if not quiet:
        print(f"{'time':>10} {'anonymous':>11} {'resident':>11}  since the line before", flush=True)
    code, peaks = watch([*command, "--recipe", recipe, *options], quiet=quiet)
    if code:
        sys.exit("\n".join(p.line for p in peaks[-12:]) + f"\nqc compile ended with exit code {code}")
    plan = "\n".join(p.line for p in peaks)
    return {
        "shape": shape,
        "recipe": recipe,
        "seconds": peaks[-1].seconds,
        "anonymous_bytes": max(p.anonymous for p in peaks),
        "resident_bytes": max(p.resident for p in peaks),
        "estimated_memory_bytes": _planned(plan, "peak memory about"),
        "estimated_artifact_bytes": _planned(plan, "artifact about"),
        "artifact_bytes": sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file()),
        "stages": stages(peaks),
    }


def _planned(text: str, label: str) -> int:
    found = re.search(rf"{label} ([\d.,]+) MiB", text)
    return round(float(found[1].replace(",", "")) * (1 << 20)) if found else 0


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.2B")
    parser.add_argument("--sparse", action="store_true", help="leave holes in the weights")
    parser.add_argument("--recipe", default="w4")
    parser.add_argument(
        "--work", type=Path, help="where model and artifact stand, and stay; default: a temporary place"
    )
    parser.add_argument("--json", action="store_true", help="print the figures only, as JSON")
    parser.add_argument("options", nargs="*", help="of qc compile, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qc-memory-") as temporary:
        found = measure(
            given.shape,
            given.work or Path(temporary),
            sparse=given.sparse,
            recipe=given.recipe,
            options=given.options,
            quiet=given.json,
        )
    if given.json:
        print(json.dumps(found))
        return
    print()
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}: " + ", ".join(f"{k} {v >> 20:,} MiB" for k, v in value.items()))
        else:
            print(f"{key}: {value >> 20:,} MiB" if key.endswith("_bytes") else f"{key}: {value}")


if __name__ == "__main__":
    main()
