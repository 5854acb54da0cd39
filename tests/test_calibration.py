"""Calibration data in every form that is read, and the forms that are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from architectures import exported

from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.backends.tokenizer import Tokenizer
from qc.calibration import read_batches
from qc.data import Data, read_data
from qc.frontend import load
from qc.ir.errors import InputError
from qc.ir.model import Model, set_role
from qc.ir.text import parse


@pytest.fixture(scope="module")
def decoder() -> Model:
    return load("builtin:tiny-llama")


@pytest.fixture
def translator(tmp_path: Path) -> Model:
    """An encoder-decoder that always adds the last word of the source to what it said last, from 0, modulo 8."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("[PAD]", "[EOS]", *"abcdef"))}, "[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    source = tmp_path / "translator"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "config.json").write_text(json.dumps({"decoder_start_token_id": 0, "eos_token_id": 1}))
    text = """g (int64[batch,seq] input_ids, int64[batch,target] decoder_input_ids) => (float[batch,target,8] logits) {
        first = Constant <value_ints = [-2]> ()  last = Constant <value_ints = [-1]> ()
        axis = Constant <value_ints = [1]> ()  eight = Constant <value_int = 8> ()
        word = Slice(input_ids, first, last, axis)
        a = Gather(numbers, word)  b = Gather(numbers, decoder_input_ids)
        sum = Add(a, b)  next = Mod(sum, eight)  logits = Gather(table, next)
    }"""
    model = parse(text, weights={"numbers": np.arange(8), "table": 4 * np.eye(8, dtype=np.float32)})
    ir.save(model, source / "model.onnx")
    return load(source)


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


def test_marks_and_ends_of_lines_of_other_systems_are_no_text(decoder: Model, tmp_path: Path) -> None:
    lines(tmp_path / "unix.jsonl", [{"text": "A cat sat."}, {"text": "A dog."}])
    text = (tmp_path / "unix.jsonl").read_text()
    (tmp_path / "other.JSONL").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert ids(read_data(decoder, tmp_path / "other.JSONL")) == ids(read_data(decoder, tmp_path / "unix.jsonl"))


def test_any_iterable_of_inputs_calibrates(vision: Model) -> None:
    batches = ({"x": np.full((1, 3, 8, 6), i, np.float32)} for i in range(4))
    data = read_data(vision, batches)
    assert [len(part or ()) for part in (data.batches, data.calibration)] == [2, 2]
    assert {b["x"].max() for part in (data.batches, data.calibration) for b in part or ()} == {0, 1, 2, 3}
    assert (data.name, data.tokens) == ("given inputs", None)


def test_of_many_arrays_some_measure_and_as_many_calibrate_as_are_asked_for(vision: Model) -> None:
    batches = [{"x": np.full((1, 3, 8, 6), i, np.float32)} for i in range(100)]
    data, again = (read_data(vision, batches, samples=40, seed=3) for _ in range(2))
    measured, calibration = ([b["x"].max() for b in part or ()] for part in (data.batches, data.calibration))
    assert (len(measured), len(calibration)) == (32, 40)
    assert not set(measured) & set(calibration)
    assert [b["x"].max() for b in again.batches or ()] == measured


