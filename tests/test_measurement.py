"""What a compile calibrates and measures on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qc.data import read_data, shortened
from qc.ir.errors import InputError
from qc.ir.model import Model, set_role
from qc.plan import make_plan

_WORDS = ("[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four")


@pytest.fixture
def encoder(tmp_path: Path) -> Model:
    """A table of embeddings as an encoder, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> f (int64[batch,seq] ids, int64[batch,seq] mask) '
        "=> (float[batch,seq,4] h) <float[7,4] table = {" + ", ".join(["0.5"] * 28) + "}> { h = Gather(table, ids) }"
    )
    set_role(model.graph.inputs[0], "tokens")
    set_role(model.graph.inputs[1], "mask")
    set_role(model.graph.outputs[0], "hidden")
    held = Model.of(model, assets={"tokenizer.json": tmp_path / "tokenizer.json"})
    held.record(max_positions=4)
    return held


def test_the_lines_of_a_text_are_sentences_and_no_line_serves_twice(encoder: Model, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four\none\n\ntwo\nthree four\nfour\n")
    data = read_data(encoder, text)
    assert data.batches is not None
    assert data.calibration is not None
    measured = sorted(row for b in data.batches for row in b["ids"].tolist())
    calibrated = sorted(row for b in data.calibration for row in b["ids"].tolist())
    assert measured == [[1, 3, 2], [1, 3, 4, 5]], "cut to the four positions that the model has"
    assert calibrated == [[1, 5, 6, 2], [1, 6, 2]]
    assert all(np.all(b["mask"] == 1) for b in data.calibration)
    assert data.tokens is None


def test_records_are_sentences_too_and_a_stream_of_ids_is_cut_into_texts(encoder: Model, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "one two"}\n' * 2)
    np.save(tmp_path / "c.npy", np.array([3, 4, 5, 6] * 128))
    for name, row in (("c.jsonl", [1, 3, 4, 2]), ("c.npy", [3, 4, 5, 6])):
        data = read_data(encoder, tmp_path / name)
        for batches in (data.batches, data.calibration):
            assert batches is not None
            assert [b["ids"].tolist() for b in batches] == [[row]]


def test_a_simulator_gets_a_few_rows_of_what_has_rows(encoder: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two\n" * 24)
    data = read_data(encoder, tmp_path / "text.txt")
    plan = make_plan(encoder, [])
    rows = shortened(data, encoder.signature, plan).batches or ()
    assert [batch["ids"].tolist() for batch in rows] == [[[1, 3, 4, 2]]] * 4
    encoder.graph.inputs[1].shape = ir.Shape([12, 4])
    assert shortened(data, encoder.signature, plan).batches == data.batches, "twelve rows are what it takes"


def test_one_line_is_too_few(encoder: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two\n\n")
    with pytest.raises(InputError, match="at least 2 lines"):
        read_data(encoder, tmp_path / "text.txt")


def test_without_a_text_inputs_are_random(encoder: Model) -> None:
    data = read_data(encoder, None)
    assert (data.name, data.batches, data.calibration) == ("random inputs", None, None)
