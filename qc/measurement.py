"""Measures an artifact against the float model, on the data of a compile."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from qc.backends.bench import Protocol, take_turns
from qc.backends.evaluate import evaluate, text_windows
from qc.backends.inputs import text_inputs
from qc.backends.target import Runner
from qc.data import Data
from qc.ir.probe import Found
from qc.plan import Plan, evaluation_windows

__all__ = ["measure", "measured_batches", "rehearse", "speed"]


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
