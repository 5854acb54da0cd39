"""Runs a compiled library in this process, through ctypes."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.decoding import context_limit, greedy, plan
from qc.backends.inputs import check_inputs
from qc.backends.tvm.emit import FACTS, LIBRARY, WEIGHTS
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Port, Signature

__all__ = ["Sampling", "TvmRunner", "open_runner", "read_facts"]

_E_LIMIT, _E_CPU = 5, 7


class _Options(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int32), ("parallel_for", ctypes.c_void_p), ("user", ctypes.c_void_p))


class Sampling(ctypes.Structure):
    """How tokens are drawn, as the library takes it: ``temperature``, ``top_k``, ``top_p``, ``seed``."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("seed", ctypes.c_uint64),
    )


def open_runner(directory: Path, *, threads: int = 0, spinning: bool = True) -> TvmRunner:
    """Loads an emitted directory.

    Args:
        directory: Holds the library and its weights.
        threads: Threads of a run; 0 for one per core.
        spinning: Accepted for all backends; threads of a library never wait actively.

    Raises:
        InputError: If the files are damaged.
        UnsupportedError: If they are for another processor.
    """
    return TvmRunner(Path(directory), threads)


class TvmRunner:
    """A loaded library with one instance, which is made anew when an input exceeds its limits.

    Attributes:
        signature: Its inputs and outputs with their roles.
        provenance: Facts about its source.
    """

    def __init__(self, directory: Path, threads: int) -> None:
        import os

        facts = read_facts(directory)
        self.signature = Signature(tuple(map(_port, facts["inputs"])), tuple(map(_port, facts["outputs"])))
        self.provenance: Mapping[str, str] = facts["provenance"]
        self._dims: list[str] = facts["dimensions"]
        self._caches: list[str] = facts["caches"]
        self._decoder: bool = facts["decoder"]
        self._threads = threads or len(os.sched_getaffinity(0))
        try:
            self._library = ctypes.CDLL(str((directory / LIBRARY).resolve()))
        except OSError as error:
            raise UnsupportedError(
                f"Cannot load {directory / LIBRARY} here ({error}). It is for {facts['level']}: run it there."
            ) from error
        _declare(self._library)
        self._model = ctypes.c_void_p()
        self._instance = ctypes.c_void_p()
        code = self._library.qc_open(str(directory / WEIGHTS).encode(), ctypes.byref(self._model))
        if code == _E_CPU:
            raise UnsupportedError(
                f"This processor lacks instructions of the level {facts['level']} that {directory} was compiled for. "
                "Compile for another level, as in --target tvm-cpu:avx2."
            )
        if code:
            raise InputError(f"Cannot use {directory / WEIGHTS}: {self._text(code)}. Copy the artifact again.")
        count = max(len(self._dims), 1)
        defaults = (ctypes.c_int64 * count).in_dll(self._library, "qc_default_limits")
        self._limits = list(defaults)[: len(self._dims)]
        self._create()

    def __del__(self) -> None:
        if getattr(self, "_instance", None):
            self._library.qc_destroy(self._instance)
        if getattr(self, "_model", None):
            self._library.qc_close(self._model)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once. Inputs that the model does not have are ignored.

        Raises:
            InputError: If an input is missing, or of a type, shape or content that the model does not take.
        """
        checked = check_inputs(self.signature, inputs)
        dims = self._sizes(checked)
        self._require_room(dims)
        arrays = [np.ascontiguousarray(checked[p.name]) for p in self.signature.inputs]
        self._load_caches(checked)
        number = (ctypes.c_int64 * max(len(dims), 1))(*dims)
        outputs = [self._output(i, number) for i in range(len(self.signature.outputs))]
        sources = (ctypes.c_void_p * max(len(arrays), 1))(*(a.ctypes.data for a in arrays))
        targets = (ctypes.c_void_p * len(outputs))(*(a.ctypes.data for a in outputs))
        self._check(self._library.qc_run(self._instance, number, sources, targets))
        self._store_caches(outputs)
        return {p.name: a for p, a in zip(self.signature.outputs, outputs, strict=True)}

    def prepare(self, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Nothing: weights are mapped, and every run is for itself."""

    def generate(self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """Yields greedily chosen tokens after `tokens`, until `max_tokens` or one of `stop`, which is not yielded.

        Raises:
            InputError: If the model does not generate text, or the prompt does not fit it.
        """
        limit = context_limit(self.provenance)
        if not self._decoder:
            return greedy(self.run, self.signature, tokens, max_tokens, stop, limit=limit)
        return self._generate(tokens, plan(self.signature, tokens, max_tokens, limit), frozenset(stop), None)

    def sample(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> Iterator[int]:
        """Yields tokens that the library draws.

        Args:
            tokens: The prompt.
            max_tokens: Largest number of tokens.
            temperature: Divides the logits; 0 for the most probable token.
            top_k: How many tokens are considered; 0 for all.
            top_p: Share of the probability that the considered tokens hold.
            seed: Of the draws.
            stop: Tokens that end the text and are not yielded.

        Raises:
            UnsupportedError: If the library does not generate text itself.
        """
        if not self._decoder:
            raise UnsupportedError("Expected a decoder whose library keeps its cache, found another model.")
        sampling = Sampling(temperature, top_k, top_p, seed)
        count = plan(self.signature, tokens, max_tokens, context_limit(self.provenance))
        return self._generate(tokens, count, frozenset(stop), sampling)

    def _generate(
        self, tokens: Sequence[int], max_tokens: int, stop: frozenset[int], sampling: Sampling | None
    ) -> Iterator[int]:
        self._require_context(len(tokens) + max_tokens)
        library, instance = self._library, self._instance
        self._check(library.qc_reset(instance))
        new = (ctypes.c_int64 * len(tokens))(*map(int, tokens))
        token = (ctypes.c_int64 * 1)()
        for _ in range(max_tokens):
            self._check(library.qc_feed(instance, new, len(new)))
            self._check(library.qc_sample(instance, ctypes.byref(sampling) if sampling else None, token))
            if token[0] in stop:
                return
            yield token[0]
            new = token

    def _create(self) -> None:
        if self._instance:
            self._library.qc_destroy(self._instance)
            self._instance = ctypes.c_void_p()
        limits = (ctypes.c_int64 * max(len(self._limits), 1))(*self._limits)
        options = _Options(self._threads, None, None)
        code = self._library.qc_create(self._model, limits, ctypes.byref(options), ctypes.byref(self._instance))
        if code == _E_LIMIT:
            sizes = ", ".join(f"{n} = {v}" for n, v in zip(self._dims, self._limits, strict=True))
            raise InputError(f"An input of {sizes} needs buffers of more than 2 GiB. Run it in smaller parts.")
        self._check(code)

    def _sizes(self, inputs: Mapping[str, np.ndarray]) -> list[int]:
        """The value of each dimension, the same wherever it appears."""
        found: dict[str, int] = {}
        for port in self.signature.inputs:
            for axis, size in zip(port.shape, inputs[port.name].shape, strict=True):
                if isinstance(axis, str) and found.setdefault(axis, size) != size:
                    raise InputError(
                        f"Expected one size for {axis!r} everywhere, found {found[axis]}, and {size} at {port.name!r}."
                    )
        return [found[name] for name in self._dims]

    def _require_room(self, dims: Sequence[int]) -> None:
        if any(d > limit for d, limit in zip(dims, self._limits, strict=True)):
            self._limits = [max(d, limit) for d, limit in zip(dims, self._limits, strict=True)]
            self._create()

    def _require_context(self, tokens: int) -> None:
        """Room for a text of so many tokens."""
        names = set()
        for port in self.signature.inputs:
            if port.role in ("past_key", "past_value"):
                names.add(port.shape[2])
            elif port.role == "mask":
                names.add(port.shape[-1])
        self._require_room([tokens if n in names else 0 for n in self._dims])

    def _load_caches(self, inputs: Mapping[str, np.ndarray]) -> None:
        for index, name in enumerate(self._caches):
            given = inputs[name]
            self._cache(index)[: given.shape[0], :, : given.shape[2]] = given

    def _store_caches(self, outputs: Sequence[np.ndarray]) -> None:
        place = {port.name: i for i, port in enumerate(self.signature.outputs)}
        presents = {past.name: place[present.name] for past, present in self.signature.caches}
        for index, name in enumerate(self._caches):
            output = outputs[presents[name]]
            output[:] = self._cache(index)[: output.shape[0], :, : output.shape[2]]

    def _cache(self, index: int) -> np.ndarray:
        """The library's memory of one cache: ``[batch, heads, room, channels]``."""
        shape = (ctypes.c_int64 * 4)()
        address = self._library.qc_cache(self._instance, index, shape)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), tuple(shape))

    def _output(self, index: int, dims: Any) -> np.ndarray:
        shape = (ctypes.c_int64 * 16)()
        rank = self._library.qc_output_shape(index, dims, shape)
        return np.empty(tuple(shape[:rank]), self.signature.outputs[index].dtype.numpy())

    def _check(self, code: int) -> None:
        if code:
            raise InputError(f"The library refuses to run: {self._text(code)}. Check the values and shapes.")

    def _text(self, code: int) -> str:
        return self._library.qc_error(code).decode()


def _declare(library: ctypes.CDLL) -> None:
    """Result and argument types of functions that do not just take pointers and return a code."""
    library.qc_error.restype = ctypes.c_char_p
    for name in ("qc_destroy", "qc_close"):
        getattr(library, name).restype = None
        getattr(library, name).argtypes = [ctypes.c_void_p]
    if hasattr(library, "qc_feed"):
        library.qc_feed.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        library.qc_cache.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
        library.qc_cache.restype = ctypes.c_void_p


def read_facts(directory: Path) -> dict[str, Any]:
    """What the library does not say about itself: ``model.json``.

    Raises:
        InputError: If it is missing or damaged.
    """
    file = directory / FACTS
    try:
        facts = json.loads(file.read_text("utf-8"))
        return {**facts, "dimensions": list(facts["dimensions"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not readable ({error}). Copy the artifact again.") from error


def _port(data: Mapping[str, Any]) -> Port:
    return Port(
        data["name"], ir.DataType[data["dtype"]], tuple(data["shape"]), data["role"], data["index"], data["kind"]
    )
