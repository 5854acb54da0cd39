from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends import scores
from qc.backends.evaluate import KEYS, evaluate
from qc.backends.inputs import text_batches, text_inputs
from qc.backends.reference import ModelRunner
from qc.ir.errors import InputError
from qc.ir.model import Port, Signature
from qc.ir.pooling import embedding
from qc.ir.text import parse


class Scripted:
    """A runner that yields the logits it was given, row by token."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)
        self.provenance: dict[str, str] = {}
        self.seen: list[list[int]] = []
        self.signature = Signature(
            (Port("ids", ir.DataType.INT64, ("batch", "seq"), "tokens"),),
            (Port("logits", ir.DataType.FLOAT, ("batch", "seq", table.shape[1]), "logits"),),
        )

    def run(self, inputs):
        self.seen.append(inputs["ids"][0].tolist())
        return {"logits": self.table[inputs["ids"]]}

    def generate(self, tokens, max_tokens, stop=()):
        raise AssertionError


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    found = evaluate(Scripted(np.zeros((10, 10))), text_tokens=[0, *range(1, 9)], window=3)
    assert found["ppl"] == pytest.approx(10)
    assert found["kl"] is None


def test_windows_do_not_overlap_and_their_first_token_is_not_scored():
    runner = Scripted(np.zeros((10, 10)))
    found = evaluate(runner, text_tokens=range(10), window=3, windows=2)
    assert runner.seen == [[0, 1, 2], [3, 4, 5]]
    assert (found["tokens"], found["window"], found["windows"]) == (4, 3, 2)


def test_the_figures_are_those_of_a_hand_worked_case():
    # After token 0 the reference gives (1/2, 1/4, 1/4), the artifact (1/4, 1/2, 1/4); the text is 0 0.
    reference = Scripted(np.log([[2.0, 1, 1], [1, 1, 1], [1, 1, 1]]))
    runner = Scripted(np.log([[1.0, 2, 1], [1, 1, 1], [1, 1, 1]]))
    found = evaluate(runner, reference, text_tokens=[0, 0], window=2)
    assert found["ppl"] == pytest.approx(4)
    assert found["ppl_reference"] == pytest.approx(2)
    assert found["kl"] == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert found["top1"] == 0


def test_a_model_against_itself_has_no_divergence(build):
    runner = ModelRunner(build("appending"), threads=1)
    found = evaluate(runner, runner, text_tokens=list(range(40)), window=16)
    assert (found["kl"], found["top1"], found["ppl"]) == (0, 1, found["ppl_reference"])


def test_the_kind_of_cache_does_not_change_the_figures(build):
    plain, cached = (ModelRunner(build(kind), threads=1) for kind in ("plain", "appending"))
    found = evaluate(cached, plain, text_tokens=list(range(40)), window=16)
    assert found["kl"] == pytest.approx(0, abs=1e-9)


def test_chunks_of_logits_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 10, 40).tolist()
    pair = [Scripted(rng.standard_normal((10, 10))) for _ in range(2)]
    whole = evaluate(*pair, text_tokens=tokens, window=20)
    monkeypatch.setattr(scores, "_CHUNK_BYTES", 8 * 10 * 3)
    parts = evaluate(*pair, text_tokens=tokens, window=20)
    for key in ("ppl", "ppl_reference", "kl", "top1"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-12)


def test_a_token_that_both_exclude_does_not_spoil_the_divergence():
    table = np.zeros((3, 3))
    table[:, 2] = -np.inf
    assert evaluate(Scripted(table), Scripted(table), text_tokens=[0, 1], window=2)["kl"] == 0


def test_a_window_is_no_longer_than_the_context_of_the_model():
    runner = Scripted(np.zeros((10, 10)))
    runner.provenance["max_positions"] = "4"
    assert evaluate(runner, text_tokens=range(9), window=256)["window"] == 4


def test_a_short_text_is_one_short_window():
    found = evaluate(Scripted(np.zeros((4, 4))), text_tokens=[0, 1, 2])
    assert (found["window"], found["windows"], found["tokens"]) == (3, 1, 2)


def test_every_evaluation_has_the_same_keys(build):
    encoder = ModelRunner(build("encoder"), threads=1)
    arrays = evaluate(encoder, encoder, inputs=text_batches(encoder.signature, [[1, 2]]))
    text = evaluate(Scripted(np.zeros((4, 4))), text_tokens=[0, 1, 2])
    assert tuple(arrays) == tuple(text) == KEYS


def test_equal_outputs_have_cosine_one_and_no_noise(build):
    runner = ModelRunner(build("encoder"), threads=1)
    found = evaluate(runner, runner, inputs=text_batches(runner.signature, [[1, 2], [3, 4, 5]]))
    assert (found["cosine"], found["cosine_min"], found["sqnr_db"], found["max_abs"]) == (1, 1, math.inf, 0)


def test_an_output_without_elements_is_left_out():
    model = parse("f (float[n,0] x, float[n,2] z) => (float[n,0] y, float[n,2] t) { y = Relu (x)  t = Relu (z) }")
    runner, batch = ModelRunner(model, threads=1), {"x": np.zeros((2, 0), np.float32), "z": np.ones((2, 2), np.float32)}
    assert evaluate(runner, runner, inputs=[batch])["cosine"] == 1


def test_the_error_of_an_output_is_measured_per_row(build):
    model, other = build("encoder"), build("encoder")
    weight = other.graph.initializers["wq"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * 0.5, name="wq")
    runner, reference = ModelRunner(other, threads=1), ModelRunner(model, threads=1)
    batch = text_inputs(model.signature, np.array([[1, 2, 3]]))
    a, b = (r.run(batch)["last_hidden_state"][0].astype(np.float64) for r in (reference, runner))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = evaluate(runner, reference, inputs=[batch])
    assert found["cosine"] == pytest.approx(cosines.mean())
    assert found["cosine_min"] == pytest.approx(cosines.min())
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert found["outputs"].keys() == {"last_hidden_state"}


class Answering:
    """An encoder-decoder that yields the logits it was given, row by the decoder's token."""

    def __init__(self, table: np.ndarray, *, masked: bool = False) -> None:
        self.table = table.astype(np.float32)
        self.provenance: dict[str, str] = {}
        roles = ("tokens", "decoder_tokens", *(["decoder_mask"] if masked else []))
        self.signature = Signature(
            tuple(Port(role, ir.DataType.INT64, ("batch", role), role) for role in roles),
            (Port("logits", ir.DataType.FLOAT, ("batch", "target", table.shape[1]), "logits"),),
        )

    def run(self, inputs):
        return {"logits": self.table[inputs["decoder_tokens"]]}

    def generate(self, tokens, max_tokens, stop=()):
        raise AssertionError


