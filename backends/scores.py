"""Running figures: of distributions over a vocabulary, and of an output against its reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["Gap", "Scores"]

_CHUNK_BYTES = 1 << 17
"""Of float64 logits at a time, of which five copies live in the cache; a whole window can have 256 MiB."""


@dataclasses.dataclass
class Scores:
    """Running figures of a model that yields distributions over a vocabulary."""

    tokens: int = 0
    surprise: float = 0.0
    surprise_reference: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    compared: bool = False

    def add(self, own: np.ndarray, other: np.ndarray | None, targets: np.ndarray) -> None:
        """Adds the tokens that follow, ``[n]``, and the logits before each, ``[n, vocabulary]``."""
        self.tokens += len(targets)
        for part in _chunks(*own.shape):
            q = _Softmax(own[part])
            self.surprise += q.surprise(targets[part])
            if other is None:
                continue
            p = _Softmax(other[part])
            self.compared = True
            self.surprise_reference += p.surprise(targets[part])
            self.divergence += p.divergence(q)
            self.agreed += int(np.count_nonzero(other[part].argmax(1) == own[part].argmax(1)))

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"ppl": _exp(self.surprise / self.tokens), "tokens": self.tokens}
        if self.compared:
            found["ppl_reference"] = _exp(self.surprise_reference / self.tokens)
            found["kl"] = self.divergence / self.tokens
            found["top1"] = self.agreed / self.tokens
        return found


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (8 * columns))
    return (slice(start, start + step) for start in range(0, rows, step))


class _Softmax:
    """Distributions over the vocabulary, ``exp(x - log sum exp x)``, one for each row of logits."""

    def __init__(self, logits: np.ndarray) -> None:
        self._shifted = logits.astype(np.float64)
        self._shifted -= self._shifted.max(1, keepdims=True)
        self._weights = np.exp(self._shifted)
        self._total = self._weights.sum(1)

    def surprise(self, targets: np.ndarray) -> float:
        """``-sum log p`` of a token of each row."""
        return float((np.log(self._total) - self._shifted[np.arange(len(targets)), targets]).sum())

    def divergence(self, other: _Softmax) -> float:
        """``sum KL(self || other)`` over the rows."""
        with np.errstate(invalid="ignore"):  # a token that both exclude: 0 * (-inf + inf) counts nothing
            gap = self._shifted - other._shifted
        gap[self._weights == 0] = 0
        expected = np.einsum("ij,ij->i", self._weights, gap) / self._total
        return float((expected + np.log(other._total / self._total)).sum())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@dataclasses.dataclass
class Gap:
    """Running figures of one output."""

    cosines: float = 0.0
    rows: int = 0
    lowest: float = math.inf
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, reference: np.ndarray, found: np.ndarray) -> None:
        """Adds rows ``[n, width]``."""
        reference, found = reference.astype(np.float64), found.astype(np.float64)
        norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(found, axis=1)
        equal = (reference == found).all(1)  # also rows of zeros, which have no direction
        cosines = np.where(equal, 1.0, (reference * found).sum(1) / np.where(norms > 0, norms, 1.0))
        self.cosines += float(cosines.sum())
        self.rows += len(cosines)
        self.lowest = min(self.lowest, float(cosines.min(initial=math.inf)))
        self.signal += float((reference**2).sum())
        self.noise += float(((reference - found) ** 2).sum())
        self.largest = max(self.largest, float(np.abs(reference - found).max(initial=0.0)))

    def figures(self) -> dict[str, float]:
        if self.noise == 0:
            sqnr = math.inf
        else:
            sqnr = 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf
        return {
            "cosine": self.cosines / self.rows,
            "cosine_min": self.lowest,
            "sqnr_db": sqnr,
            "max_abs": self.largest,
        }
