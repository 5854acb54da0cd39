"""The tables of ``tokenizer.bin``, with which the C kit turns text into token ids and back.

It knows two kinds of tokenizer: byte pairs on bytes (`ByteLevel`) behind the pattern of GPT-2, and pieces of words
(`WordPiece`) behind the normalizer of BERT. Everything that its code need not decide is decided here: which characters
are letters, what a pair of tokens becomes, what a capital with an accent becomes.

| little-endian, 32 bits | what |
|---|---|
| 8 bytes | ``QCTEXT01`` |
| V, M, R, S, C, T | numbers of tokens, pairs, ranges of characters, special tokens, changes, what they make |
| 6 | the kind, the first and last token (or -1), the one for unknown words, characters in the longest, Hangul |
| 256 | the token of each byte |
| R x 3 | first and last character of a range, and its kind |
| M x 4 | two tokens, what they become, their rank; ordered by the two |
| S | special tokens, the longest first |
| V | tokens in the order of their bytes, special ones behind |
| C x 3 | a character, the place of what it becomes, the number of these characters |
| T | characters |
| V + 1 | where the bytes of a token begin, then the bytes |
"""

from __future__ import annotations

import dataclasses
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
_PAIRS, _WHOLE_WORDS, _PIECES = range(3)
"""Kinds: byte pairs; likewise, where words that are tokens are not cut up; pieces of words."""

_LETTER, _DIGIT, _SPACE, _PUNCTUATION, _NOTHING = range(1, 6)
_PLAIN_END = 0x40000
"""Behind it are no letters: tags, and what nobody has assigned."""

_LONGEST = 256
"""Characters of a word that the code has room for."""

_HANGUL = range(0xAC00, 0xD7A4)
"""Syllables, which decompose by arithmetic."""