def test_a_decoder_that_is_calibrated_on_arrays_is_measured_on_its_text(decoder: Model) -> None:
    data = read_data(decoder, [{"input_ids": [i, i]} for i in range(1, 5)])
    assert ids(data) == [[i, i] for i in range(1, 5)]
    assert data.name == "sample.txt, calibrated on given inputs"


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
        ([np.ones(3)], "arrays by the names of inputs"),
    ],
)
def test_samples_that_do_not_fit_are_refused(vision: Model, samples: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_batches(samples, vision, 10, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nno json\n', "JSON object in line 2"),
        ("[1, 2]\n", "JSON object in line 1"),
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
        ("c.txt", "text".encode("utf-16"), "UTF-8 text"),
        ("c.jsonl", b'{"text": "a"}\n\xff', "JSON object in line 2"),
        ("c.npz", b"PK no archive", "cannot be read"),
        ("c.npy", b"", "cannot be read: it is not one of numpy's"),
        ("c.npy", b"PK no archive", "cannot be read: it is not one of numpy's"),
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


def test_a_folder_without_samples_says_what_it_holds(vision: Model, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for names in ("nothing", "a.txt, b.JSONL"):
        with pytest.raises(InputError, match=f"images in .*folder, found {names}. A text is given as a file"):
            read_batches(folder, vision, 10, 0)
        (folder / "a.txt").write_text("a")
        (folder / "b.JSONL").write_text("a")


def test_arrays_under_the_name_of_the_other_kind_are_refused(vision: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    (tmp_path / "arrays.npz").rename(tmp_path / "a.npy")
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "b.NPZ")
    with pytest.raises(InputError, match=r"Call the file \.npz"):
        read_batches(tmp_path / "a.npy", vision, 10, 0)
    with pytest.raises(InputError, match="a single array without a name"):
        read_batches(tmp_path / "b.NPZ", vision, 10, 0)


def test_one_sample_needs_no_list_and_no_axis_for_a_batch(decoder: Model) -> None:
    (found,) = read_batches({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]}, decoder, 10, 0)
    np.testing.assert_array_equal(found["input_ids"], [[5, 6, 7]])
    np.testing.assert_array_equal(found["attention_mask"], [[1, 1, 0]])
    for wrong in (-1, 4096):
        with pytest.raises(InputError, match=f"token ids from 0 to 4095 in calibration sample 0, found {wrong}"):
            read_batches([{"input_ids": [5, wrong]}], decoder, 10, 0)


def test_half_a_character_is_read_as_a_sign_of_replacement(decoder: Model, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "A \\ud83d cat"}\n' * 2)
    tokenizer = Tokenizer(decoder.assets["tokenizer.json"].parent)
    assert ids(read_data(decoder, tmp_path / "c.jsonl")) == [tokenizer.encode("A \N{REPLACEMENT CHARACTER} cat")]


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


def pairs(batches: Sequence[Mapping[str, np.ndarray]] | None) -> list[tuple[list[int], list[int]]]:
    """What the encoder and the decoder read, row by row."""
    inputs = ("input_ids", "decoder_input_ids")
    return sorted(
        (source.tolist(), read.tolist())
        for batch in batches or ()
        for source, read in zip(*(batch[name] for name in inputs), strict=True)
    )


def test_a_decoder_beside_an_encoder_reads_the_target_behind_its_start_token(translator: Model, tmp_path: Path) -> None:
    records = [
        {"text": "a b", "target": "c d"},
        {"input_ids": [3, 1], "labels": [5, 6, 7, 1]},
        {"text": "", "target": "a"},
    ]
    data = read_data(translator, lines(tmp_path / "c.jsonl", [*records, {"text": "a", "target": " "}]))
    whole = {(2, 3, 1): [0, 4, 5, 1], (3, 1): [0, 5, 6, 7, 1]}
    (source, read), *more = pairs(data.calibration)
    assert not more
    assert read == whole.pop(tuple(source))[:-1], "the last token is what it says, and never read"
    assert pairs(data.batches) == [(list(s), w) for s, w in whole.items()], "where it is read, it is scored"
    assert data.tokens is None


def test_sources_without_targets_are_answered_by_the_float_model(translator: Model, tmp_path: Path) -> None:
    (tmp_path / "sources.txt").write_text("a b\n\nc d\na\n", encoding="utf-8-sig")
    data = read_data(translator, tmp_path / "sources.txt")
    assert data.name == "sources.txt, answered by the float model"
    assert pairs(data.batches) == [([2, 3, 1], [0, 3, 6, 1])]
    assert pairs(data.calibration) == [([2, 1], [0, *[2, 4, 6, 0] * 16][:-1])], "64 tokens, as none ends it"


def test_the_targets_of_an_encoder_decoder_are_scored(translator: Model, tmp_path: Path) -> None:
    records = [{"text": "a b", "target": "b e"}] * 2
    data = read_data(translator, lines(tmp_path / "c.jsonl", records))
    runner = ModelRunner(translator, threads=1)
    found = evaluate(runner, runner, inputs=data.batches)
    assert found["tokens"] == 3, "the last one ends the text"
    assert found["ppl"] == pytest.approx((math.exp(4) + 7) / math.exp(4))
    assert (found["kl"], found["top1"]) == (0, 1)


def test_arrays_of_an_encoder_decoder_may_leave_out_what_follows(translator: Model) -> None:
    (found,) = read_batches([{"input_ids": [[2, 1]], "decoder_input_ids": [[0, 5]]}], translator, 10, 0)
    assert pairs([found]) == [([2, 1], [0, 5])]
    with pytest.raises(InputError, match="decoder_input_ids: expected int64"):
        read_batches([{"input_ids": [[2, 1]]}], translator, 10, 0)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "target": "b"}], "at least 2 texts"),
        ([{"text": "a", "target": "b"}, {"text": "a"}], "target .* in line 2"),
        ([{"text": "a", "target": None}], r"target \(a string\) or labels .*found text \(str\), target \(NoneType\)"),
        ([{"text": "a", "labels": [[1, 2]]}], r"found text \(str\), labels \(list\)"),
        ([{"text": "a", "labels": [2, -100]}] * 2, "token ids from 0 to 7 .*found -100"),
        ([{"text": "a", "labels": [2, 8]}] * 2, "token ids from 0 to 7 .*found 8"),
        ([{"target": "a"}], r"Expected text \(a string\)"),
        ([{"text": " ", "target": "a"}], "found none"),
    ],
)
def test_pairs_that_say_nothing_are_refused(
    translator: Model, tmp_path: Path, records: list[object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_data(translator, lines(tmp_path / "c.jsonl", records))


def test_an_encoder_decoder_that_does_not_say_how_texts_start_is_not_given_any(
    translator: Model, tmp_path: Path
) -> None:
    file = lines(tmp_path / "c.jsonl", [{"text": "a", "target": "b"}] * 2)
    del translator.metadata_props["qc.decoder_start"]
    with pytest.raises(InputError, match=r"decoder_start_token_id in the config\.json"):
        read_data(translator, file)
    translator.assets["sample.txt"] = file
    assert read_data(translator, None).name == "random inputs"


@pytest.mark.slow
def test_the_perplexity_of_targets_is_that_of_transformers(models: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the models come from transformers")
    import torch

    directory, model = exported("t5", models)
    rng = np.random.default_rng(0)
    records = [
        {"input_ids": rng.integers(2, 128, n).tolist(), "labels": [*rng.integers(2, 128, m).tolist(), 1]}
        for n, m in ((5, 3), (5, 3), (7, 1), (4, 6))
    ]
    data = read_data(model, lines(tmp_path / "c.jsonl", records))
    found = evaluate(ModelRunner(model, threads=1), inputs=data.batches)
    measured = [tuple(source) for source, _ in pairs(data.batches)]
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(directory).eval()
    total = 0.0
    for record in records:
        if tuple(record["input_ids"]) in measured:
            given = {name: torch.tensor([values]) for name, values in record.items()}
            total += len(record["labels"]) * theirs(**given).loss.item()
    assert found["tokens"] == sum(len(r["labels"]) for r in records if tuple(r["input_ids"]) in measured)
    assert math.log(found["ppl"]) * found["tokens"] == pytest.approx(total, rel=1e-5)
