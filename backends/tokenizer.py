"""Text to token ids and back, by the tokenizer that travels with a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qc.ir.errors import InputError

__all__ = ["Tokenizer", "stop_tokens"]

_INCOMPLETE = "�"  # what a decoder puts where the bytes of a character are not yet complete


class Tokenizer:
    """The tokenizer of a model directory or artifact.

    Attributes:
        bos: Id that a text starts with, or None if the model has none.
        stop: Ids that end a generated text.
    """

    def __init__(self, directory: Path) -> None:
        """Loads it.

        Args:
            directory: Holds ``tokenizer.json`` and, if the model has them, its configuration files.

        Raises:
            InputError: If there is none, or it cannot be read.
        """
        import tokenizers

        file = directory / "tokenizer.json"
        if not file.is_file():
            raise InputError(
                f"Expected a tokenizer at {file}, found none. This model takes token ids: pass them as arrays "
                "(--input FILE.npz), or put the model's tokenizer.json beside it and compile again."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise InputError(f"{file} is not a readable tokenizer ({error}). Copy it again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.bos = self._bos(_configurations(directory), _read(directory / "tokenizer_config.json"))
        self.stop = stop_tokens(directory)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Turns a text into ids, as an input of a decoder.

        Args:
            text: The text.
            bos: Whether the text starts here, so that the model's first token (if it has one) goes before it.
        """
        ids = list(self._tokenizer.encode(_characters(text), add_special_tokens=False).ids)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def encode_sentence(self, text: str) -> list[int]:
        """Turns a text into ids with the special tokens that the tokenizer puts around it, as an encoder expects."""
        return list(self._tokenizer.encode(_characters(text)).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Turns ids into text; special tokens are left out."""
        return self._tokenizer.decode(list(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of `ids` piece by piece, each piece complete characters; all pieces make up the text.

        A token's text depends on its neighbours, so the difference of two decodings is what is new: that of the ids
        since the last piece but one, with and without the new one.
        """
        held: list[int] = []
        start, shown = 0, 0
        for token in ids:
            held.append(int(token))
            old, new = self.decode(held[start:shown]), self.decode(held[start:])
            if len(new) > len(old) and not new.endswith(_INCOMPLETE):
                yield new[len(old) :]
                start, shown = shown, len(held)
        rest = self.decode(held[start:])[len(self.decode(held[start:shown])) :]
        if rest:
            yield rest

    def _bos(self, configs: Sequence[dict[str, Any]], settings: dict[str, Any]) -> int | None:
        """The tokenizer's own settings decide first, then the model's configuration."""
        if settings.get("add_bos_token") is False or settings.get("bos_token", "") is None:
            return None
        token = settings.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (known := self._tokenizer.token_to_id(token)) is not None:
            return known
        found = next((c["bos_token_id"] for c in configs if isinstance(c.get("bos_token_id"), int)), None)
        return found if found is not None and found < self._tokenizer.get_vocab_size() else None


def _characters(text: str) -> str:
    """The text with a sign of replacement for each half of a character, which escapes in JSON and cut text can be."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def stop_tokens(directory: Path) -> tuple[int, ...]:
    """Ids that end a generated text, from the configuration files of a model directory or artifact."""
    ids: list[int] = []
    for config in _configurations(directory):
        eos = config.get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _configurations(directory: Path) -> list[dict[str, Any]]:
    return [_read(directory / n) for n in ("config.json", "generation_config.json")]


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable JSON ({error}). Copy it again.") from error
    return data if isinstance(data, dict) else {}
