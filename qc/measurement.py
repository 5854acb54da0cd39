"""The data of a compile: what statistics are collected on, and what the artifact is measured on."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qc.backends.bench import Protocol, take_turns
from qc.backends.decoding import context_limit
from qc.backends.evaluate import WINDOW, evaluate, text_windows
from qc.backends.inputs import text_batches, text_inputs
from qc.backends.target import Runner
from qc.calibration import read_batches, read_documents
from qc.ir.errors import InputError
from qc.ir.model import Model, Signature
from qc.ir.probe import Found
from qc.passes.base import CALIBRATION_TOKENS
from qc.plan import Plan, evaluation_windows

__all__ = ["Data", "fitted", "measure", "measured_batches", "read_data", "rehearse", "shortened", "speed"]

_MOST_BATCHES = 128
"""Batches of arrays to calibrate on."""

_OTHER_SUFFIXES = frozenset(
    {".jsonl", ".npy", ".npz", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
)
"""Files that are no plain text."""

_LONGEST = 2048
"""Token ids of one text: the memory of attention grows with the square of its length."""

_MOST_SENTENCES = 256
"""Sentences that an encoder is calibrated on, and as many that it is measured on: several thousand tokens each."""

_SIMULATED_WINDOWS, _SIMULATED_ROWS = 1, 4
"""What is measured in a simulator of the hardware, where a layer takes a tenth of a second or more."""


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


def read_data(
    model: Model,
    calib: str | Path | Iterable[Mapping[str, object]] | None,
    *,
    samples: int | None = None,
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
) -> Data:
    """Finds the data for `model`: the end of a text calibrates, its beginning measures, and they do not overlap.

    An encoder reads each line as a sentence, a decoder the whole text in windows. Other data, see `qc.calibration`:
    of several texts, half of them, chosen by `seed`, calibrate and the others measure; arrays only calibrate.

    Args:
        model: The model.
        calib: A file, a directory, or inputs by name; None for the sample text that travels with the model, or random
            data.
        samples: Windows, texts or batches to calibrate on at most; None for as many windows as hold `tokens`.
        tokens: How many tokens of a continuous text the statistics want.
        seed: Of the choice among more of them.

    Raises:
        InputError: If the data are missing, unreadable, or do not fit the model.
    """
    decoder = model.signature.is_decoder
    if calib is not None and not isinstance(calib, (str, Path)):
        batches = read_batches(calib, model, samples or _MOST_BATCHES, seed)
        return _with_measured(model, Data("given inputs", calibration=batches))
    if not decoder and model.signature.input("tokens") is None and calib is None:
        return Data("random inputs")
    path = Path(calib) if calib is not None else model.assets.get("sample.txt")
    if path is None and not decoder:
        return Data("random inputs")
    if path is None:
        return Data("random tokens", _random_tokens(model))
    if not path.exists():
        raise InputError(f"Expected calibration data at {path}, found none. Check --calib.")
    documents = read_documents(path, model)
    if documents is None:
        batches = read_batches(path, model, samples or _MOST_BATCHES, seed)
        return _with_measured(model, Data(path.name, calibration=batches))
    if documents.continuous:
        return _windows(model, path, documents.ids[0], samples or -(-tokens // WINDOW))
    return _texts(model, path, documents.ids, samples or _MOST_SENTENCES, seed)


def fitted(data: Data, signature: Signature, longest: int) -> Data:
    """The same data with texts to measure on that are cut to `longest` tokens."""
    if data.batches is None:
        return data
    along = {p.name for p in signature.inputs if p.role in ("tokens", "mask", "positions", "token_types")}
    batches = [{k: v[..., :longest] if k in along else v for k, v in b.items()} for b in data.batches]
    return dataclasses.replace(data, batches=batches)


def shortened(data: Data, plan: Plan) -> Data:
    """The same data with so little to measure on that a simulator comes to an end: a window, or 4 rows."""
    if data.tokens is not None:
        window, _ = evaluation_windows(plan.parameters)
        return dataclasses.replace(data, tokens=data.tokens[: _SIMULATED_WINDOWS * window])
    if data.batches is None:
        return data
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in data.batches for i in range(len(next(iter(b.values()))))]
    step = max(1, len(rows) // _SIMULATED_ROWS)
    return dataclasses.replace(data, batches=rows[::step][:_SIMULATED_ROWS])


def _random_tokens(model: Model) -> list[int]:
    bound = int(model.provenance.get("vocab_size", 0)) or 256
    return np.random.default_rng(0).integers(0, bound, 4 * WINDOW).tolist()


def _with_measured(model: Model, data: Data) -> Data:
    """What is calibrated on arrays is measured on the text that travels with the model, else on random inputs."""
    measured = read_data(model, None)
    return dataclasses.replace(
        measured, name=f"{measured.name}, calibrated on {data.name}", calibration=data.calibration
    )


def _texts(model: Model, path: Path, texts: Sequence[Sequence[int]], most: int, seed: int) -> Data:
    """Texts that have nothing to do with each other, cut to the model's context."""
    limit = context_limit(model.provenance)
    if model.signature.is_decoder:
        limit = min(limit or _LONGEST, _LONGEST)
    texts = [list(t[:limit]) for t in texts]
    count = min(most, len(texts) // 2)
    if not count:
        unit = "texts" if path.suffix in _OTHER_SUFFIXES else "lines, one sentence each,"
        raise InputError(f"Expected at least 2 {unit} in {path}, to calibrate on one and measure on another; found 1.")
    if path.suffix in _OTHER_SUFFIXES:  # a file of lines is in an order; one of records often is not
        order = np.random.default_rng([seed, len(texts)]).permutation(len(texts))
        texts = [texts[i] for i in order.tolist()]
    measured, calibration = texts[:count], texts[-count:]
    if model.signature.is_decoder:
        tokens = [i for text in texts[:-count] for i in text]
        return Data(path.name, tokens, calibration=text_batches(model.signature, calibration))
    batches = (text_batches(model.signature, part) for part in (measured, calibration))
    return Data(path.name, batches=next(batches), calibration=next(batches))


def _windows(model: Model, path: Path, tokens: Sequence[int], most: int) -> Data:
    """A text as windows of consecutive tokens."""
    # A short text still gives each side something: half of its windows, down to windows of half the text.
    window = min(WINDOW, len(tokens) // 2, context_limit(model.provenance) or WINDOW)
    if window < 2:
        raise InputError(f"Expected at least 4 tokens of text in {path}, found {len(tokens)}. Give a longer text.")
    count = min(most, len(tokens) // window // 2)
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
