"""Runs graphs of fixed shapes as if they had the shapes of the model.

Rows of a batch run one after the other. A text is cut into pieces that a graph takes; a piece that is shorter is padded
with zeros behind its end. Positions of the cache that hold nothing are zeros too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.decoding import generate, plan
from qc.backends.inputs import check_inputs, text_inputs
from qc.backends.ort.npu.device import CpuSession, FixedSession, open_session
from qc.backends.ort.npu.emit import FACTS, OUTER
from qc.backends.ort.npu.fitting import LENGTH, PAST
from qc.backends.ort.npu.shapes import GraphSizes
from qc.backends.sampling import GREEDY, Sampling
from qc.ir.errors import InputError
from qc.ir.model import Port, Signature

__all__ = ["FixedRunner", "read_facts"]

_ALONG_TEXT = frozenset({"tokens", "positions", "token_types"})
"""Roles of inputs that have one entry for each new token."""


class FixedRunner:
    """A loaded artifact.

    Attributes:
        signature: Inputs and outputs of the model, with their roles and open lengths.
        provenance: Facts about its source.
    """

    def __init__(self, directory: Path, *, threads: int = 0) -> None:
        """Compiles the graphs for the NPU and loads them.

        Args:
            directory: The artifact.
            threads: Threads of the graph beside the NPU; 0 for one per core.

        Raises:
            UnsupportedError: If the NPU does not take a node, or there is none.
        """
        facts = read_facts(directory)
        self.signature = Signature(tuple(map(_port, facts["inputs"])), tuple(map(_port, facts["outputs"])))
        graphs = [GraphSizes(**g) for g in facts["graphs"]]
        self._graphs = [(g, open_session(directory / g.file, facts, threads)) for g in graphs]
        self._limit = graphs[0].past or graphs[0].new
        self.provenance: Mapping[str, str] = facts["provenance"]
        self._axes: dict[str, list[str]] = facts["axes"]
        self._caches: dict[str, dict[str, Any]] = facts["caches"]
        self._outer = _Outer(directory / OUTER, threads) if facts["outside"] else None

    def prepare(self, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Nothing: every run is for itself."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once, a row of the batch at a time. Inputs that the model does not have are ignored.

        Raises:
            InputError: If an input is missing, does not fit the model, or is longer than the graphs.
        """
        checked = check_inputs(self.signature, inputs)
        batch = {n: self._axes[n].index("batch") for n in checked if "batch" in self._axes[n]}
        rows = next((checked[n].shape[axis] for n, axis in batch.items()), 1)
        found = [
            self._row({n: a.take([row], batch[n]) if n in batch else a for n, a in checked.items()})
            for row in range(rows)
        ]
        return {p.name: np.concatenate([f[p.name] for f in found]) for p in self.signature.outputs}

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Yields tokens after `tokens`, until `max_tokens` or one of `stop`, which is not yielded.

        Raises:
            InputError: If the model does not generate text, or the prompt does not fit it.
        """
        if not self.signature.caches:
            return generate(self, tokens, max_tokens, stop, sampling)
        return self._generate(tokens, plan(self, tokens, max_tokens), frozenset(stop), sampling)

    def _generate(
        self, tokens: Sequence[int], max_tokens: int, stop: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        logits = self.signature.output("logits")
        assert logits is not None
        own = Signature(tuple(p for p in self.signature.inputs if p.name not in self._caches), ())
        caches, new, past, choose = self._empty(), [int(t) for t in tokens], 0, sampling.chooser()
        for _ in range(max_tokens):
            given = text_inputs(own, np.array([new]), past=past)
            token = choose(self._text(given, len(new), past, caches)[logits.name])
            if token in stop:
                return
            yield token
            past += len(new)
            new = [token]

    def _row(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = self.signature.input("tokens")
        if tokens is None:
            graph, session = self._graphs[0]
            return self._piece(session, graph, inputs, 0, 0, {})
        new = inputs[tokens.name].shape[1]
        past = next((inputs[n].shape[self._axes[n].index("past")] for n in self._caches), 0)
        if past + new > self._limit:
            raise InputError(
                f"Expected at most {self._limit} tokens, which the graphs were made for, found {past + new}. Shorten "
                "the text, or compile for a longer one: --target ort-npu:qnn,length=N (cache=N for a decoder)."
            )
        caches = self._empty()
        for name, cache in caches.items():
            _part(cache, self._axes[name], 0, past)[...] = self._encode(name, inputs[name])
        found = self._text(inputs, new, past, caches)
        for name, cache in caches.items():
            found[self._caches[name]["present"]] = self._decode(name, _part(cache, self._axes[name], 0, past + new))
        return found

    def _empty(self) -> dict[str, np.ndarray]:
        session = self._graphs[0][1]
        return {n: np.zeros(session.inputs[n], self._caches[n]["dtype"]) for n in self._caches}

    def _encode(self, name: str, array: np.ndarray) -> np.ndarray:
        grid = self._caches[name]
        if "scale" not in grid:
            return array.astype(grid["dtype"])
        codes = np.rint(array / np.float32(grid["scale"])) + grid["zero_point"]
        return np.clip(codes, 0, np.iinfo(grid["dtype"]).max).astype(grid["dtype"])

    def _decode(self, name: str, codes: np.ndarray) -> np.ndarray:
        grid = self._caches[name]
        if "scale" not in grid:
            return codes.astype(np.float32)
        return (codes.astype(np.float32) - grid["zero_point"]) * np.float32(grid["scale"])

    def _text(
        self, inputs: Mapping[str, np.ndarray], new: int, past: int, caches: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Runs a text piece by piece behind `past` positions; writes into `caches`."""
        found: list[dict[str, np.ndarray]] = []
        done = 0
        while done < new or not found:
            graph, session = self._choose(new - done)
            count = min(graph.new, new - done)
            piece = {n: self._cut(n, a, done, count, past) for n, a in inputs.items() if n not in caches}
            results = self._piece(session, graph, piece, count, past + done, caches)
            for name, cache in caches.items():
                codes = results.pop(self._caches[name]["present"])
                axes = self._axes[name]
                _part(cache, axes, past + done, count)[...] = _part(codes, axes, 0, count)
            found.append(results)
            done += count
        return {n: np.concatenate([f[n] for f in found], 1) if len(found) > 1 else a for n, a in found[0].items()}

    def _choose(self, count: int) -> tuple[GraphSizes, FixedSession]:
        """The smallest graph that takes `count` positions, or the largest of all."""
        fitting = [g for g in self._graphs if g[0].new >= count]
        return min(fitting or self._graphs, key=lambda g: g[0].new if fitting else -g[0].new)

    def _cut(self, name: str, array: np.ndarray, done: int, count: int, past: int) -> np.ndarray:
        """What belongs to the piece: its tokens, or all up to its end."""
        for axis, meaning in enumerate(self._axes[name]):
            if meaning == "new":
                array = array.take(range(done, done + count), axis)
            elif meaning == "all":
                array = array.take(range(past + done + count), axis)
        return array

    def _piece(
        self,
        session: FixedSession,
        graph: GraphSizes,
        inputs: dict[str, np.ndarray],
        count: int,
        past: int,
        caches: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        fed = dict(caches)
        if self._outer is not None:
            lengths = {PAST: past, LENGTH: graph.new}
            made = self._outer.run({**inputs, **{n: np.array([size], np.int64) for n, size in lengths.items()}})
            fed |= {n: a for n, a in made.items() if n in session.inputs}
        own = {n: shape for n, shape in session.inputs.items() if n not in fed}
        results = session.run(fed | {n: self._pad(n, inputs[n], shape, graph, past) for n, shape in own.items()})
        tokens = self.signature.input("tokens")
        for port in self.signature.outputs if tokens is not None else ():
            for axis, dim in enumerate(port.shape):
                if isinstance(dim, str) and dim == tokens.shape[1]:
                    results[port.name] = results[port.name].take(range(count), axis)
        return results

    def _pad(self, name: str, array: np.ndarray, shape: tuple[int, ...], graph: GraphSizes, past: int) -> np.ndarray:
        """Fits an input to its fixed shape; positions of the cache and new ones keep their beginnings."""
        dtype = np.int32 if array.dtype == np.int64 else array.dtype
        padded = np.zeros(shape, dtype)
        places = []
        for meaning, size in zip(self._axes[name], array.shape, strict=True):
            behind = np.arange(size)
            places.append(np.where(behind < past, behind, behind - past + graph.past) if meaning == "all" else behind)
        padded[np.ix_(*places)] = array
        return padded


class _Outer:
    """The graph beside the NPU."""

    def __init__(self, file: Path, threads: int) -> None:
        self._session = CpuSession(file, threads)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._session.run({n: a for n, a in inputs.items() if n in self._session.inputs})


def _part(array: np.ndarray, axes: Sequence[str], start: int, count: int) -> np.ndarray:
    """The positions of a cache from `start` on, as a view."""
    return array[tuple(slice(start, start + count) if a == "past" else slice(None) for a in axes)]


def read_facts(directory: Path) -> dict[str, Any]:
    """What the graphs do not say about themselves: ``npu.json``.

    Raises:
        InputError: If it is missing or damaged.
    """
    file = directory / FACTS
    try:
        return {**json.loads(file.read_text("utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} is not readable ({error}). Copy the artifact again.") from error


def _port(data: Mapping[str, Any]) -> Port:
    return Port(
        data["name"], ir.DataType[data["dtype"]], tuple(data["shape"]), data["role"], data["index"], data["kind"]
    )
