"""What learning has reached, written down now and then, so that a killed compile goes on from there."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from typing import Any

import torch

from qc.ir.errors import InputError
from qc.passes.journal import Journal

__all__ = ["Checkpoint"]

_SECONDS = 30.0
"""Between two checkpoints: what a kill may cost."""

_SHARE = 20
"""Nor does writing take more than one part in so many of the time, however large a network is."""


class Checkpoint:
    """The state of one run of the optimizer loop, in a journal; when it is written changes nothing that is learned."""

    def __init__(self, journal: Journal, facts: Mapping[str, str]) -> None:
        """Finds the state in `journal`.

        Raises:
            InputError: If it belongs to other `facts`.
        """
        self._journal, self._number = journal, journal.begin(facts)
        self._due = time.monotonic() + _SECONDS

    def load(self) -> dict[str, Any] | None:
        """The state that was written down last.

        Raises:
            InputError: If its file is damaged.
        """
        path = self._journal.load_file(self._number)
        if path is None:
            return None
        try:
            return torch.load(path, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"The journal {path} is not readable ({error}). Compile without --resume to begin anew."
            ) from error

    def is_due(self) -> bool:
        """Whether it is time to write the state down."""
        return time.monotonic() >= self._due

    def save(self, state: Mapping[str, object]) -> None:
        """Writes the state down."""
        began = time.monotonic()
        self._journal.save_file(self._number, lambda file: torch.save(dict(state), file))
        ended = time.monotonic()
        self._due = ended + max(_SECONDS, _SHARE * (ended - began))
