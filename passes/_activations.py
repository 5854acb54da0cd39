"""Activations of a network between two of its parts, for every calibration batch, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from qc.ir.errors import InputError

__all__ = ["Shelf", "Stream"]

_SMALL = 1 << 16
"""Arrays of fewer bytes always stay in memory."""


class Shelf:
    """Keeps arrays: in memory up to a limit, in mapped files beyond it. What is read back is the same either way."""

    def __init__(self, directory: Path | None = None, limit: int | None = None) -> None:
        """Opens a shelf.

        Args:
            directory: Where files go; None makes a temporary one if any is needed.
            limit: Bytes that may stay in memory; None for any number.
        """
        self._directory, self._limit, self._held = directory, limit, 0

    def keep(self, array: np.ndarray) -> np.ndarray:
        """Returns the array, or a read-only map of a file with its content that is removed with the last reference.

        Raises:
            InputError: If the disk is full.
        """
        if self._limit is None or array.nbytes < _SMALL or array.dtype.kind not in "fiub":
            return array
        if self._held + array.nbytes <= self._limit:
            self._held += array.nbytes
            weakref.finalize(array, self._forget, array.nbytes)
            return array
        return self._spilled(np.ascontiguousarray(array))

    def _forget(self, size: int) -> None:
        self._held -= size

    def _spilled(self, array: np.ndarray) -> np.ndarray:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="qc-activations-"))
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(suffix=".bin", dir=self._directory)
        try:
            with os.fdopen(handle, "wb") as file:
                array.tofile(file)
        except OSError as error:
            os.unlink(path)
            raise InputError(
                f"Could not write {array.nbytes} bytes of activations to {self._directory}: {error.strerror or error}. "
                "Free some space there, or calibrate on less."
            ) from error
        mapped = np.memmap(path, array.dtype, "r", shape=array.shape)
        with contextlib.suppress(OSError):  # on Windows it goes with its directory
            os.unlink(path)  # the map keeps the content, and a killed process leaves no file behind
        return mapped


class Stream:
    """The values that pass from part to part, one array per batch.

    Attributes:
        count: Number of batches.
    """

    def __init__(self, batches: Iterable[Mapping[str, np.ndarray]], shelf: Shelf) -> None:
        """Starts with the inputs of the network."""
        self._batches = [dict(batch) for batch in batches]
        self._shelf = shelf
        self.count = len(self._batches)

    def batch(self, index: int) -> Mapping[str, np.ndarray]:
        """The values of one batch, by name."""
        return self._batches[index]

    def put(self, index: int, values: Mapping[str, np.ndarray]) -> None:
        """Adds values to a batch."""
        self._batches[index] |= {name: self._shelf.keep(array) for name, array in values.items()}

    def share(self, other: Stream, names: Iterable[str]) -> None:
        """Adds values that another stream holds: those of a part in which nothing has changed."""
        names = list(names)
        for mine, theirs in zip(self._batches, other._batches, strict=True):
            mine |= {name: theirs[name] for name in names if name in theirs}

    def equals(self, other: Stream, names: Iterable[str]) -> bool:
        """Whether both streams hold the very same arrays under these names."""
        names = list(names)
        return all(
            mine.get(name) is theirs.get(name)
            for mine, theirs in zip(self._batches, other._batches, strict=True)
            for name in names
        )

    def retain(self, names: set[str]) -> None:
        """Forgets every value but these."""
        self._batches = [{k: v for k, v in batch.items() if k in names} for batch in self._batches]
