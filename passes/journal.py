"""What a sweep has finished, written down after every part, so that a killed compile goes on from there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.store import Store
from qc.passes.base import Outcome, Site

__all__ = ["Entry", "Journal"]

_UNCHANGED, _STORED = "unchanged", "stored"
"""Where the numbers of an initializer are: in the model that the sweep began with, or in the store."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The state of a sweep between two parts.

    Attributes:
        owners: The part of each node, in graph order.
        modified: For each finished part, whether a pass changed it.
        sites: What each step has reported so far.
        notes: Likewise.
        memos: What each step remembers.
        used: The exclusions that have matched something.
    """

    owners: Sequence[int]
    modified: Sequence[bool]
    sites: Sequence[Sequence[Site]]
    notes: Sequence[Sequence[str]]
    memos: Sequence[Mapping[object, object]]
    used: Sequence[str]


class Journal:
    """A directory with the last entry of each sweep of a pipeline, and a fingerprint of all that it depends on.

    An entry is the graph without its numbers: those of new weights lie in the compile's store, the others in the model
    that the sweep began with. A pass that learns on the whole network has a file of its own for what it has learned
    so far. Each replaces the one before it atomically.
    """

    def __init__(self, directory: Path, facts: Mapping[str, str], *, resume: bool = False) -> None:
        """Opens a journal.

        Args:
            directory: Where it lies; created if missing.
            facts: What the compile depends on, in the words of a user: ``{"recipe": ..., "seed": ...}``.
            resume: Whether to go on with what is there; else it is forgotten.

        Raises:
            InputError: If the journal was written with other facts.
        """
        self._directory, self._facts, self._resume, self._sweeps = directory, dict(facts), resume, 0
        directory.mkdir(parents=True, exist_ok=True)
        if not resume:
            for path in directory.iterdir():
                path.unlink()
        path = directory / "compile.json"
        if path.is_file():
            self._require_same(_load(path), self._facts)
        _replace_json(path, self._facts)

    def begin(self, facts: Mapping[str, str]) -> int:
        """Begins the next sweep, or pass with a file of its own, and returns its number.

        Raises:
            InputError: If there is an entry that was written with other facts.
        """
        number, self._sweeps = self._sweeps, self._sweeps + 1
        path = self._path(number)
        if path.is_file():
            self._require_same(_load(path)["facts"], dict(facts))
        self._current = dict(facts)
        return number

    def load(self, number: int, model: Model, store: Store) -> tuple[Model, Entry] | None:
        """Restores the model and the state of a sweep, if any of it was written down.

        Args:
            number: Of the sweep, from `begin`.
            model: As the sweep begins.
            store: The compile's; holds the numbers of new weights.
        """
        path = self._path(number)
        if not path.is_file():
            return None
        data = _load(path)
        proto = onnx.load(self._directory / data["graph"], load_external_data=False)
        restored = Model.of(ir.from_proto(proto), assets=model.assets)
        for name, value in restored.graph.initializers.items():
            if not isinstance(value.const_value, ir.ExternalTensor):
                continue
            if value.const_value.location == _UNCHANGED:
                value.const_value = model.graph.initializers[name].const_value
            else:
                value.const_value = _relocated(value.const_value, store)
        values = {str(v.name): v for n in restored.graph for v in n.outputs} | dict(restored.graph.initializers)
        entry = Entry(
            owners=data["owners"],
            modified=data["modified"],
            sites=[[Site(**{**s, "outcome": Outcome(s["outcome"])}) for s in step] for step in data["sites"]],
            notes=data["notes"],
            memos=[_decoded(m, values) for m in data["memos"]],
            used=data["used"],
        )
        return restored, entry

    def save(self, number: int, begun: Model, model: Model, store: Store, entry: Entry) -> None:
        """Writes down the state of a sweep.

        Args:
            number: Of the sweep.
            begun: The model as the sweep began.
            model: The model as it is.
            store: The compile's; what it holds is brought to the disk first.
            entry: The rest of the state.
        """
        store.sync()
        graph = f"sweep-{number}.{len(entry.modified)}.onnx"
        (self._directory / graph).write_bytes(_without_numbers(model, begun, store).SerializeToString())
        data = {
            "facts": self._current,
            "graph": graph,
            "owners": list(entry.owners),
            "modified": list(entry.modified),
            "sites": [[dataclasses.asdict(s) | {"outcome": s.outcome.value} for s in step] for step in entry.sites],
            "notes": [list(n) for n in entry.notes],
            "memos": [_encoded(m) for m in entry.memos],
            "used": list(entry.used),
        }
        _replace_json(self._path(number), data)
        for old in self._directory.glob(f"sweep-{number}.*.onnx"):
            if old.name != graph:
                old.unlink()

    def load_file(self, number: int) -> Path | None:
        """The file of a pass, if one was written."""
        path = self._path(number).with_suffix(".state")
        return path if path.is_file() else None

    def save_file(self, number: int, write: Callable[[BinaryIO], object]) -> None:
        """Replaces the file of a pass by what `write` writes."""
        path = self._path(number)
        if not path.is_file():
            _replace_json(path, {"facts": self._current})
        _replace(path.with_suffix(".state"), write)

    def _path(self, number: int) -> Path:
        return self._directory / f"sweep-{number}.json"

    def _require_same(self, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
        for name in dict.fromkeys((*expected, *found)):
            if found.get(name) != expected.get(name):
                raise InputError(
                    f"The journal in {self._directory} belongs to another compile: its {name} is {found.get(name)}, "
                    f"that of this compile {expected.get(name)}. Compile as before to go on with it, or without "
                    "--resume to begin anew."
                )


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(
            f"The journal {path} is not readable ({error}). Compile without --resume to begin anew."
        ) from error


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file such that a crash leaves the old one or the new one."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _replace_json(path: Path, data: Mapping[str, object]) -> None:
    text = json.dumps(data, sort_keys=True).encode()
    _replace(path, lambda file: file.write(text))


def _without_numbers(model: Model, begun: Model, store: Store) -> onnx.ModelProto:
    written = model.clone()
    for name, value in written.graph.initializers.items():
        tensor = value.const_value
        own = begun.graph.initializers.get(name)
        if tensor is None:
            continue
        if own is not None and own.const_value is tensor:
            value.const_value = ir.ExternalTensor(
                _UNCHANGED, 0, 0, tensor.dtype, shape=tensor.shape, name=name, base_dir=""
            )
        elif isinstance(tensor, ir.ExternalTensor) and store.holds(tensor):
            value.const_value = ir.ExternalTensor(
                _STORED, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=""
            )
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    return ir.to_proto(written)


def _relocated(tensor: ir.ExternalTensor, store: Store) -> ir.ExternalTensor:
    assert tensor.offset is not None
    assert tensor.length is not None
    return store.at(tensor.name or "", tensor.offset, tensor.length, tensor.dtype, tensor.shape)


def _encoded(value: object) -> object:
    """Spells what a pass remembers in JSON; values of the graph by name."""
    if isinstance(value, ir.Value):
        return {"value": value.name}
    if isinstance(value, Mapping):
        return {"map": [[_encoded(k), _encoded(v)] for k, v in value.items()]}
    if isinstance(value, set):
        return {"set": sorted((_encoded(v) for v in value), key=repr)}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v) for v in value]}
    return value


def _decoded(value: Any, values: Mapping[str, ir.Value]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "value":
            return values.get(content) or ir.Value(name=content)  # one that nobody reads any more
        case "map":
            return {_decoded(k, values): _decoded(v, values) for k, v in content}
        case "set":
            return {_decoded(v, values) for v in content}
        case _:
            return tuple(_decoded(v, values) for v in content)
