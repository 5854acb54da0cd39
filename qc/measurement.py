"""The data of a compile: what statistics are collected on, and what the artifact is measured on."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qc.backends.bench import Protocol, take_turns
from qc.backends.decoding import context_limit
from qc.backends.evaluate import WINDOW, evaluate, text_windows
from qc.backends.inputs import text_batches, text_inputs
from qc.backends.target import Runner
from qc.backends.tokenizer import Tokenizer
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.probe import Found
from qc.plan import Plan, evaluation_windows

__all__ = ["Data", "measure", "measured_batches", "read_data", "rehearse", "speed"]

_CALIBRATION_WINDOWS = 4
"""Windows of text for statistics: second moments of channels change little beyond a thousand tokens."""

_MOST_SENTENCES = 256
"""Sentences that an encoder is calibrated on, and as many that it is measured on: several thousand tokens each."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a compile calibrates and measures on.

    Attributes:
        name: Where it comes from, for the report.
        tokens: Token ids of the part of a text to measure a decoder on; None for other models.
        batches: Inputs to measure any other model on; None: the probe.
        calibration: Batches to collect statistics on; None: synthetic ones.
    """

    name: str
    tokens: Sequence[int] | None = None
    batches: Sequence[Mapping[str, np.ndarray]] | None = None
    calibration: Sequence[Mapping[str, np.ndarray]] | None = None


def read_data(model: Model, calib: str | Path | None) -> Data:
    """Finds the data for `model`: the end of a text calibrates, its beginning measures, and they do not overlap.

    An encoder reads each line as a sentence, a decoder the whole text in windows.

    Args:
        model: The model.
        calib: A text file; None for the sample text that travels with the model, or random data.

    Raises:
        InputError: If the text is missing or cannot be tokenized, or the model takes no text.
    """
    decoder = model.signature.is_decoder
    if not decoder and model.signature.input("tokens") is None:
        if calib is not None:
            raise InputError(
                "Expected a text decoder or encoder for --calib, found a model that takes no tokens. Leave --calib out."
            )
        return Data("random inputs")
    path = Path(calib) if calib is not None else model.assets.get("sample.txt")
    if path is None and not decoder:
        return Data("random inputs")
    if path is None:
        bound = int(model.provenance.get("vocab_size", 0)) or 256
        return Data("random tokens", np.random.default_rng(0).integers(0, bound, 4 * WINDOW).tolist())
    if not path.is_file():
        raise InputError(f"Expected a text file at {path}, found none. Check --calib.")
    tokenizer = model.assets.get("tokenizer.json")
    if tokenizer is None:
        raise InputError("Expected a tokenizer.json beside the model to read --calib text with, found none.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 text in {path}, found other bytes ({error}).") from error
    read = _windows if decoder else _sentences
    return read(model, path, text, Tokenizer(tokenizer.parent))


def _sentences(model: Model, path: Path, text: str, tokenizer: Tokenizer) -> Data:
    """The lines of a text as sentences for an encoder, cut to its context."""
    limit = context_limit(model.provenance)
    sentences = [tokenizer.encode_sentence(line)[:limit] for line in text.splitlines() if line.strip()]
    count = min(_MOST_SENTENCES, len(sentences) // 2)
    if not count:
        raise InputError(f"Expected at least 2 lines of text in {path}, one sentence each. Give a longer text.")
    measured, calibration = (text_batches(model.signature, part) for part in (sentences[:count], sentences[-count:]))
    return Data(path.name, batches=measured, calibration=calibration)


def _windows(model: Model, path: Path, text: str, tokenizer: Tokenizer) -> Data:
    """A text as windows of consecutive tokens for a decoder."""
    tokens = tokenizer.encode(text)
    # A short text still gives each side something: half of its windows, down to windows of half the text.
    window = min(WINDOW, len(tokens) // 2, context_limit(model.provenance) or WINDOW)
    if window < 2:
        raise InputError(f"Expected at least 4 tokens of text in {path}, found {len(tokens)}. Give a longer text.")
    count = min(_CALIBRATION_WINDOWS, len(tokens) // window // 2)
    rows = np.array(tokens[-count * window :], np.int64).reshape(count, 1, window)
    batches = [text_inputs(model.signature, row) for row in rows]
    return Data(path.name, tokens[: -count * window], calibration=batches)


def rehearse(reference: Runner, plan: Plan, data: Data) -> None:
    """Runs the float model on what `measure` will ask of it, while nothing else is in memory."""
    for batch in measured_batches(reference, plan, data):
        reference.run(batch)
    _return_freed_memory()


def measured_batches(runner: Runner, plan: Plan, data: Data) -> list[Mapping[str, np.ndarray]]:
    """The inputs on which `measure` runs a model, the probe aside."""
    if data.tokens is None:
        return list(data.batches or ())
    rows = text_windows(runner, data.tokens, *evaluation_windows(plan.parameters))
    return [text_inputs(runner.signature, row[None]) for row in rows]


def measure(runner: Runner, reference: Runner, plan: Plan, data: Data, probe: Found) -> dict[str, object]:
    """Measures an artifact in its runtime against the float model.

    Args:
        runner: The artifact.
        reference: The float model.
        plan: Tells the size of the model; large ones are measured on fewer windows.
        data: From `read_data`.
        probe: Inputs, and what the float model yields, for models that are not measured on text.

    Returns:
        ``measured_on`` and those figures of `qc.backends.evaluate` that apply.
    """
    if data.batches is not None:
        found = evaluate(runner, reference, inputs=data.batches)
    elif data.tokens is None:
        if probe.obstacle:
            return {"measured_on": f"nothing: {probe.obstacle}; only the structure was verified"}
        if not any(v.size and v.dtype.kind in "fVbiu" for outputs in probe.outputs for v in outputs.values()):
            return {"measured_on": "nothing: no output holds numbers; they are equal"}
        found = evaluate(runner, reference, inputs=probe.batches)
    else:
        window, windows = evaluation_windows(plan.parameters)
        found = evaluate(runner, reference, text_tokens=data.tokens, window=window, windows=windows)
    return {"measured_on": data.name, **{k: v for k, v in found.items() if v is not None}}


def speed(runner: Runner, probe: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """A first impression of an artifact's speed; `qc.backends.bench` measures it properly.

    Returns:
        ``decode_tok_s`` and ``prefill_ms`` (64 tokens) of a decoder, else ``latency_ms`` on the first probe batch.
    """
    if runner.signature.is_decoder:
        found = take_turns({"a": runner}, Protocol(rounds=2, tokens=32))["a"]
        return {key: found[key] for key in ("decode_tok_s", "prefill_ms")}
    times = []
    for _ in range(10):
        started = time.perf_counter()
        runner.run(probe[0])
        times.append(time.perf_counter() - started)
    return {"latency_ms": 1e3 * statistics.median(times)}


def _return_freed_memory() -> None:
    """Hands freed memory back to the system, where the C library keeps it: the artifact is about to need as much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