_SPACES = frozenset(
    (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
)
"""Characters with the property White_Space."""


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What is written.

    Attributes:
        kind: One of the three.
        tokens: The bytes of each token.
        special: Special tokens.
        ranges: Ranges of characters with their kinds.
        merges: Pairs.
        ends: The first and the last token of a text; -1 for none.
        unknown: The token of unknown words.
        longest: Characters in a word that is looked up.
        changes: What characters become.
        hangul: Whether syllables become letters.
    """

    kind: int
    tokens: Sequence[bytes]
    special: Sequence[int]
    ranges: Sequence[tuple[int, int, int]]
    merges: Sequence[tuple[int, int, int, int]] = ()
    ends: tuple[int, int] = (-1, -1)
    unknown: int = -1
    longest: int = 0
    changes: Mapping[int, str] = dataclasses.field(default_factory=dict)
    hangul: bool = False

    def packed(self) -> bytes:
        """The file."""
        tokens, special = self.tokens, sorted(self.special, key=lambda n: -len(self.tokens[n]))
        singles = {t[0]: n for n, t in enumerate(tokens) if len(t) == 1 and n not in special}
        plain = sorted(set(range(len(tokens))) - set(special), key=lambda n: tokens[n])
        starts = np.concatenate([[0], np.cumsum([len(t) for t in self.changes.values()])]).tolist()
        changed = [
            n
            for c, start, new in zip(self.changes, starts, self.changes.values(), strict=False)
            for n in (c, start, len(new))
        ]
        numbers = [len(tokens), len(self.merges), len(self.ranges), len(special), len(self.changes), starts[-1]]
        numbers += [self.kind, *self.ends, self.unknown, self.longest, self.hangul]
        numbers += [singles.get(byte, 0) for byte in range(256)]
        numbers += [n for entry in (*self.ranges, *sorted(self.merges)) for n in entry]
        numbers += [*special, *plain, *special, *changed, *(ord(c) for new in self.changes.values() for c in new)]
        numbers += np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).tolist()
        return _MAGIC + np.array(numbers, "<i4").tobytes() + b"".join(tokens)


def text_tables(file: Path, bos: int | None) -> bytes | None:
    """The tables of a ``tokenizer.json``; None if it is of another kind.

    Args:
        file: The tokenizer.
        bos: The token that a text to go on with starts with.
    """
    data = json.loads(file.read_text("utf-8"))
    added = data.get("added_tokens") or []
    if not all(map(_is_exact, added)):
        return None
    special = {t["id"]: t["content"].encode() for t in added}
    made = _pairs(data, special, bos) if _is_plain(data) else _pieces(file, data, special)
    return made.packed() if made is not None else None


def _pairs(data: Mapping[str, Any], special: Mapping[int, bytes], bos: int | None) -> _Tables | None:
    model, chars = data["model"], _byte_characters()
    vocabulary: dict[str, int] = model["vocab"]
    own = {n: t for t, n in vocabulary.items() if n not in special}
    if not all(c in chars for token in own.values() for c in token):
        return None
    tokens = _numbered({n: bytes(chars[c] for c in token) for n, token in own.items()}, special)
    merges = list(_merges(model, vocabulary))
    singles = {t for n, t in enumerate(tokens) if len(t) == 1 and n not in special}
    if len(singles) < 256 or len(merges) < len(model["merges"]):
        return None
    kind = _WHOLE_WORDS if model.get("ignore_merges") else _PAIRS
    return _Tables(kind, tokens, list(special), _of_gpt2(), merges, (-1 if bos is None else bos, -1))


def _pieces(file: Path, data: Mapping[str, Any], special: Mapping[int, bytes]) -> _Tables | None:
    model, options = data["model"], data.get("normalizer") or {}
    ends = _ends(data.get("post_processor") or {})
    if (
        model.get("type") != "WordPiece"
        or model.get("continuing_subword_prefix") != "##"
        or options.get("type") != "BertNormalizer"
        or (data.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer"
        or ends is None
        or model["max_input_chars_per_word"] >= _LONGEST
        or model.get("unk_token") not in model["vocab"]
    ):
        return None
    own = {n: t.encode() for t, n in model["vocab"].items() if n not in special}
    kinds, changes = _parts_of_words(file)
    return _Tables(
        _PIECES,
        _numbered(own, special),
        list(special),
        _ranges(kinds),
        ends=ends,
        unknown=model["vocab"][model["unk_token"]],
        longest=model["max_input_chars_per_word"],
        changes=changes,
        hangul=options.get("strip_accents") or (options.get("strip_accents") is None and options["lowercase"]),
    )


def _numbered(own: Mapping[int, bytes], special: Mapping[int, bytes]) -> list[bytes]:
    whole = {**own, **special}
    return [whole.get(n, b"") for n in range(max(whole) + 1)]


def _ends(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    """The tokens that are put around a sentence, if it is one on either side."""
    if processor.get("type") == "BertProcessing":
        return processor["cls"][1], processor["sep"][1]
    template = processor.get("single") or []
    if processor.get("type") != "TemplateProcessing" or [*map(next, map(iter, template))] != _AROUND:
        return None
    ids = [processor["special_tokens"][t["SpecialToken"]["id"]]["ids"] for t in (template[0], template[2])]
    return (ids[0][0], ids[1][0]) if all(len(i) == 1 for i in ids) else None


_AROUND = ["SpecialToken", "Sequence", "SpecialToken"]


def _parts_of_words(file: Path) -> tuple[np.ndarray, dict[int, str]]:
    """What each character is to BERT, if it is no part of a word, and what it becomes, if it does not stay.

    The library of the tokenizer says so: its tables are of a version of Unicode of their own.
    """
    import tokenizers

    whole = tokenizers.Tokenizer.from_file(str(file))
    kinds, changes = np.zeros(_PLAIN_END, np.int64), {}
    for code in set(range(_PLAIN_END)) - set(_HANGUL) - set(range(0xD800, 0xE000)):
        old = chr(code)
        new = whole.normalizer.normalize_str(old)
        if new == "":
            kinds[code] = _NOTHING
        elif new == f" {old} ":
            kinds[code] = _PUNCTUATION
        elif new != old:
            changes[code] = new
        elif not old.isalnum():
            cut = len(whole.pre_tokenizer.pre_tokenize_str(f"a{old}a"))
            kinds[code] = {1: 0, 2: _SPACE, 3: _PUNCTUATION}[cut]
    return kinds, dict(sorted(changes.items()))


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


def _ranges(kinds: np.ndarray) -> Sequence[tuple[int, int, int]]:
    """Ranges of characters of a kind, in order.

    Args:
        kinds: The kind of every character, by code [_PLAIN_END].
    """
    edges = np.flatnonzero(np.diff(kinds, prepend=0, append=0)).tolist()
    found = zip(edges, edges[1:], kinds[edges[:-1]].tolist(), strict=False)
    return [(first, after - 1, kind) for first, after, kind in found if kind]


@functools.cache
def _of_gpt2() -> Sequence[tuple[int, int, int]]:
    characters = np.arange(_PLAIN_END, dtype=np.uint32).view("U1")
    kinds = np.where(np.char.isalpha(characters), _LETTER, 0)  # exactly those of category L
    for code in np.flatnonzero(np.char.isnumeric(characters)).tolist():
        if unicodedata.category(chr(code))[0] == "N":
            kinds[code] = _DIGIT
    kinds[list(_SPACES)] = _SPACE
    return _ranges(kinds)
