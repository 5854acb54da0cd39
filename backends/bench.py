"""Speed of artifacts: measured in turns within one process, quoted as medians and median ratios.

Machines are noisy and drift. Two artifacts take turns, round by round, and each round gives one ratio; what disturbs a
round disturbs both sides of it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from qc.backends.artifact import Artifact
from qc.backends.decoding import context_limit
from qc.backends.target import Runner, backend_for
from qc.backends.traffic import copy_bandwidth
from qc.ir.errors import InputError
from qc.ir.model import Port

__all__ = ["Protocol", "bench", "take_turns"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How speed is measured.

    Attributes:
        threads: Threads within an operator; 0 for one per core.
        rounds: Rounds that count; one more warms up.
        prompt: Tokens of a decoder's prompt.
        tokens: Tokens that are decoded after it.
        length: Tokens of a short and of a long input of other text models.
        batch: Samples of a small and of a large input of all other models.
        seed: Seed of the inputs.
        cpu: Whether processor time is counted instead of wall time: fair on a busy machine, but only with one thread.
    """

    threads: int = 1
    rounds: int = 5
    prompt: int = 64
    tokens: int = 64
    length: tuple[int, int] = (16, 128)
    batch: tuple[int, int] = (1, 4)
    seed: int = 0
    cpu: bool = False

    def clock(self) -> float:
        """Seconds since some fixed moment."""
        return time.process_time() if self.cpu else time.perf_counter()


def bench(a: Artifact, b: Artifact | None = None, protocol: Protocol | None = None) -> dict[str, Any]:
    """Measures one artifact, or two in turns.

    Returns:
        ``{"a": {...}, "b": {...} | None, "ratio": {...}, "protocol": {...}}``. A side has ``load_ms``; for a decoder
        ``decode_tok_s``, ``prefill_ms``, and ``bytes_per_token``, ``bandwidth_gb_s``, ``bandwidth_fraction`` (weights
        streamed at that speed, and their share of what a plain copy reaches here); for others ``latency_ms`` and
        ``latency_large_ms``. Ratios (``decode``, ``prefill``, ``latency``, ``latency_large``) are above 1 where A is
        faster. None where a figure does not apply.

    Raises:
        InputError: If an artifact cannot be measured, or the two are not of one kind.
    """
    protocol = protocol or Protocol()
    sides = {"a": a} if b is None else {"a": a, "b": b}
    runners, loads = {}, {}
    for name, artifact in sides.items():
        artifact.runner(threads=protocol.threads, spinning=False)  # so that no side pays for reading the disk
        started = protocol.clock()
        runners[name] = artifact.runner(threads=protocol.threads, spinning=False)
        loads[name] = 1e3 * (protocol.clock() - started)
    found = take_turns(runners, protocol)
    copy = copy_bandwidth(protocol.threads)
    for name, artifact in sides.items():
        figures = found[name]
        figures["load_ms"] = loads[name]
        figures.update(bytes_per_token=None, bandwidth_gb_s=None, bandwidth_fraction=None)
        if figures["decode_tok_s"] is not None:
            read = backend_for(artifact.manifest.target).streamed_bytes(artifact.directory)
            speed = read * figures["decode_tok_s"]
            figures.update(bytes_per_token=read, bandwidth_gb_s=speed / 1e9, bandwidth_fraction=speed / copy)
    return {**found, "copy_gb_s": copy / 1e9, "protocol": dataclasses.asdict(protocol)}


def take_turns(runners: Mapping[str, Runner], protocol: Protocol) -> dict[str, Any]:
    """Measures runners that are loaded already, under the names ``a`` and perhaps ``b``; see `bench`."""
    kinds = {r.signature.is_decoder for r in runners.values()}
    if len(kinds) > 1:
        raise InputError("Expected two artifacts of one kind, found a decoder and another model. They do not compare.")
    measure = _decoder if kinds == {True} else _latency
    inputs = _prompt(runners, protocol) if kinds == {True} else _sizes(runners["a"], protocol)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    for number in range(protocol.rounds + 1):
        order = list(runners) if number % 2 else list(runners)[::-1]
        for name in order:
            figures = measure(runners[name], inputs, protocol)
            if number > 0:  # the first round warms up
                rounds[name].append(figures)
    medians = {name: {k: statistics.median(r[k] for r in held) for k in held[0]} for name, held in rounds.items()}
    empty = dict.fromkeys(("decode_tok_s", "prefill_ms", "latency_ms", "latency_large_ms"))
    found: dict[str, Any] = {"a": None, "b": None}
    found.update({name: {**empty, **figures} for name, figures in medians.items()})
    found["ratio"] = {
        "decode": _ratio(rounds, "decode_tok_s", higher_is_better=True),
        "prefill": _ratio(rounds, "prefill_ms"),
        "latency": _ratio(rounds, "latency_ms"),
        "latency_large": _ratio(rounds, "latency_large_ms"),
    }
    return found


