from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from qc.backends.tokenizer import Tokenizer
from qc.ir.errors import InputError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A byte-level tokenizer: every byte is a token, so that characters come in pieces."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(directory: Path, name: str, **content) -> None:
    (directory / name).write_text(json.dumps(content))


def test_a_text_starts_with_the_token_of_the_tokenizer(directory):
    configure(directory, "tokenizer_config.json", bos_token="<s>")
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("ab")[0] == 0
    assert len(tokenizer.encode("ab")) == 3
    assert tokenizer.encode("ab", bos=False) == tokenizer.encode("ab")[1:]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0),
        ({"bos_token": {"content": "<s>"}}, 0),
        ({"bos_token": None}, None),
        ({"bos_token": "<s>", "add_bos_token": False}, None),
    ],
)
def test_the_tokenizers_settings_decide_before_the_models(directory, settings, expected):
    configure(directory, "config.json", bos_token_id=0)
    configure(directory, "tokenizer_config.json", **settings)
    assert Tokenizer(directory).bos == expected


def test_an_id_beyond_the_vocabulary_is_no_start_token(directory):
    configure(directory, "config.json", bos_token_id=50256)
    assert Tokenizer(directory).bos is None


def test_all_stop_tokens_are_known(directory):
    configure(directory, "config.json", eos_token_id=1)
    configure(directory, "generation_config.json", eos_token_id=[5, 1])
    assert Tokenizer(directory).stop == (1, 5)


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "a😀b", ""])
def test_a_stream_is_the_text_in_complete_characters(directory, text):
    tokenizer = Tokenizer(directory)
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert pieces == list(text)


def test_bytes_that_never_become_a_character_end_the_stream(directory):
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode("a日")[:-1]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_a_model_without_a_tokenizer_is_told_to_pass_ids(tmp_path):
    with pytest.raises(InputError, match="token ids"):
        Tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_an_input_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_a_damaged_configuration_is_an_input_error(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not readable"):
        Tokenizer(directory)
