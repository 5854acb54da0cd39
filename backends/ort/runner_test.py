from __future__ import annotations

import numpy as np
import pytest

from qc.backends.inputs import text_inputs
from qc.backends.ort.emit import emit
from qc.backends.ort.runner import open_runner
from qc.ir.errors import InputError


@pytest.fixture
def opened(build, tmp_path):
    def open_kind(kind: str):
        directory = tmp_path / kind
        directory.mkdir()
        emit(build(kind), directory)
        return open_runner(directory, threads=1)

    return open_kind


def test_a_cache_of_either_kind_yields_the_tokens_of_a_full_run(opened):
    expected = list(opened("plain").generate([3, 5, 7], 20))
    assert len(set(expected)) > 3
    assert list(opened("appending").generate([3, 5, 7], 20)) == expected
    assert list(opened("sharing").generate([3, 5, 7], 20)) == expected


def test_generation_starts_afresh_each_time(opened):
    runner = opened("sharing")
    first = list(runner.generate([3, 5, 7], 8))
    list(runner.generate([9, 9, 9, 9, 9], 8))
    assert list(runner.generate([3, 5, 7], 8)) == first


@pytest.mark.parametrize("kind", ["plain", "appending", "sharing"])
def test_a_stop_token_ends_the_text_and_is_not_part_of_it(opened, kind):
    runner = opened(kind)
    text = list(runner.generate([3, 5, 7], 20))
    stop = next(t for t in text if t != text[0])
    assert list(runner.generate([3, 5, 7], 20, stop=[stop])) == text[: text.index(stop)]


def test_generation_ends_where_the_context_does(opened):
    assert len(list(opened("sharing").generate([3] * 40, 100))) == 8


def test_a_prompt_that_fills_the_context_is_refused_at_the_call(opened):
    with pytest.raises(InputError, match="fewer than 48 tokens, found 48"):
        opened("sharing").generate([3] * 48, 1)


def test_an_encoder_does_not_generate(opened):
    with pytest.raises(InputError, match="last_hidden_state"):
        opened("encoder").generate([3], 1)


def test_an_empty_prompt_is_refused(opened):
    with pytest.raises(InputError, match="at least one token"):
        opened("appending").generate([], 1)


def test_all_wrong_inputs_are_named_with_what_was_expected(opened):
    runner = opened("appending")
    inputs = text_inputs(runner.signature, np.array([[3]]))
    del inputs["position_ids"]
    inputs["input_ids"] = inputs["input_ids"].astype(np.int32)
    inputs["past_key_values.0.key"] = inputs["past_key_values.0.key"][:, :1]
    with pytest.raises(InputError) as caught:
        runner.run(inputs)
    message = str(caught.value)
    assert "position_ids: expected int64 [batch, seq], found nothing" in message
    assert "input_ids: expected int64 [batch, seq], found int32 [1, 1]" in message
    assert "past_key_values.0.key: expected float [batch, 2, past, 16], found float32 [1, 1, 0, 16]" in message


def test_inputs_that_the_model_does_not_have_are_ignored(opened):
    runner = opened("encoder")
    inputs = text_inputs(runner.signature, np.array([[3, 5]]))
    assert runner.run({**inputs, "other": np.zeros(1)}).keys() == {"last_hidden_state"}


def test_what_the_runtime_refuses_is_an_input_error_with_the_shapes(opened):
    runner = opened("appending")
    inputs = text_inputs(runner.signature, np.array([[3, 5]]))
    inputs["input_ids"] = np.array([[3, 10_000]])
    with pytest.raises(InputError, match=r"input_ids \[1, 2\]"):
        runner.run(inputs)


def test_a_file_that_is_no_model_is_an_input_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    with pytest.raises(InputError, match=r"not a readable ONNX model|cannot load"):
        open_runner(tmp_path)


def test_a_truncated_weights_file_is_an_input_error(build, tmp_path):
    emit(build("appending"), tmp_path)
    weights = tmp_path / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot load"):
        open_runner(tmp_path)
