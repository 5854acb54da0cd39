"""What the small models of the tests are fed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qc.ir.model import Model

Batch = Callable[[Model, int, np.random.Generator], dict[str, np.ndarray]]


@pytest.fixture
def batch() -> Batch:
    """Two random texts of a length, behind an empty cache."""

    def made(model: Model, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        tokens, places = rng.integers(0, 96, (2, length)), np.tile(np.arange(length), (2, 1))
        held = {"tokens": tokens, "positions": places, "mask": np.ones((2, length), np.int64)}
        caches = (p for p in model.signature.inputs if p.role.startswith("past_"))
        found = {p.name: held[p.role] for p in model.signature.inputs if p.role in held}
        return found | {p.name: np.zeros((2, p.shape[1], 0, p.shape[3]), np.float32) for p in caches}

    return made