def _ratio(rounds: Mapping[str, list[dict[str, float]]], key: str, *, higher_is_better: bool = False) -> float | None:
    if "b" not in rounds or key not in rounds["a"][0]:
        return None
    pairs = zip(rounds["a"], rounds["b"], strict=True)
    ratios = [a[key] / b[key] if higher_is_better else b[key] / a[key] for a, b in pairs]
    return statistics.median(ratios)


def _prompt(runners: Mapping[str, Runner], protocol: Protocol) -> list[int]:
    limits = [context_limit(r.provenance) for r in runners.values()]
    known = [limit for limit in limits if limit is not None]
    length = min([protocol.prompt, *(limit // 2 for limit in known)])
    logits = runners["a"].signature.output("logits")
    size = logits.shape[-1] if logits is not None else None
    bound = size if isinstance(size, int) else _vocabulary(runners["a"])
    return np.random.default_rng(protocol.seed).integers(0, bound, length).tolist()


def _decoder(runner: Runner, prompt: list[int], protocol: Protocol) -> dict[str, float]:
    started = protocol.clock()
    stream = runner.generate(prompt, protocol.tokens + 1)
    next(stream)
    first = protocol.clock()
    count = sum(1 for _ in stream)
    ended = protocol.clock()
    return {"prefill_ms": 1e3 * (first - started), "decode_tok_s": count / (ended - first)}


def _sizes(runner: Runner, protocol: Protocol) -> dict[str, dict[str, np.ndarray]]:
    """Inputs by the figure that they give."""
    text = runner.signature.input("tokens") is not None
    limit = context_limit(runner.provenance)
    lengths = [n if limit is None else min(n, limit) for n in protocol.length]
    sizes = [(1, n) for n in lengths] if text else [(n, _PIXELS) for n in protocol.batch]
    return {
        key: _inputs(runner, batch, length, protocol.seed)
        for key, (batch, length) in zip(("latency_ms", "latency_large_ms"), sizes, strict=True)
    }


def _latency(runner: Runner, inputs: Mapping[str, Mapping[str, np.ndarray]], protocol: Protocol) -> dict[str, float]:
    """The median of as many runs as a decoder's round has tokens, but of no more than about half a second."""
    found = {}
    for key, batch in inputs.items():
        times: list[float] = []
        while len(times) < 3 or (len(times) < protocol.tokens and sum(times) < 0.5):
            started = protocol.clock()
            runner.run(batch)
            times.append(protocol.clock() - started)
        found[key] = 1e3 * statistics.median(times)
    return found


_PIXELS = 224  # of an image whose size the model leaves open


def _inputs(runner: Runner, batch: int, length: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    bound = _vocabulary(runner)
    return {p.name: _array(p, batch, length, bound, rng) for p in runner.signature.inputs}


def _array(port: Port, batch: int, length: int, bound: int, rng: np.random.Generator) -> np.ndarray:
    shape = tuple(d if isinstance(d, int) else batch if axis == 0 else length for axis, d in enumerate(port.shape))
    match port.role:
        case "tokens" | "decoder_tokens":
            value = rng.integers(0, bound, shape)
        case "mask" | "decoder_mask":
            value = np.ones(shape)
        case "positions":
            value = np.broadcast_to(np.arange(shape[-1]), shape)
        case _:
            value = rng.standard_normal(shape) if port.dtype.is_floating_point() else np.zeros(shape)
    return np.ascontiguousarray(value, dtype=port.dtype.numpy())


def _vocabulary(runner: Runner) -> int:
    size = runner.provenance.get("vocab_size", "")
    return int(size) if size.isdigit() else 2
