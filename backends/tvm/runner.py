"""Runs a compiled library: in this process, or in an emulator of its processor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.decoding import generate, plan
from qc.backends.inputs import check_inputs
from qc.backends.sampling import GREEDY, Sampling
from qc.backends.tvm.emit import EMULATED, FACTS, LIBRARY, WEIGHTS, identity, library_directory
from qc.backends.tvm.isa import best_for_host, level
from qc.backends.tvm.kernels.caches import cells
from qc.backends.tvm.local import Draws, LocalLibrary
from qc.backends.tvm.remote import RemoteLibrary
from qc.backends.tvm.toolchain import Platform
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Port, Signature

__all__ = ["TvmRunner", "open_gpu_runner", "open_runner", "read_facts"]

_E_LIMIT, _E_CPU, _E_DEVICE = 5, 7, 8


def open_runner(directory: Path, *, threads: int = 0, platform: Platform | None = None) -> TvmRunner:
    """Loads an emitted directory.

    Args:
        directory: Holds the library and its weights.
        threads: Threads of a run; 0 for one per core.
        platform: For which system it is, if not for this one; then it runs in that platform's emulator.

    Raises:
        InputError: If the files are damaged.
        UnsupportedError: If they are for another processor, and no emulator runs them.
    """
    directory = Path(directory)
    facts = read_facts(directory)
    arch, count = level(facts["level"]).arch, len(facts["dimensions"])
    place = directory if platform is None else library_directory(directory, platform)
    if platform is None or arch == best_for_host().arch:
        return TvmRunner(directory, facts, LocalLibrary(place / LIBRARY, count), threads)
    static = place / "libmodel.a"
    library = RemoteLibrary(directory, static, count, platform.cc[arch], platform.emulator, platform.package)
    return TvmRunner(directory, facts, library, threads)


def open_gpu_runner(directory: Path) -> TvmRunner:
    """Loads the directory of a GPU target: its own library, or the one that runs in its place.

    Raises:
        InputError: If the files are damaged.
        UnsupportedError: If there is no device.
    """
    facts = read_facts(directory)
    count = len(facts["dimensions"])
    if (directory / LIBRARY).is_file():
        try:
            return TvmRunner(directory, facts, LocalLibrary(directory / LIBRARY, count), 1)
        except UnsupportedError:
            if not (directory / EMULATED).is_dir():
                raise
    return TvmRunner(directory, facts, LocalLibrary(directory / EMULATED / LIBRARY, count), 1)


class TvmRunner:
    """A loaded library with one instance, which is made anew when an input exceeds its limits.

    Attributes:
        signature: Its inputs and outputs with their roles.
        provenance: Facts about its source.
    """

    def __init__(
        self, directory: Path, facts: Mapping[str, Any], library: LocalLibrary | RemoteLibrary, threads: int
    ) -> None:
        self.signature = Signature(tuple(map(_port, facts["inputs"])), tuple(map(_port, facts["outputs"])))
        self.provenance: Mapping[str, str] = facts["provenance"]
        self._dims: list[str] = facts["dimensions"]
        self._caches: list[str] = facts["caches"]
        self._cells = cells(facts["cells"])
        self._decoder: bool = facts["decoder"]
        self._library = library
        self._threads = threads or os.cpu_count() or 1
        code = library.open(directory / WEIGHTS)
        if code == _E_CPU:
            raise UnsupportedError(
                f"This processor lacks instructions of the level {facts['level']} that {directory} was compiled for. "
                "Compile for another level, as in --target tvm-cpu:avx2."
            )
        if code == _E_DEVICE:
            raise UnsupportedError(
                f"Expected a device with a driver for {directory}, found none that works: {library.error(code)}. "
                "Where there is no GPU, install pocl-opencl-icd, which computes OpenCL on the processor."
            )
        if code:
            raise InputError(f"Cannot use {directory / WEIGHTS}: {library.error(code)}. Copy the artifact again.")
        if facts["model"] != identity(directory / WEIGHTS):
            raise InputError(f"{directory / FACTS} is of another model than {WEIGHTS}. Copy the artifact again.")
        self._limits: list[int] = []
        try:
            self._create(library.default_limits())
        except InputError:
            if not self._dims:  # else the first run says what it needs
                raise

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
        outputs = [
            np.empty(self._library.output_shape(i, dims), port.dtype.numpy())
            for i, port in enumerate(self.signature.outputs)
        ]
        self._check(self._library.run(dims, arrays, outputs))
        self._store_caches(outputs)
        return {p.name: a for p, a in zip(self.signature.outputs, outputs, strict=True)}

    def prepare(self, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Nothing: weights are mapped, and every run is for itself."""

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Yields tokens after `tokens`, until `max_tokens` or one of `stop`, which is not yielded.

        Raises:
            InputError: If the model does not generate text, or the prompt does not fit it.
        """
        if not self._decoder:
            return generate(self, tokens, max_tokens, stop, sampling)
        return self._generate(tokens, plan(self, tokens, max_tokens), frozenset(stop), sampling)

    def _generate(
        self, tokens: Sequence[int], max_tokens: int, stop: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        self._require_context(len(tokens) + max_tokens)
        self._check(self._library.reset())
        new, draws = tokens, Draws.of(sampling)
        for _ in range(max_tokens):
            self._check(self._library.feed(new))
            code, token = self._library.sample(draws)
            self._check(code)
            if token in stop:
                return
            yield token
            new = (token,)

    def _create(self, limits: Sequence[int]) -> None:
        self._limits = [-1] * len(limits)  # no instance, until there is one
        code = self._library.create(limits, self._threads)
        if code == _E_LIMIT:
            sizes = ", ".join(f"{n} = {v}" for n, v in zip(self._dims, limits, strict=True))
            raise InputError(f"An input of {sizes} needs buffers of more than 2 GiB. Run it in smaller parts.")
        self._check(code)
        self._limits = list(limits)

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
            self._create([max(d, limit) for d, limit in zip(dims, self._limits, strict=True)])

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
            if inputs[name].size:
                self._library.write_cache(index, self._cells.encode(inputs[name]))

    def _store_caches(self, outputs: Sequence[np.ndarray]) -> None:
        place = {port.name: i for i, port in enumerate(self.signature.outputs)}
        presents = {past.name: place[present.name] for past, present in self.signature.caches}
        for index, name in enumerate(self._caches):
            held = outputs[presents[name]]
            held[:] = self._cells.decode(self._library.read_cache(index, held.shape[0], held.shape[2]))

    def _check(self, code: int) -> None:
        if code:
            raise InputError(f"The library refuses to run: {self._library.error(code)}. Check the values and shapes.")


def read_facts(directory: Path) -> dict[str, Any]:
    """What the library does not say about itself: ``model.json``.

    Raises:
        InputError: If it is missing or damaged.
    """
    file = directory / FACTS
    try:
        facts = json.loads(file.read_text("utf-8"))
        read = {"model": str(facts["model"]), "cells": cells(facts["cells"]).name}
        return {**facts, **read, "dimensions": list(facts["dimensions"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "Copy the artifact again, or compile it again if another version of qc did"
        raise InputError(f"{file} is not readable ({error}). {hint}.") from error


def _port(data: Mapping[str, Any]) -> Port:
    return Port(
        data["name"], ir.DataType[data["dtype"]], tuple(data["shape"]), data["role"], data["index"], data["kind"]
    )
