"""How far an artifact, running in its own runtime, is from the float model.

Language models, on a text (`text_tokens`): perplexity, Kullback-Leibler divergence and top-1 agreement. One BOS, the
text is tokenized once and cut into windows that do not overlap; each is run alone; its first token is not scored, since
nothing precedes it. All other models, on arrays (`inputs`): cosine, SQNR and largest difference, per output; and
encoder-decoders the figures of a text as well, on what their decoder reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qc.backends.decoding import context_limit
from qc.backends.inputs import text_inputs
from qc.backends.scores import Gap, Scores
from qc.backends.target import Runner
from qc.ir.errors import InputError
from qc.ir.model import Signature
from qc.ir.pooling import POOLINGS, embedding

__all__ = ["KEYS", "WINDOW", "WINDOWS", "evaluate", "text_windows"]

WINDOW = 256
"""Tokens in a window, unless said otherwise."""

WINDOWS = 64
"""Windows that are scored, unless said otherwise: the first ones of the text."""

KEYS = (
    "ppl",
    "ppl_reference",
    "kl",
    "top1",
    "cosine",
    "cosine_min",
    "sqnr_db",
    "max_abs",
    "tokens",
    "window",
    "windows",
    "outputs",
)
"""Keys of every evaluation; None where a figure does not apply."""

_CACHE_ROLES = frozenset({"present_key", "present_value"})


def evaluate(
    runner: Runner,
    reference: Runner | None = None,
    *,
    text_tokens: Sequence[int] | None = None,
    inputs: Sequence[Mapping[str, np.ndarray]] | None = None,
    window: int = WINDOW,
    windows: int = WINDOWS,
) -> dict[str, Any]:
    """Measures `runner`, alone or against `reference`, on a text or on arrays.

    Args:
        runner: What is measured.
        reference: What it should have computed; needed for all figures but ``ppl`` and ``tokens``.
        text_tokens: Ids of a text, BOS first; for models with logits over a vocabulary at each position.
        inputs: Batches of all inputs by name; for any model, instead of `text_tokens`.
        window: Tokens in a window; fewer where the text, or the context that the model was made for, is shorter.
        windows: Largest number of windows.

    Returns:
        A value for each of `KEYS`: ``ppl`` and ``ppl_reference`` perplexities; ``kl`` mean per token of
        ``KL(reference || runner)`` in nats; ``top1`` share of positions where both rank the same token first;
        ``cosine`` mean and ``cosine_min`` smallest over rows; ``sqnr_db`` and ``max_abs`` of the worst output;
        ``tokens`` scored tokens; ``window``, ``windows`` as used; ``outputs`` the same figures for each output. A
        sentence encoder whose pooling is known is judged by its sentence embeddings alone.

    Raises:
        InputError: If there is nothing to measure on, or the two do not have comparable outputs.
    """
    if (text_tokens is None) == (inputs is None):
        raise InputError("Expected either a text or arrays to evaluate on. Give one of --text and --input.")
    found: dict[str, Any] = dict.fromkeys(KEYS)
    if text_tokens is not None:
        return found | _text(runner, reference, text_tokens, window, windows)
    return found | _arrays(runner, reference, inputs or ())


def text_windows(runner: Runner, tokens: Sequence[int], window: int, windows: int) -> np.ndarray:
    """The windows of a text that `evaluate` scores a model on, ``[windows, window]`` token ids.

    Raises:
        InputError: If the text or the windows are too short.
    """
    if window < 2 or windows < 1:
        raise InputError(f"Expected windows of at least 2 tokens, and at least one; found {windows} of {window}.")
    if len(tokens) < 2:
        raise InputError(f"Expected a text of at least 2 tokens, found {len(tokens)}. Give a longer text.")
    window = min(window, len(tokens), context_limit(runner.provenance) or window)
    count = min(windows, len(tokens) // window)
    return np.asarray(tokens[: count * window], np.int64).reshape(count, window)


def _text(runner: Runner, reference: Runner | None, tokens: Sequence[int], window: int, windows: int) -> dict[str, Any]:
    ids = text_windows(runner, tokens, window, windows)
    scores = Scores()
    for row in ids:
        own = _logits(runner, row)
        other = None if reference is None else _logits(reference, row)
        if other is not None and other.shape != own.shape:
            raise InputError(
                f"Expected logits of equal shape, found {list(own.shape)} and {list(other.shape)} of the reference. "
                "Compare an artifact with the model that it was compiled from."
            )
        scores.add(own, other, row[1:])
        del own, other  # so that the next ones can take their place
    count, window = ids.shape
    return scores.figures() | {"window": window, "windows": count}


def _logits(runner: Runner, row: np.ndarray) -> np.ndarray:
    """Logits that predict all tokens of `row` but the first: ``[seq - 1, vocabulary]``."""
    port = runner.signature.output("logits")
    results = runner.run(text_inputs(runner.signature, row[None])) if port is not None else {}
    logits = results[port.name] if port is not None else np.zeros(0)
    if logits.ndim != 3 or logits.shape[:2] != (1, len(row)):
        raise InputError(
            "Expected a model that yields logits at each position of a text, found outputs "
            f"{', '.join(p.name for p in runner.signature.outputs)}. Evaluate it on arrays (--input)."
        )
    return logits[0, :-1]


def _arrays(runner: Runner, reference: Runner | None, inputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    gaps: dict[str, Gap] = {}
    scores = Scores()
    for batch in inputs:
        ours, theirs = runner.run(batch), None if reference is None else reference.run(batch)
        if theirs is not None:
            _compare(gaps, runner, batch, ours, theirs)
        _score(scores, runner.signature, batch, ours, theirs)
    found = scores.figures() if scores.tokens else {}
    if reference is None:
        if not found:
            raise InputError("Expected a reference to compare the outputs with, found none. Give the float model.")
        return found
    judged = {name: gap.figures() for name, gap in gaps.items() if gap.rows}
    if not judged:
        raise InputError(
            "Found no numbers that the artifact and its reference both yield. Check that both are the same model, and "
            "that the input is not empty."
        )
    pooled = "embedding" in judged and all(p.name != "embedding" for p in runner.signature.outputs)
    main = [judged["embedding"]] if pooled else list(judged.values())
    return found | {
        "cosine": min(f["cosine"] for f in main),
        "cosine_min": min(f["cosine_min"] for f in main),
        "sqnr_db": min(f["sqnr_db"] for f in main),
        "max_abs": max(f["max_abs"] for f in main),
        "outputs": judged,
    }


def _compare(
    gaps: dict[str, Gap],
    runner: Runner,
    batch: Mapping[str, np.ndarray],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
) -> None:
    """Adds what the outputs of a batch say; those of a sentence encoder whose pooling is known as ``embedding``."""
    mask = _mask(runner.signature, batch)
    pooled = _pooling(runner, mask)
    roles = {p.name: p.role for p in runner.signature.outputs}
    shared = [n for n in ours if n in theirs and roles.get(n) not in _CACHE_ROLES]
    floats = [n for n in shared if ours[n].dtype.kind in "fV"]
    for name in floats or [n for n in shared if ours[n].dtype.kind in "biu"]:
        a, b = theirs[name], ours[name]
        if a.shape != b.shape:
            raise InputError(
                f"Output {name!r} has shape {list(b.shape)}, and {list(a.shape)} in the reference. Compare an "
                "artifact with the model that it was compiled from."
            )
        key = name
        if roles.get(name) == "hidden" and pooled is not None and mask is not None and a.ndim == 3:
            normalize = runner.provenance.get("normalize", "true") == "true"
            a, b = (embedding(x, mask, pooled, normalize=normalize) for x in (a, b))
            key = "embedding"
        gaps.setdefault(key, Gap()).add(_rows(a, mask), _rows(b, mask))


def _score(
    scores: Scores,
    signature: Signature,
    batch: Mapping[str, np.ndarray],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray] | None,
) -> None:
    """Adds each token that the decoder beside an encoder read, but the first, by the logits before it."""
    port, logits = signature.input("decoder_tokens"), signature.output("logits")
    if port is None or logits is None:
        return
    tokens, own = np.asarray(batch[port.name]), ours[logits.name]
    if own.ndim != 3 or own.shape[:2] != tokens.shape or tokens.max(initial=0) >= own.shape[2]:
        return
    mask = _mask(signature, batch)
    there = np.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    for row, kept in enumerate(there[:, 1:]):
        other = None if theirs is None else theirs[logits.name][row, :-1][kept]
        scores.add(own[row, :-1][kept], other, tokens[row, 1:][kept])


def _pooling(runner: Runner, mask: np.ndarray | None) -> str | None:
    how = runner.provenance.get("pooling", "")
    return how if how in POOLINGS and mask is not None else None


def _mask(signature: Signature, batch: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which positions of the outputs have a token: those of an encoder-decoder follow the decoder's."""
    port = signature.input("mask" if signature.input("decoder_tokens") is None else "decoder_mask")
    return None if port is None else np.asarray(batch[port.name])


def _rows(value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The vectors of an output: its last axis; of images the whole sample; only where the mask has a token."""
    if mask is not None and value.ndim == 3 and value.shape[:2] == mask.shape:
        return value[mask.astype(bool)]
    if value.ndim <= 1:
        return value.reshape(1, -1)
    flat = (-1, value.shape[-1]) if value.ndim <= 3 else (len(value), -1)
    return value.reshape(flat) if value.size else value.reshape(0, 1)
