"""Writes ``sample.txt``: text sampled from a built-in model itself at temperature 1.

Such text needs no licence but the model's, and it measures well: under the float model its perplexity is the model's own
entropy, so every excess that a quantized model shows on it is its KL divergence.

The text is a sequence of windows of 256 tokens, as evaluation cuts it. Within a window each token is drawn from the model
given the window so far; the first one, which is never scored, is drawn as the start of a text. A window is drawn again
until encoding the whole text gives back the very tokens, so that nothing shifts.

Usage: ``python examples/models/sample_text.py examples/models/tiny-llama --windows 160 --seed 0``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qc.backends.tokenizer import Tokenizer
from qc.frontend import load
from qc.ir.model import Model
from qc.ir.runtime import Session

WINDOW = 256
BATCH = 32


def sample_windows(model: Model, start: int, banned: tuple[int, ...], rng: np.random.Generator) -> Iterator[list[int]]:
    """Yields windows of token ids without end; `start` comes before each, unseen by its later tokens."""
    session = Session(model, optimize=True)
    while True:
        # The first step sees the start token alone; the cache of that step is dropped before the second.
        rows = [_draw(_Steps(session, model).logits(np.full((BATCH, 1), start)), banned, rng)]
        steps = _Steps(session, model)
        while len(rows) < WINDOW:
            rows.append(_draw(steps.logits(rows[-1][:, None]), banned, rng))
        yield from np.stack(rows, axis=1).tolist()


class _Steps:
    """Runs a decoder token by token over its cache."""

    def __init__(self, session: Session, model: Model) -> None:
        self._session, self._signature = session, model.signature
        self._cache = {
            p.name: np.zeros((BATCH, p.shape[1], 0, p.shape[3]), np.float32)
            for p in self._signature.inputs
            if p.role in ("past_key", "past_value")
        }
        self._past = 0

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Feeds ``[batch, 1]`` tokens and returns ``[batch, vocabulary]`` logits."""
        arrays = {
            "tokens": tokens.astype(np.int64),
            "mask": np.ones((BATCH, self._past + 1), np.int64),
            "positions": np.full((BATCH, 1), self._past, np.int64),
        }
        inputs = {p.name: arrays[p.role] for p in self._signature.inputs if p.role in arrays}
        outputs = self._session.run(inputs | self._cache)
        self._cache = {
            p.name: outputs[q.name]
            for p in self._signature.inputs
            for q in self._signature.outputs
            if p.role.startswith("past_") and q.role == p.role.replace("past", "present") and q.index == p.index
        }
        self._past += 1
        port = self._signature.output("logits")
        assert port is not None
        return outputs[port.name][:, -1]


def _draw(logits: np.ndarray, banned: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Samples from softmax(logits) by the Gumbel-max trick; special tokens cannot be part of a text."""
    scores = logits.astype(np.float64) + rng.gumbel(size=logits.shape)
    scores[:, list(banned)] = -np.inf
    return scores.argmax(axis=1)


def main() -> None:
    """Samples until the text holds the wanted number of windows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(arguments.directory)
    if tokenizer.bos is None:
        raise SystemExit("Expected a tokenizer with a first token.")
    tokens, tried = [tokenizer.bos], 0
    source = sample_windows(
        load(arguments.directory),
        tokenizer.bos,
        (tokenizer.bos, *tokenizer.stop),
        np.random.default_rng(arguments.seed),
    )
    while len(tokens) < arguments.windows * WINDOW:
        window = next(source)[: WINDOW if len(tokens) > 1 else WINDOW - 1]
        tried += 1
        if tokenizer.encode(tokenizer.decode(tokens[1:] + window)) == tokens + window:
            tokens += window
    (arguments.directory / "sample.txt").write_text(tokenizer.decode(tokens[1:]), encoding="utf-8")
    print(f"{len(tokens)} tokens; kept {arguments.windows} of {tried} windows")


if __name__ == "__main__":
    main()
