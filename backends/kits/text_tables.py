"""The tables of ``tokenizer.bin``, with which the C kit turns text into token ids and back.

It knows byte pairs on bytes (`ByteLevel`) behind the pattern of GPT-2. Everything that its code need not decide is
decided here: which characters are letters, what a pair of tokens becomes.

| little-endian, 32 bits | what |
|---|---|
| 8 bytes | ``QCTEXT01`` |
| V, M, R, S | numbers of tokens, pairs, ranges of characters, special tokens |
| 1 | whether a word that is a token is not cut up |
| 1 | the token that a text starts with, or -1 |
| 256 | the token of each byte |
| R x 3 | first and last character of a range, and its kind: letter, digit, space |
| M x 4 | two tokens, what they become, their rank; ordered by the two |
| S | special tokens, the longest first |
| V | tokens in the order of their bytes |
| V + 1 | where the bytes of a token begin, then the bytes |
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["TEXT_FILE", "text_tables"]

TEXT_FILE = "tokenizer.bin"

_MAGIC = b"QCTEXT01"
_LETTER, _DIGIT, _SPACE = 1, 2, 3
_PLAIN_END = 0x40000
"""Behind it are no letters: tags, and what nobody has assigned."""

_SPACES = frozenset(
    (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
)
"""Characters with the property White_Space."""


def text_tables(file: Path, bos: int | None) -> bytes | None:
    """The tables of a ``tokenizer.json``; None if it is of another kind.

    Args:
        file: The tokenizer.
        bos: The token that a text starts with.
    """
    data = json.loads(file.read_text("utf-8"))
    model, added = data["model"], data.get("added_tokens") or []
    if not (_is_plain(data) and all(map(_is_exact, added))):
        return None
    chars = _byte_characters()
    vocabulary: dict[str, int] = model["vocab"]
    size = max([*vocabulary.values(), *(t["id"] for t in added)]) + 1
    tokens = [b""] * size
    special = {t["id"]: t["content"].encode() for t in added}
    for token, number in vocabulary.items():
        if number not in special:
            if not all(c in chars for c in token):
                return None
            tokens[number] = bytes(chars[c] for c in token)
    for number, content in special.items():
        tokens[number] = content
    singles = {t[0]: n for n, t in enumerate(tokens) if len(t) == 1 and n not in special}
    merges = list(_merges(model, vocabulary))
    if len(singles) < 256 or len(merges) < len(model["merges"]):
        return None
    order = sorted((n for n in range(size) if n not in special), key=lambda n: tokens[n])
    ranges = _ranges()
    longest = sorted(special, key=lambda n: -len(special[n]))
    numbers = [
        size,
        len(merges),
        len(ranges),
        len(special),
        bool(model.get("ignore_merges")),
        -1 if bos is None else bos,
    ]
    numbers += [singles[b] for b in range(256)]
    numbers += [n for r in ranges for n in r]
    numbers += [n for merge in sorted(merges) for n in merge]
    numbers += longest
    numbers += order + [longest[0]] * (size - len(order)) if special else order
    numbers += np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).tolist()
    return _MAGIC + np.array(numbers, "<i4").tobytes() + b"".join(tokens)


def _is_plain(data: Mapping[str, Any]) -> bool:
    """Whether words are cut by the pattern of GPT-2, and bytes are paired, without anything else."""
    model, before = data["model"], data.get("pre_tokenizer") or {}
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in options)
        and data.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space", True)
        and (data.get("decoder") or {}).get("type") == "ByteLevel"
    )


def _is_exact(token: Mapping[str, Any]) -> bool:
    """Whether an added token is found in a text as it is spelled, and left out of what is said."""
    return token["special"] and not any(token.get(name) for name in ("single_word", "lstrip", "rstrip", "normalized"))


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a token stands for: printable ones for themselves, others from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _merges(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Iterator[tuple[int, int, int, int]]:
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            yield vocabulary[left], vocabulary[right], vocabulary[left + right], rank


@functools.cache
def _ranges() -> Sequence[tuple[int, int, int]]:
    """Ranges of characters of a kind, in order."""
    found, first, kind = [], 0, 0
    for code in range(_PLAIN_END + 1):
        now = _kind(code) if code < _PLAIN_END else 0
        if now != kind:
            if kind:
                found.append((first, code - 1, kind))
            first, kind = code, now
    return found


def _kind(code: int) -> int:
    if code in _SPACES:
        return _SPACE
    return {"L": _LETTER, "N": _DIGIT}.get(unicodedata.category(chr(code))[0], 0)
