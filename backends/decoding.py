"""Generation of text over anything that runs: with a cache that is fed back, or by running the whole text again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qc.backends.inputs import cache_shape, require_tokens, text_inputs
from qc.backends.sampling import GREEDY, Sampling
from qc.backends.target import Runner
from qc.ir.errors import InputError
from qc.ir.model import Signature

__all__ = ["context_limit", "decoder_start", "generate", "plan"]


def generate(
    runner: Runner, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
) -> Iterator[int]:
    """Yields one token after the other; a token of `stop` ends the text and is not yielded.

    Args:
        runner: Runs the model once for each token.
        tokens: The prompt, or what the encoder of an encoder-decoder reads.
        max_tokens: Largest number of tokens to yield.
        stop: Ids that end a text.
        sampling: How each token is chosen.

    Raises:
        InputError: If the model does not generate text, or the prompt does not fit it.
    """
    if runner.signature.input("decoder_tokens") is None:
        return _decoder(runner, tokens, plan(runner, tokens, max_tokens), stop, sampling)
    _require_text(runner.signature, tokens)
    start, limit = decoder_start(runner.provenance), context_limit(runner.provenance)
    return _encoder_decoder(runner, tokens, start, min(max_tokens, limit or max_tokens), stop, sampling)


def plan(runner: Runner, tokens: Sequence[int], max_tokens: int) -> int:
    """Checks that a decoder can go on with a text, and returns for how many tokens.

    Raises:
        InputError: If the model does not generate text, or the prompt is empty or too long.
    """
    _require_text(runner.signature, tokens)
    limit = context_limit(runner.provenance)
    if limit is None:
        return max_tokens
    if len(tokens) >= limit:
        raise InputError(f"Expected a prompt of fewer than {limit} tokens, found {len(tokens)}. Shorten it.")
    return min(max_tokens, limit - len(tokens))


def _require_text(signature: Signature, tokens: Sequence[int]) -> None:
    require_tokens(signature)
    if signature.output("logits") is None:
        raise InputError(
            f"Expected a model that yields logits over a vocabulary, found one that yields "
            f"{', '.join(p.name for p in signature.outputs)}. It does not generate text."
        )
    if len(tokens) == 0:
        raise InputError("Expected a prompt of at least one token, found none.")


def context_limit(provenance: Mapping[str, str]) -> int | None:
    """Largest number of tokens that the source model was made for, or None if it is not known."""
    text = provenance.get("max_positions", "")
    return int(text) if text.isdigit() else None


def decoder_start(provenance: Mapping[str, str]) -> int:
    """The token that a decoder beside an encoder starts each text with.

    Raises:
        InputError: If it is not known.
    """
    text = provenance.get("decoder_start", "")
    if not text.isdigit():
        raise InputError(
            "Expected decoder_start_token_id in the config.json beside the encoder-decoder, found none. Add it and "
            "compile again, or give arrays with the decoder's inputs instead of text."
        )
    return int(text)


def _decoder(
    runner: Runner, tokens: Sequence[int], max_tokens: int, stop: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    signature = runner.signature
    logits = signature.output("logits")
    assert logits is not None
    pairs, choose = signature.caches, sampling.chooser()
    text, ends = [int(t) for t in tokens], frozenset(stop)
    caches = {past.name: np.zeros(cache_shape(past, 1, 0), past.dtype.numpy()) for past, _ in pairs}
    past = 0
    for _ in range(max_tokens):
        inputs = text_inputs(signature, np.array([text[past:]]), past=past)
        results = runner.run(inputs | caches)
        if pairs:
            caches = {port.name: results[present.name] for port, present in pairs}
            past = len(text)
        token = choose(results[logits.name])
        if token in ends:
            return
        text.append(token)
        yield token


def _encoder_decoder(
    runner: Runner, tokens: Sequence[int], start: int, max_tokens: int, stop: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    logits = runner.signature.output("logits")
    assert logits is not None
    text, ends, choose = [start], frozenset(stop), sampling.chooser()
    for _ in range(max_tokens):
        inputs = text_inputs(runner.signature, np.array([tokens]), decoder=np.array([text]))
        token = choose(runner.run(inputs)[logits.name])
        if token in ends:
            return
        text.append(token)
        yield token
