"""``qc run``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qc.arrays import read_arrays, write_arrays
from qc.backends.artifact import Artifact
from qc.backends.sampling import GREEDY, Sampling
from qc.backends.tokenizer import Tokenizer
from qc.ir.errors import InputError

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Streams a continuation of the prompt, or what an encoder-decoder answers; or maps arrays to arrays."""
    sampling = _sampling(arguments)
    artifact = Artifact.open(Path(arguments.artifact))
    if arguments.prompt is not None:
        return _generate(artifact, sampling, arguments)
    if sampling != GREEDY:
        raise InputError("Expected --prompt together with --temperature, --top-k, --top-p or --seed, found --input.")
    if arguments.output is None:
        raise InputError("Expected --output OUT.npz together with --input.")
    arrays = read_arrays(Path(arguments.input))
    outputs = artifact.runner(threads=arguments.threads).run(arrays)
    write_arrays(Path(arguments.output), outputs)
    print("\n".join(f"{name}: {value.dtype} {list(value.shape)}" for name, value in outputs.items()))
    return 0


def _sampling(arguments: argparse.Namespace) -> Sampling:
    """How tokens are chosen: greedily, if nothing is said about drawing them."""
    names = ("temperature", "top_k", "top_p", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return Sampling(**given) if given else GREEDY


def _generate(artifact: Artifact, sampling: Sampling, arguments: argparse.Namespace) -> int:
    signature = artifact.signature
    if not signature.generates:
        raise InputError(f"{arguments.artifact} generates no text; use --input and --output.")
    tokenizer = Tokenizer(artifact.directory)
    runner = artifact.runner(threads=arguments.threads)
    if signature.is_decoder:
        tokens = tokenizer.encode(arguments.prompt)
        sys.stdout.write(arguments.prompt)
    else:
        tokens = tokenizer.encode_sentence(arguments.prompt)
    chosen = runner.generate(tokens, arguments.max_tokens, tokenizer.stop, sampling)
    for piece in tokenizer.stream(chosen):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
