"""Texts to calibrate and measure on, as token ids: plain text, JSON lines, or arrays of ids."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np

from qc.arrays import read_array
from qc.backends.evaluate import WINDOW
from qc.backends.tokenizer import Tokenizer
from qc.ir.errors import InputError
from qc.ir.model import Model, Signature
from qc.ir.probe import index_bound

__all__ = ["Documents", "read_documents", "require_vocabulary"]

_IDS = ("input_ids", "tokens")
_LINES = frozenset({".jsonl", ".json"})


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts as token ids.

    Attributes:
        ids: One list for each; none is empty.
        answers: What the decoder of an encoder-decoder says to each, with the token that ends it; None if not known.
        continuous: Whether they are one text that was cut anywhere, so that windows may be cut from it too.
        unordered: Whether their order says nothing, or groups what is alike: true of records, not of lines of a text.
        unit: What one of them is called in a message.
    """

    ids: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]] | None = None
    continuous: bool = False
    unordered: bool = True
    unit: str = "texts"

    def part(self, indices: Sequence[int], longest: int | None = None) -> Documents:
        """Some of the texts, each cut to so many tokens."""
        answers = None if self.answers is None else [self.answers[i] for i in indices]
        return dataclasses.replace(self, ids=[list(self.ids[i][:longest]) for i in indices], answers=answers)


def read_documents(path: Path, signature: Signature, tokenizer: Path | None, *, whole: bool) -> Documents:
    """Reads a file of texts or token ids.

    * ``.jsonl``: an object a line with ``text``, or ``messages`` (whose contents are joined by blank lines), or token
      ids under ``input_ids`` or ``tokens``; for encoder-decoders also ``target``, or token ids under ``labels``. Empty
      ones are left out, and texts for decoders cut to a window;
    * ``.npy``: integers, one text ``[T]`` or one a row ``[N, T]``;
    * any other file is UTF-8 text: one text for decoders, a line each for other models.

    Args:
        path: The file.
        signature: Of the model that reads them.
        tokenizer: The directory of its tokenizer, if it has one.
        whole: Whether it is a decoder, for which a text goes on from line to line.

    Raises:
        InputError: If the file is not what its name says, or holds no text; or the model reads none.
    """
    if signature.input("tokens") is None:
        raise InputError(
            f"Expected arrays or images for a model that takes no tokens, found {path.name}. "
            "Give an .npz file, or a directory of .npz files or images."
        )
    reader = _Reader(path, signature, tokenizer, whole)
    match path.suffix.lower():
        case ".npy":
            found = reader.arrays()
        case suffix if suffix in _LINES:
            found = reader.lines()
        case _:
            found = reader.text()
    if not found.ids:
        raise InputError(f"Expected text in {path}, found none. Give another file.")
    return found


def require_vocabulary(model: Model, role: str, texts: Iterable[Sequence[int] | np.ndarray], place: object) -> None:
    """Refuses token ids that the model has no embedding of.

    Args:
        model: The model.
        role: Of the input that takes them.
        texts: The ids; none is empty.
        place: Where they come from.

    Raises:
        InputError: With the first of them.
    """
    port = model.signature.input(role)
    bound = index_bound(model, port.name) if port is not None else None
    for text in texts:
        least, largest = int(np.min(text)), int(np.max(text))
        if least < 0 or (bound is not None and largest >= bound):
            raise InputError(
                f"Expected token ids from 0 to {bound - 1 if bound is not None else 'the size of the vocabulary'} in "
                f"{place}, found {least if least < 0 else largest}. Was it made with another tokenizer?"
            )


@dataclasses.dataclass(frozen=True)
class _Reader:
    path: Path
    signature: Signature
    directory: Path | None
    whole: bool

    def arrays(self) -> Documents:
        array = read_array(self.path)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise InputError(
                f"Expected token ids in {self.path}, integers of shape [T] or [N, T]; found {array.dtype} "
                f"{list(array.shape)}. Give other inputs by name, in an .npz file."
            )
        continuous = array.ndim == 1 and self.whole
        if array.ndim == 1:
            rows = [array] if continuous else np.split(array, range(WINDOW, len(array), WINDOW))
        else:
            rows = list(array)
        return Documents([row.tolist() for row in rows if len(row)], continuous=continuous)

    def text(self) -> Documents:
        try:
            text = self.path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"Expected UTF-8 text in {self.path}, found other bytes ({error}).") from error
        if self.whole:
            ids = self._encode(text)
            return Documents([ids] if ids else [], continuous=True)
        sentences = [self._encode(line) for line in text.splitlines()]
        return Documents([s for s in sentences if s], unordered=False, unit="lines, one text each,")

    def lines(self) -> Documents:
        """A record a line; of an encoder-decoder all or none have a target."""
        paired = self.signature.input("decoder_tokens") is not None
        ids, answers, without = [], [], None
        for number, record in self._records():
            source = self._ids(number, record)
            target = self._target(number, record) if paired else None
            if not source or target == []:
                continue
            ids.append(source)
            if target is None:
                without = without or number
            else:
                answers.append(target)
        if answers and without is not None:
            raise InputError(
                f"Expected target (a string) or labels (a list of integers) in line {without} of {self.path}, as in "
                "other lines; found neither. Leave the line out, or the targets of all."
            )
        return Documents(ids, answers or None)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.directory is None:
            raise InputError(f"Expected a tokenizer.json beside the model to read {self.path} with, found none.")
        return Tokenizer(self.directory)

    def _encode(self, text: str) -> list[int]:
        """Of a text of white space nothing is left, not even what a tokenizer puts at the beginning of each."""
        if not text.strip():
            return []
        return self._tokenizer.encode(text) if self.whole else self._tokenizer.encode_sentence(text)

    def _records(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if not line.strip():
                    continue
                found = repr(line[:40].decode("utf-8", "replace"))
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(
                        f"Expected a JSON object in line {number} of {self.path}, found {found} ({error})."
                    ) from error
                if not isinstance(record, dict):
                    raise InputError(f"Expected a JSON object in line {number} of {self.path}, found {found}.")
                yield number, record

    def _ids(self, number: int, record: Mapping[str, object]) -> list[int]:
        ids = next((record[k] for k in _IDS if k in record), None)
        if _are_ids(ids):
            return ids
        messages, text = record.get("messages"), record.get("text")
        if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
            text = "\n\n".join(filter(None, (_content(m.get("content")) for m in messages)))
        if isinstance(text, str):
            return self._encode(text)[: WINDOW if self.whole else None]
        raise InputError(
            f"Expected text (a string), messages (a list of objects with content) or input_ids (a list of integers) in "
            f"line {number} of {self.path}, found {_fields(record)}."
        )

    def _target(self, number: int, record: Mapping[str, object]) -> list[int] | None:
        if _are_ids(labels := record.get("labels")):
            return labels
        if isinstance(target := record.get("target"), str):
            return self._encode(target)
        if "labels" not in record and "target" not in record:
            return None
        raise InputError(
            f"Expected target (a string) or labels (a list of integers) in line {number} of {self.path}, found "
            f"{_fields(record)}."
        )


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _fields(record: Mapping[str, object]) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in record.items()) or "nothing"


def _content(content: object) -> str:
    """The text of a message, which may come in parts; other parts, and messages without text, say nothing here."""
    if isinstance(content, list):
        return "".join(_content(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
