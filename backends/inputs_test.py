from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.decoding import generate
from qc.backends.inputs import check_inputs, text_batches, text_inputs
from qc.ir.errors import InputError
from qc.ir.model import Port, Signature


def port(name: str, role: str, shape: tuple = ("batch", "seq"), dtype: ir.DataType = ir.DataType.INT64) -> Port:
    return Port(name, dtype, shape, role)


def test_inputs_are_made_by_role_and_type():
    signature = Signature(
        (
            port("a", "tokens", dtype=ir.DataType.INT32),
            port("b", "mask", ("batch", "total"), ir.DataType.FLOAT),
            port("c", "positions"),
            port("d", "token_types"),
        ),
        (),
    )
    made = text_inputs(signature, np.array([[5, 6]]), past=3)
    assert made["a"].dtype == np.int32
    np.testing.assert_array_equal(made["b"], np.ones((1, 5), np.float32))
    np.testing.assert_array_equal(made["c"], [[3, 4]])
    np.testing.assert_array_equal(made["d"], [[0, 0]])


def test_an_input_that_text_says_nothing_about_is_named():
    signature = Signature((port("ids", "tokens"), port("image", "pixels")), ())
    with pytest.raises(InputError, match="image"):
        text_inputs(signature, np.array([[1]]))


def test_a_model_without_tokens_takes_no_text():
    with pytest.raises(InputError, match="takes token ids, found one of image"):
        text_inputs(Signature((port("image", "pixels"),), ()), np.array([[1]]))


def test_texts_of_equal_length_share_a_batch_and_nothing_is_padded():
    signature = Signature((port("ids", "tokens"), port("mask", "mask")), ())
    batches = text_batches(signature, [[1], [2, 3], [4], [5, 6], [7]], size=2)
    assert [b["ids"].tolist() for b in batches] == [[[1], [4]], [[7]], [[2, 3], [5, 6]]]
    assert all(b["mask"].all() for b in batches)


def test_unknown_dimensions_take_any_size():
    signature = Signature((port("x", "other", (None, 3), ir.DataType.FLOAT),), ())
    check_inputs(signature, {"x": np.zeros((7, 3), np.float32)})
    with pytest.raises(InputError, match=r"expected float \[\?, 3\], found float32 \[7, 4\]"):
        check_inputs(signature, {"x": np.zeros((7, 4), np.float32)})


class Counting:
    """An encoder-decoder that continues a text by adding the length of the source to the last token."""

    signature = Signature(
        (port("ids", "tokens"), port("mask", "mask"), port("decoder_ids", "decoder_tokens", ("batch", "dec"))),
        (port("logits", "logits", ("batch", "dec", 50), ir.DataType.FLOAT),),
    )

    def __init__(self, **provenance):
        self.provenance = provenance

    def run(self, inputs):
        following = inputs["decoder_ids"] + inputs["ids"].shape[1]
        return {"logits": np.eye(50, dtype=np.float32)[following]}


def test_an_encoder_decoder_generates_from_its_start_token():
    model = Counting(decoder_start="1")
    assert list(generate(model, [8, 8, 8], 4)) == [4, 7, 10, 13]
    assert list(generate(model, [8, 8, 8], 9, [10])) == [4, 7]
    assert list(generate(Counting(decoder_start="1", max_positions="2"), [8, 8, 8], 9)) == [4, 7], "no more than fit"


def test_an_encoder_decoder_without_a_start_token_is_refused():
    with pytest.raises(InputError, match="decoder_start_token_id"):
        generate(Counting(), [8], 4)