def test_an_encoder_decoder_is_scored_on_what_its_decoder_reads_behind_the_first_token():
    # After 0 the reference gives (1/2, 1/4, 1/4), the artifact (1/4, 1/2, 1/4); after 1 both know nothing.
    tables = np.log([[1.0, 2, 1], [1, 1, 1], [1, 1, 1]]), np.log([[2.0, 1, 1], [1, 1, 1], [1, 1, 1]])
    runner, reference = (Answering(table) for table in tables)
    batch = text_inputs(runner.signature, np.array([[2, 2, 2]]), decoder=np.array([[0, 1, 2]]))
    found = evaluate(runner, reference, inputs=[batch])
    assert found["tokens"] == 2
    assert found["ppl"] == pytest.approx(math.sqrt(2 * 3))
    assert found["ppl_reference"] == pytest.approx(math.sqrt(4 * 3))
    assert found["kl"] == pytest.approx(0.25 * math.log(2) / 2, rel=1e-6)
    assert found["top1"] == 0.5
    assert found["outputs"].keys() == {"logits"}
    assert evaluate(runner, inputs=[batch])["ppl"] == found["ppl"], "which needs no reference"


def test_what_the_mask_of_a_decoder_leaves_out_is_not_scored():
    runner = Answering(np.log([[1.0, 2, 1], [1, 1, 1], [1, 1, 1]]), masked=True)
    batch = text_inputs(runner.signature, np.array([[2]]), decoder=np.array([[0, 1, 2], [0, 1, 1]]))
    batch["decoder_mask"][1, 2] = 0
    found = evaluate(runner, runner, inputs=[batch])
    assert found["tokens"] == 3
    assert found["ppl"] == pytest.approx((2 * 3 * 2) ** (1 / 3))


def test_padding_is_not_compared(build):
    model, other = build("encoder"), build("encoder")
    table = other.graph.initializers["embed"]
    changed = table.const_value.numpy().copy()
    changed[7] += 1
    table.const_value = ir.tensor(changed, name="embed")
    batch = text_inputs(model.signature, np.array([[1, 7]]))
    batch["attention_mask"][:, 1] = 0
    found = evaluate(ModelRunner(other, threads=1), ModelRunner(model, threads=1), inputs=[batch])
    assert found["cosine_min"] == 1


def test_a_sentence_encoder_is_judged_by_its_embeddings(build):
    model, other = build("encoder"), build("encoder", 1)
    for m in (model, other):
        m.record(pooling="mean", normalize="true")
    runner, reference = ModelRunner(other, threads=1), ModelRunner(model, threads=1)
    batch = text_inputs(model.signature, np.array([[1, 2, 3]]))
    a, b = (embedding(r.run(batch)["last_hidden_state"], batch["attention_mask"], "mean") for r in (reference, runner))
    found = evaluate(runner, reference, inputs=[batch])
    assert found["outputs"].keys() == {"embedding"}
    assert found["cosine"] == pytest.approx(float((a * b).sum()))


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [2, 3]), ("max", [3, 4]), ("cls", [1, 2]), ("lasttoken", [3, 4])]
)
def test_poolings_look_only_at_tokens(pooling, expected):
    hidden = np.array([[[1.0, 2], [3, 4], [100, 100]]])
    mask = np.array([[1, 1, 0]])
    found = embedding(hidden, mask, pooling, normalize=False)
    np.testing.assert_allclose(found, [expected])
    assert np.linalg.norm(embedding(hidden, mask, pooling)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a text or arrays"),
        ({"text_tokens": [1, 2], "inputs": []}, "either a text or arrays"),
        ({"text_tokens": [1]}, "at least 2 tokens"),
        ({"text_tokens": [1, 2, 3], "window": 1}, "windows of at least 2"),
        ({"inputs": []}, "a reference"),
    ],
)
def test_what_cannot_be_evaluated_is_an_input_error(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(Scripted(np.zeros((4, 4))), **arguments)


def test_models_of_different_vocabulary_are_not_compared():
    with pytest.raises(InputError, match="equal shape"):
        evaluate(Scripted(np.zeros((4, 4))), Scripted(np.zeros((4, 5))), text_tokens=[0, 1, 2])


def test_an_encoder_has_no_perplexity(build):
    with pytest.raises(InputError, match="last_hidden_state"):
        evaluate(ModelRunner(build("encoder"), threads=1), text_tokens=[0, 1, 2])
