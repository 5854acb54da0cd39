"""One vector per sentence, from one per token."""

from __future__ import annotations

import numpy as np

__all__ = ["POOLINGS", "embedding"]

POOLINGS = frozenset({"mean", "max", "cls", "lasttoken"})


def embedding(hidden: np.ndarray, mask: np.ndarray, pooling: str, *, normalize: bool = True) -> np.ndarray:
    """Pools token vectors into one vector per sentence.

    Args:
        hidden: ``[batch, seq, width]``.
        mask: ``[batch, seq]``, 1 where there is a token.
        pooling: ``mean``, ``max``, ``cls`` or ``lasttoken``.
        normalize: Whether each vector is scaled to length one.

    Returns:
        ``[batch, width]``, float64.
    """
    hidden, weight = hidden.astype(np.float64), mask.astype(np.float64)[..., None]
    match pooling:
        case "mean":
            pooled = (hidden * weight).sum(1) / np.maximum(weight.sum(1), 1)
        case "max":
            pooled = np.where(weight > 0, hidden, -np.inf).max(1)
        case "cls":
            pooled = hidden[:, 0]
        case "lasttoken":
            last = np.maximum(mask.astype(np.int64).sum(1) - 1, 0)
            pooled = hidden[np.arange(len(hidden)), last]
        case _:
            raise ValueError(f"Expected one of {sorted(POOLINGS)}, found {pooling!r}.")
    if not normalize:
        return pooled
    return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
