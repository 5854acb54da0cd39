"""Calibration data in every form that is read, and the forms that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.tokenizer import Tokenizer
from qc.calibration import read_batches
from qc.frontend import load
from qc.ir.errors import InputError
from qc.ir.model import Model, set_role
from qc.ir.text import parse
from qc.measurement import Data, read_data


@pytest.fixture(scope="module")
def decoder() -> Model:
    return load("builtin:tiny-llama")


@pytest.fixture
def vision(tmp_path: Path) -> Model:
    model = parse("g (float[n,3,8,6] x) => (float[n,3,8,6] y) { y = Relu (x) }")
    set_role(model.graph.inputs[0], "pixels")
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return Model.of(model, assets={config.name: config})


def ids(data: Data) -> list[list[int]]:
    """The token ids of each calibration batch of one row."""
    assert data.calibration is not None
    return [row.tolist() for batch in data.calibration for row in batch["input_ids"]]


def lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_lines_of_json_hold_texts_messages_or_ids(decoder: Model, tmp_path: Path) -> None:
    tokenizer = Tokenizer(decoder.assets["tokenizer.json"].parent)
    records = [
        {"text": "A cat sat."},
        {"messages": [{"role": "user", "content": "A cat"}, {"role": "assistant", "content": "sat."}]},
        {"input_ids": [5, 6, 7]},
        {"tokens": [8, 9]},
        {"input_ids": []},
        {"messages": [{"content": [{"type": "text", "text": "A dog "}, {"type": "image"}, {"text": "sat."}]}, {}]},
    ]
    data = read_data(decoder, lines(tmp_path / "c.jsonl", records))
    texts = [
        tokenizer.encode("A cat sat."),
        tokenizer.encode("A dog sat."),
        tokenizer.encode("A cat\n\nsat."),
        [5, 6, 7],
        [8, 9],
    ]
    calibrated = ids(data)
    assert len(calibrated) == 2
    assert all(row in texts for row in calibrated)
    measured = [t for t in texts if t not in calibrated]
    assert sorted(data.tokens or []) == sorted(i for t in measured for i in t), "what calibrates does not measure"


def test_texts_of_all_lengths_keep_their_length(decoder: Model, tmp_path: Path) -> None:
    limit = int(decoder.provenance["max_positions"])
    records = [{"input_ids": list(range(1, 2 + i))} for i in range(0, 2 * limit, limit // 5)]
    data = read_data(decoder, lines(tmp_path / "c.jsonl", records))
    assert {len(row) for row in ids(data)} <= {min(len(r["input_ids"]), limit) for r in records}
    data = read_data(decoder, lines(tmp_path / "t.jsonl", [{"text": "A cat sat. " * 200}] * 2))
    assert {len(row) for row in ids(data)} == {256}


def test_the_choice_among_more_texts_follows_the_seed(decoder: Model, tmp_path: Path) -> None:
    file = lines(tmp_path / "c.jsonl", [{"input_ids": [i, i]} for i in range(1, 41)])
    found = [ids(read_data(decoder, file, samples=5, seed=seed)) for seed in (0, 0, 1)]
    assert len(found[0]) == 5
    assert found[0] == found[1] != found[2]


def test_token_ids_come_as_a_stream_or_as_rows(decoder: Model, tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(0, 4096, 2048)
    np.save(tmp_path / "stream.npy", stream)
    data = read_data(decoder, tmp_path / "stream.npy", samples=3)
    assert ids(data) == stream[-3 * 256 :].reshape(3, 256).tolist()
    assert data.tokens == stream[: -3 * 256].tolist()
    np.save(tmp_path / "rows.npy", stream.reshape(-1, 64))
    assert {len(row) for row in ids(read_data(decoder, tmp_path / "rows.npy"))} == {64}


def test_any_iterable_of_inputs_calibrates(vision: Model) -> None:
    batches = ({"x": np.full((1, 3, 8, 6), i, np.float32)} for i in range(4))
    data = read_data(vision, batches)
    assert data.calibration is not None
    assert [b["x"].max() for b in data.calibration] == [0, 1, 2, 3]
    assert data.tokens is None


def test_arrays_come_in_files_and_folders(vision: Model, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    np.save(folder / "b.npy", np.full((3, 8, 6), 2, np.float32))
    np.savez(folder / "a.npz", x=np.full((2, 3, 8, 6), 1, np.float32))
    (folder / "notes.txt").write_text("no sample")
    found = read_batches(folder, vision, 10, 0)
    assert [(b["x"].shape[0], b["x"].max()) for b in found] == [(2, 1), (1, 2)]
    assert [b["x"].max() for b in read_batches(folder / "a.npz", vision, 10, 0)] == [1]


def test_images_are_resized_and_normalized_as_the_preprocessor_says(vision: Model, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="images are read by Pillow")
    folder = tmp_path / "images"
    folder.mkdir()
    image.new("RGB", (20, 10), (255, 0, 51)).save(folder / "a.png")
    (found,) = read_batches(folder, vision, 10, 0)
    assert found["x"].shape == (1, 3, 8, 6)
    np.testing.assert_allclose(found["x"][0, :, 4, 3], (np.array([1, 0, 0.2]) - 0.5) / 0.25, atol=1e-6)


def test_empty_samples_say_nothing(vision: Model) -> None:
    samples = [{"x": np.zeros((0, 3, 8, 6), np.float32)}, {"x": np.ones((1, 3, 8, 6), np.float32)}]
    assert len(read_batches(samples, vision, 10, 0)) == 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "found none"),
        ([{"x": np.zeros((0, 3, 8, 6), np.float32)}], "found none"),
        ([{"x": np.full((1, 3, 8, 6), np.nan, np.float32)}], "sample 0, found NaN in 'x'"),
        ([{"z": np.ones((1, 3, 8, 6), np.float32)}], "(?s)sample 0: .*x: expected float"),
        ([np.ones(3)], "inputs by name"),
    ],
)
def test_samples_that_do_not_fit_are_refused(vision: Model, samples: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_batches(samples, vision, 10, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nno json\n', "JSON in line 2"),
        ("[1, 2]\n", "object in line 1"),
        ('{"title": "a"}\n', r"in line 1 .*found title \(str\)"),
        ("\n", "Expected text in"),
        ('{"text": "only one"}\n', "at least 2 texts"),
        ('{"text": " "}\n{"text": ""}\n{"messages": []}\n', "Expected text in .* found none"),
        ('{"text": null}\n', r"found text \(NoneType\)"),
        ('{"input_ids": [true, false]}\n', r"a list of integers.*found input_ids \(list\)"),
        ('{"input_ids": [5, -6]}\n', "token ids from 0 to .*found -6"),
        ('{"input_ids": [5, 100000]}\n', "token ids from 0 to .*found 100000"),
    ],
)
def test_lines_that_say_nothing_are_refused(decoder: Model, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_data(decoder, tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"", "found none"),
        ("c.txt", b" \n\t\n", "found none"),
        ("c.npz", b"PK no archive", "cannot be read: it is not one of numpy's"),
        ("c.npy", b"", "cannot be read: it is not one of numpy's"),
    ],
)
def test_files_without_content_are_refused(
    decoder: Model, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_data(decoder, tmp_path / name)


def test_a_model_without_tokens_wants_arrays(vision: Model, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(InputError, match="Expected arrays or images"):
        read_data(vision, tmp_path / "c.txt")
    with pytest.raises(InputError, match="found none"):
        read_data(vision, tmp_path / "missing.npz")


def test_numbers_have_the_width_of_the_model_and_must_be_of_its_kind(vision: Model) -> None:
    assert vision.signature.inputs[0].dtype == ir.DataType.FLOAT
    (found,) = read_batches([{"x": np.ones((1, 3, 8, 6))}], vision, 10, 0)
    assert found["x"].dtype == np.float32
    with pytest.raises(InputError, match="uint8"):
        read_batches([{"x": np.ones((1, 3, 8, 6), np.uint8)}], vision, 10, 0)


def test_what_follows_from_token_ids_may_be_left_out(decoder: Model) -> None:
    mask = np.array([[1, 1, 0]])
    (found,) = read_batches([{"input_ids": np.array([[5, 6, 7]], np.int32), "attention_mask": mask}], decoder, 10, 0)
    assert {p.name for p in decoder.signature.inputs} == set(found)
    assert found["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(found["attention_mask"], mask)
    np.testing.assert_array_equal(found["position_ids"], [[0, 1, 2]])


def test_what_is_calibrated_on_arrays_is_measured_on_something_else(vision: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((1, 3, 8, 6), np.float32))
    data = read_data(vision, tmp_path / "a.npy")
    assert (data.name, data.batches) == ("random inputs, calibrated on a.npy", None)
