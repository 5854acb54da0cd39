"""A library in this process, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qc.backends.sampling import Sampling
from qc.ir.errors import UnsupportedError

__all__ = ["Draws", "LocalLibrary"]


class _Options(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int32), ("parallel_for", ctypes.c_void_p), ("user", ctypes.c_void_p))


class Draws(ctypes.Structure):
    """How tokens are drawn, as the library takes it, which advances the seed with each."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("seed", ctypes.c_uint64),
    )

    @classmethod
    def of(cls, sampling: Sampling) -> Draws:
        """Before the first of them."""
        return cls(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)


class LocalLibrary:
    """The functions of ``model.h`` on one model and one instance; codes are returned as they are."""

    def __init__(self, library: Path, dimensions: int) -> None:
        try:
            self._c = ctypes.CDLL(_new_name(library.resolve()))
        except OSError as error:
            reason = "It is for another machine, or was cut short: compile it again here, or copy the artifact again."
            raise UnsupportedError(f"Cannot load {library} here ({error}). {reason}") from error
        _declare(self._c)
        self._dimensions = dimensions
        self._model, self._instance = ctypes.c_void_p(), ctypes.c_void_p()

    def __del__(self) -> None:
        self._destroy()
        if getattr(self, "_model", None):
            self._c.qc_close(self._model)

    def open(self, weights: Path) -> int:
        """Maps and checks the weights."""
        return self._c.qc_open(str(weights).encode(), ctypes.byref(self._model))

    def default_limits(self) -> list[int]:
        """The limits of an instance that nothing is said about."""
        return list((ctypes.c_int64 * max(self._dimensions, 1)).in_dll(self._c, "qc_default_limits"))[
            : self._dimensions
        ]

    def create(self, limits: Sequence[int], threads: int) -> int:
        """Makes the instance anew."""
        self._destroy()
        options = _Options(threads, None, None)
        return self._c.qc_create(self._model, _numbers(limits), ctypes.byref(options), ctypes.byref(self._instance))

    def output_shape(self, index: int, dims: Sequence[int]) -> tuple[int, ...]:
        """The shape of an output."""
        shape = (ctypes.c_int64 * 16)()
        rank = self._c.qc_output_shape(index, _numbers(dims), shape)
        return tuple(max(n, 0) for n in shape[:rank])  # a run refuses those that are negative

    def run(self, dims: Sequence[int], inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> int:
        """Runs once, on arrays without gaps."""
        sources = (ctypes.c_void_p * max(len(inputs), 1))(*(a.ctypes.data for a in inputs))
        targets = (ctypes.c_void_p * max(len(outputs), 1))(*(a.ctypes.data for a in outputs))
        return self._c.qc_run(self._instance, _numbers(dims), sources, targets)

    def write_cache(self, index: int, content: np.ndarray) -> None:
        """Puts rows ``[batch, heads, length, bytes]`` into a cache."""
        self._cache(index)[: content.shape[0], :, : content.shape[2]] = content
        self._c.qc_cache_changed(self._instance, index)

    def read_cache(self, index: int, batch: int, length: int) -> np.ndarray:
        """Takes rows ``[batch, heads, length, bytes]`` out of a cache."""
        return self._cache(index)[:batch, :, :length]

    def reset(self) -> int:
        """Forgets the text."""
        return self._c.qc_reset(self._instance)

    def feed(self, tokens: Sequence[int]) -> int:
        """Appends tokens."""
        return self._c.qc_feed(self._instance, _numbers(tokens), len(tokens))

    def sample(self, draws: Draws) -> tuple[int, int]:
        """A code and the next token."""
        token = ctypes.c_int64()
        code = self._c.qc_sample(self._instance, ctypes.byref(draws), ctypes.byref(token))
        return code, token.value

    def error(self, code: int) -> str:
        """What a code means."""
        return self._c.qc_error(code).decode()

    def _cache(self, index: int) -> np.ndarray:
        """The library's memory of one cache: ``[batch, heads, room, bytes]``."""
        shape = (ctypes.c_int64 * 4)()
        address = self._c.qc_cache(self._instance, index, shape)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), tuple(shape))

    def _destroy(self) -> None:
        if getattr(self, "_instance", None):
            self._c.qc_destroy(self._instance)
            self._instance = ctypes.c_void_p()


_LOADED: dict[Path, list[tuple[int, int, int]]] = {}


def _new_name(library: Path) -> str:
    """A spelling of a path under which no other file was loaded: the loader goes by names first, not by files."""
    facts = library.stat()
    held, file = _LOADED.setdefault(library, []), (facts.st_dev, facts.st_ino, facts.st_mtime_ns)
    if file not in held:
        held.append(file)
    return f"{library.parent}{'/.' * held.index(file)}/{library.name}"


def _numbers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * max(len(values), 1))(*map(int, values))


def _declare(library: ctypes.CDLL) -> None:
    """Result and argument types of functions that do not just take pointers and return a code."""
    library.qc_error.restype = ctypes.c_char_p
    for name in ("qc_destroy", "qc_close"):
        getattr(library, name).restype = None
        getattr(library, name).argtypes = [ctypes.c_void_p]
    if hasattr(library, "qc_feed"):
        library.qc_feed.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    if hasattr(library, "qc_cache"):
        library.qc_cache.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
        library.qc_cache_changed.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        library.qc_cache.restype = ctypes.c_void_p
