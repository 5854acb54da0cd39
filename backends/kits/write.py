"""Kits: the code that an app developer copies into an app, written for one artifact.

A kit is made of folders of templates. Files are copied, without ``.template`` at the end of their names, and
``@@name@@`` in them is replaced by a text made from the facts of the model. What differs between models stands in few
generated files, so that the rest of a kit is the same code for every model.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qc.backends.kits import c_language, javascript, kotlin, python_language, swift
from qc.backends.kits.facts import Facts, facts_of
from qc.backends.target import Target
from qc.ir.errors import InternalError
from qc.ir.model import Model

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = ["KITS", "Kit", "write_kits"]


@dataclasses.dataclass(frozen=True)
class Kit:
    """A kit.

    Attributes:
        place: Its folder in an artifact.
        folders: Folders of templates that make it up.
        texts: The texts that depend on the model and on the files in an artifact.
        prepare: Writes what the kit reads beside the files of the runtime.
    """

    place: str
    folders: Sequence[str]
    texts: Callable[[Facts, Path], Mapping[str, str]]
    prepare: Callable[[Facts, Path], None] | None = None


KITS: Mapping[str, Kit] = {
    "android-ort": Kit("android", ["android", "android_ort", "android_whole"], kotlin.runtime_texts),
    "android-fixed": Kit("android", ["android", "android_ort", "android_fixed"], kotlin.fixed_texts),
    "android-tvm": Kit("android", ["android", "android_tvm"], kotlin.library_texts),
    "c": Kit("c", ["c"], c_language.texts, c_language.write_tables),
    "ios-ort": Kit("ios", ["ios", "ios_ort", "ios_whole"], swift.runtime_texts),
    "ios-fixed": Kit("ios", ["ios", "ios_ort", "ios_fixed"], swift.fixed_texts),
    "ios-tvm": Kit("ios", ["ios", "ios_tvm"], swift.library_texts),
    "python": Kit("python", ["python", "python_whole"], python_language.texts),
    "python-fixed": Kit("python", ["python", "python_fixed"], python_language.texts),
    "web": Kit("web", ["web"], javascript.texts),
}
"""All kits by name."""

_MARK = re.compile(r"@@(\w+)@@")


def write_kits(kits: Sequence[str], model: Model, target: Target, directory: Path) -> None:
    """Writes kits into their folders in an artifact whose other files are there.

    Args:
        kits: Names of `KITS`.
        model: The lowered model.
        target: What it was lowered for.
        directory: The artifact.
    """
    facts = facts_of(model, target, directory)
    for kit in map(KITS.__getitem__, kits):
        if kit.prepare is not None:
            kit.prepare(facts, directory)
        common = {"title": facts.title, "facts": json.dumps(facts.to_json(), indent=2), "minimum": facts.runtime[1]}
        texts = {**common, **kit.texts(facts, directory)}
        for folder in kit.folders:
            root = importlib.resources.files("qc.backends.kits") / folder
            for name, file in _templates(root, PurePosixPath(kit.place)):
                out = directory / str(name).removesuffix(".template")
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
