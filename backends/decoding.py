"""Greedy generation over anything that runs: with a cache that is fed back, or by running the whole text again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from qc.backends.inputs import cache_shape, require_tokens, text_inputs
from qc.ir.errors import InputError
from qc.ir.model import Signature

__all__ = ["context_limit", "greedy", "pick", "plan"]

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def greedy(
    run: Run,
    signature: Signature,
    tokens: Sequence[int],
    max_tokens: int,
    stop: Sequence[int] = (),
    *,
    limit: int | None = None,
    start: int | None = None,
) -> Iterator[int]:
    """Yields the most probable next token, one after the other; a token of `stop` ends the text and is not yielded.

    Args:
        run: Runs the model once.
        signature: The model's.
        tokens: The prompt.
        max_tokens: Largest number of tokens to yield.
        stop: Ids that end a text.
        limit: Largest number of tokens that the model can attend to, or None.
        start: First decoder token of an encoder-decoder model.

    Raises:
        InputError: If the model does not generate text, or the prompt does not fit it.
    """
    if signature.input("decoder_tokens") is not None:
        return _encoder_decoder(run, signature, tokens, max_tokens, stop, start)
    max_tokens = plan(signature, tokens, max_tokens, limit)
    return _decoder(run, signature, tokens, max_tokens, stop)


def plan(signature: Signature, tokens: Sequence[int], max_tokens: int, limit: int | None) -> int:
    """Checks that a text can be generated and returns how many tokens fit.

    Raises:
        InputError: If the model does not generate text, or the prompt is empty or too long.
    """
    require_tokens(signature)
    if signature.output("logits") is None:
        raise InputError(
            f"Expected a model that yields logits over a vocabulary, found one that yields "
            f"{', '.join(p.name for p in signature.outputs)}. It does not generate text."
        )
    if len(tokens) == 0:
        raise InputError("Expected a prompt of at least one token, found none.")
    if limit is None:
        return max_tokens
    if len(tokens) >= limit:
        raise InputError(f"Expected a prompt of fewer than {limit} tokens, found {len(tokens)}. Shorten it.")
    return min(max_tokens, limit - len(tokens))


def context_limit(provenance: Mapping[str, str]) -> int | None:
    """Largest number of tokens that the source model was made for, or None if it is not known."""
    text = provenance.get("max_positions", "")
    return int(text) if text.isdigit() else None


def pick(logits: np.ndarray) -> int:
    """The most probable token at the last position; ``logits`` ``[..., vocabulary]`` of one text."""
    return int(np.argmax(logits.reshape(-1, logits.shape[-1])[-1]))


def _decoder(
    run: Run, signature: Signature, tokens: Sequence[int], max_tokens: int, stop: Sequence[int]
) -> Iterator[int]:
    logits = signature.output("logits")
    assert logits is not None
    pairs = signature.caches
    text, ends = [int(t) for t in tokens], frozenset(stop)
    caches = {past.name: np.zeros(cache_shape(past, 1, 0), past.dtype.numpy()) for past, _ in pairs}
    past = 0
    for _ in range(max_tokens):
        inputs = text_inputs(signature, np.array([text[past:]]), past=past)
        results = run(inputs | caches)
        if pairs:
            caches = {port.name: results[present.name] for port, present in pairs}
            past = len(text)
        token = pick(results[logits.name])
        if token in ends:
            return
        text.append(token)
        yield token


def _encoder_decoder(
    run: Run, signature: Signature, tokens: Sequence[int], max_tokens: int, stop: Sequence[int], start: int | None
) -> Iterator[int]:
    decoder, logits = signature.input("decoder_tokens"), signature.output("logits")
    if decoder is None or logits is None or start is None:
        raise InputError(
            "Expected an encoder-decoder model with logits and decoder_start_token_id in its config.json, found one "
            "without. Run it with arrays instead."
        )
    own = [p for p in signature.inputs if p.role not in ("decoder_tokens", "decoder_mask")]
    encoder = text_inputs(Signature(tuple(own), ()), np.array([tokens]))
    mask, ends = signature.input("decoder_mask"), frozenset(stop)
    text = [start]
    for _ in range(max_tokens):
        inputs = encoder | {decoder.name: np.array([text], decoder.dtype.numpy())}
        if mask is not None:
            inputs[mask.name] = np.ones((1, len(text)), mask.dtype.numpy())
        token = pick(run(inputs)[logits.name])
        if token in ends:
            return
        text.append(token)
        yield token
