"""How the next token is chosen from the logits of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from qc.ir.errors import InputError

__all__ = ["GREEDY", "Sampling"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draws a token ``i`` with a probability in proportion to ``exp(z_i / temperature)``, of the logits ``z``.

    Only the `top_k` likeliest tokens are drawn from, and of these only the likeliest that hold the share `top_p` of
    what they hold together: the fewest of them, at least one. The library of a ``tvm`` artifact does the same itself
    (``qc_sample``), with other random numbers.

    Attributes:
        temperature: 0 for the likeliest token, always; 1 for the probabilities of the model.
        top_k: How many tokens are considered; 0 for all.
        top_p: Which share of the probability is; 1 for all.
        seed: Of the draws; texts of equal seeds are equal.

    Raises:
        InputError: If one of them is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for fits, name, wanted, found in (
            (0 <= self.temperature < math.inf, "temperature", "of 0 (the likeliest token) or more", self.temperature),
            (0 <= self.top_k < 1 << 31, "top-k", "of 1 or more tokens, or 0 for all", self.top_k),
            (0 < self.top_p <= 1, "top-p", "above 0 and up to 1 (all tokens)", self.top_p),
            (0 <= self.seed < 1 << 64, "seed", "from 0 to 2^64 - 1", self.seed),
        ):
            if not fits:
                raise InputError(f"Expected a {name} {wanted}; found {found}.")

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are drawn from, and their probabilities, for logits ``[vocabulary]``; needs a temperature."""
        with np.errstate(over="ignore"):  # of what is infinitely far below the likeliest token nothing is left
            scaled = (logits.astype(np.float64) - float(logits.max())) / self.temperature
        weights, tokens = np.exp(scaled), np.arange(len(logits))
        if 0 < self.top_k < len(tokens):
            tokens = np.argpartition(-weights, self.top_k - 1)[: self.top_k]
        if self.top_p < 1:
            tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
            held = np.cumsum(weights[tokens])
            tokens = tokens[: 1 + int(np.searchsorted(held, self.top_p * held[-1]))]
        return tokens, weights[tokens] / weights[tokens].sum()

    def chooser(self) -> Callable[[np.ndarray], int]:
        """What chooses the tokens of one text, from logits ``[..., vocabulary]`` at the last position."""
        generator = np.random.default_rng(self.seed)

        def choose(logits: np.ndarray) -> int:
            last = logits.reshape(-1, logits.shape[-1])[-1]
            if self.temperature == 0:
                return int(np.argmax(last))
            tokens, probabilities = self.distribution(last)
            return int(generator.choice(tokens, p=probabilities))

        return choose


GREEDY = Sampling(temperature=0)
"""The likeliest token, always."""
