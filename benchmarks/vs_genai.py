"""Compares an int4 decoder of ours with one of onnxruntime-genai's own builder, at the same block size.

Builds a Llama with random weights, compiles it with qc and with genai's builder, and runs both results in turns, in one
process: both in `qc run`, both in genai, and each in the runtime of its maker. Needs the extras ``torch`` and
``genai``::

    python benchmarks/vs_genai.py --threads 1 --rounds 7
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qc
from qc.backends.bench import Protocol, take_turns
from qc.backends.manifest import dump_json
from qc.backends.ort.emit import emit
from qc.backends.ort.runner import open_runner
from qc.backends.target import Runner
from qc.ir.model import Model, port_of

VOCABULARY = 30522
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
COMPARED = 32  # greedy tokens


class GenaiRunner:
    """A directory that onnxruntime-genai loads, seen as a runner."""

    def __init__(self, directory: Path, like: Runner, threads: int) -> None:
        import onnxruntime_genai as genai

        self.signature, self.provenance = like.signature, like.provenance
        config = genai.Config(str(directory))
        options = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai, self._model = genai, genai.Model(config)

    def run(self, inputs: object) -> dict[str, np.ndarray]:
        raise RuntimeError("Bug: onnxruntime-genai only generates.")

    def generate(self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        length = len(tokens) + max_tokens
        parameters = self._genai.GeneratorParams(self._model)
        # min_length: a random model may choose its end token at once.
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(list(tokens))
        for _ in range(max_tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


def make_model(directory: Path, layers: int) -> None:
    """Writes a Hugging Face directory with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(directory)
    # The builder copies a tokenizer; any will do.
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "a": 2}
    held = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=held, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def build_theirs(source: Path, out: Path, block: int) -> None:
    """Runs genai's builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out, "-p", "int4"]
    command += ["-e", "cpu", "-c", out / "cache", "--extra_options", f"int4_block_size={block}"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"onnxruntime-genai's builder failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def read_theirs(directory: Path) -> Model:
    """Reads their graph as any ONNX file, and fills in the head size that it leaves open."""
    model = qc.load(directory / "model.onnx")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if port_of(value).role.startswith(("past_", "present_")):
            value.shape = ir.Shape([*value.shape[:3], SHAPE["hidden_size"] // SHAPE["num_attention_heads"]])
    return model


def weight_bytes(directory: Path) -> int:
    """Size of the graph and its weights."""
    return sum(f.stat().st_size for f in directory.iterdir() if ".onnx" in f.name)


def compare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Builds both and measures them."""
    source, theirs, ours = (work / name for name in ("source", "theirs", "ours"))
    if not source.is_dir():
        make_model(source, arguments.layers)
    if not theirs.is_dir():
        build_theirs(source, theirs, block=32)
    qc.compile(source, ours, recipe=arguments.recipe, force=True, settings=arguments.set)
    theirs_read = work / "theirs-read"
    theirs_read.mkdir(exist_ok=True)
    emit(read_theirs(theirs), theirs_read)

    protocol = Protocol(threads=arguments.threads, rounds=arguments.rounds, prompt=64, tokens=96, cpu=arguments.cpu)
    runners = {
        "qc run": {
            "a": open_runner(ours, threads=protocol.threads, spinning=False),
            "b": open_runner(theirs_read, threads=protocol.threads, spinning=False),
        }
    }
    shape = runners["qc run"]["a"]
    runners["genai"] = {
        "a": GenaiRunner(ours, shape, protocol.threads),
        "b": GenaiRunner(theirs, shape, protocol.threads),
    }
    runners["each own"] = {"a": runners["qc run"]["a"], "b": runners["genai"]["b"]}
    prompt = np.random.default_rng(1).integers(2, VOCABULARY, 16).tolist()
    texts = {
        (runtime, side): list(r.generate(prompt, COMPARED)) for runtime, s in runners.items() for side, r in s.items()
    }
    sizes = {"a": weight_bytes(ours), "b": weight_bytes(theirs)}
    return {
        "speed": {runtime: take_turns(sides, protocol) for runtime, sides in runners.items()},
        "bytes": sizes,
        "size_ratio": sizes["a"] / sizes["b"],
        "greedy_equal": texts["qc run", "a"] == texts["genai", "a"],
        "protocol": {**vars(protocol), "compared_tokens": COMPARED},
    }


def main() -> None:
    """Prints a table, or everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="count processor time: for a busy machine, one thread")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--recipe", default="w4", help="with blocks of 32, as theirs")
    parser.add_argument("--set", action="append", default=[], metavar="PASS.OPTION=VALUE")
    parser.add_argument("--work", type=Path, help="keep the models here, to build them once")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = compare(arguments, work)
    if arguments.json:
        print(dump_json(found), end="")
        return
    protocol = found["protocol"]
    print(f"random Llama, {arguments.layers} layers, int4 in blocks of 32")
    print(f"A: qc compile --recipe {arguments.recipe}; B: onnxruntime-genai's builder")
    print(
        f"prompt {protocol['prompt']}, {protocol['tokens']} tokens, {protocol['threads']} thread(s), "
        f"{protocol['rounds']} alternating rounds after one to warm up; medians of "
        f"{'processor' if protocol['cpu'] else 'wall'} time; ratios above 1: A is faster"
    )
    print(f"{'runtime':<10}{'decode A':>12}{'B tok/s':>10}{'ratio':>8}{'prefill A':>13}{'B ms':>8}{'ratio':>8}")
    for runtime, speed in found["speed"].items():
        a, b, ratio = speed["a"], speed["b"], speed["ratio"]
        print(
            f"{runtime:<10}{a['decode_tok_s']:>12.1f}{b['decode_tok_s']:>10.1f}{ratio['decode']:>8.2f}"
            f"{a['prefill_ms']:>13.1f}{b['prefill_ms']:>8.1f}{ratio['prefill']:>8.2f}"
        )
    a, b = (found["bytes"][side] / 2**20 for side in ("a", "b"))
    print(f"size A {a:.1f} MiB, B {b:.1f} MiB, ratio {found['size_ratio']:.2f}")
    print(f"greedy tokens of A equal in both runtimes: {found['greedy_equal']} ({COMPARED} tokens)")


if __name__ == "__main__":
    main()
