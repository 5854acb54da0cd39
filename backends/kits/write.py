"""Kits: the code that an app developer copies into an app, written for one artifact.

A kit is a folder of templates. Files are copied; ``@@name@@`` in them is replaced by a text that is made from the facts
of the model. What differs between models stands in one generated file of each kit, so that the rest of a kit is
the same code for every model.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from qc.backends.kits import javascript
from qc.backends.kits.facts import Facts, facts_of
from qc.backends.target import Target
from qc.ir.errors import InternalError
from qc.ir.model import Model

__all__ = ["KITS", "write_kit"]

KITS: Mapping[str, Callable[[Facts], Mapping[str, str]]] = {"web": javascript.texts}
"""The texts that depend on the model, by kit: the folder of its templates, and its place in an artifact."""

_MARK = re.compile(r"@@(\w+)@@")


def write_kit(kit: str, model: Model, target: Target, directory: Path) -> None:
    """Writes a kit into a folder of its name in an artifact that is otherwise complete.

    Args:
        kit: One of `KITS`.
        model: The lowered model.
        target: What it was lowered for.
        directory: The artifact.
    """
    facts = facts_of(model, target, directory)
    texts = {"title": facts.title, "facts": json.dumps(facts.to_json(), indent=2), **KITS[kit](facts)}
    for name, file in _templates(importlib.resources.files("qc.backends.kits") / kit, PurePosixPath(kit)):
        out = directory / name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_filled(file.read_text("utf-8"), texts, name), "utf-8", newline="\n")


def _templates(folder: Traversable, at: PurePosixPath) -> Iterator[tuple[PurePosixPath, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _templates(entry, at / entry.name)
        else:
            yield at / entry.name, entry


def _filled(text: str, texts: Mapping[str, str], name: PurePosixPath) -> str:
    def fill(match: re.Match[str]) -> str:
        if match[1] not in texts:
            raise InternalError(f"the template {name} asks for {match[1]!r}, which no kit makes.")
        return texts[match[1]]

    return _MARK.sub(fill, text)
