"""``qc eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

from qc.arrays import read_arrays
from qc.backends.artifact import Artifact
from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.backends.target import Runner
from qc.cli.output import accuracy_rows, print_json, print_table
from qc.data import batches_to_measure
from qc.documents import read_documents
from qc.frontend import load
from qc.ir.errors import InputError

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Measures a model or an artifact, alone or against a reference."""
    runner, directory = _open(arguments.model, arguments.threads)
    reference = None if arguments.reference is None else _open(arguments.reference, arguments.threads)[0]
    if arguments.input is not None:
        data = evaluate(runner, reference, inputs=[read_arrays(Path(arguments.input))])
    else:
        data = _on_text(runner, reference, directory, arguments)
    if arguments.json:
        print_json(data)
    else:
        print_table("", ("", ""), accuracy_rows(data))
        if reference is None:
            print("\nnext: --reference MODEL measures the distance to the model that it was made from")
    return 0


def _on_text(runner: Runner, reference: Runner | None, directory: Path, arguments: argparse.Namespace) -> dict:
    path = Path(arguments.text) if arguments.text is not None else directory / "sample.txt"
    if not path.is_file():
        raise InputError(f"Expected a text at {path}, found none. Give one with --text, or arrays with --input.")
    signature = runner.signature
    predicts = signature.output("logits") is not None and signature.input("decoder_tokens") is None
    documents = read_documents(path, signature, directory, whole=predicts)
    if predicts:
        tokens = [i for text in documents.ids for i in text]
        return evaluate(runner, reference, text_tokens=tokens, window=arguments.window, windows=arguments.windows)
    return evaluate(runner, reference, inputs=batches_to_measure(reference or runner, documents, directory))


def _open(source: str, threads: int) -> tuple[Runner, Path]:
    """Opens an artifact, or a model in the verifying runtime, and tells where its tokenizer lies."""
    if (Path(source) / "manifest.json").is_file():
        artifact = Artifact.open(source)
        return artifact.runner(threads=threads), artifact.directory
    model = load(source)
    tokenizer = model.assets.get("tokenizer.json")
    return ModelRunner(model, threads=threads), tokenizer.parent if tokenizer is not None else Path(source)
