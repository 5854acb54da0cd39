"""Inputs are tried until a model runs on them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qc.ir.model import Model
from qc.ir.probe import find_inputs
from qc.ir.runtime import Session


def _found(body: str, ports: str = "float[n,4] x", out: str = "float[a,b] y"):
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({ports}) => ({out}) {{ {body} }}'
    model = Model.of(ir.serde.deserialize_model(onnx.parser.parse_model(text)))
    return find_inputs(model, Session(model).run)


def test_open_axes_take_the_first_size_that_fits():
    found = _found("s = Constant <value = int64[2] {2, 16}> ()  y = Reshape(x, s)")
    assert found.obstacle == ""
    assert found.batches[0]["x"].shape == (8, 4)
    assert found.outputs[0]["y"].shape == (2, 16)


def test_an_integer_may_be_a_shape():
    found = _found("y = Expand(x, s)", "float[3,4] x, int64[2] s")
    assert found.batches[0]["s"].tolist() == [1, 1]


def test_a_model_without_inputs_has_one_empty_batch():
    found = _found("y = Constant <value = float[1,2] {1.0, 2.0}> ()", "")
    assert found.batches == [{}]


def test_a_model_that_draws_numbers_cannot_be_compared():
    assert "random" in _found("y = RandomNormalLike(x)").obstacle


def test_a_seeming_dead_end_says_what_the_runtime_said():
    found = _found("s = Constant <value = int64[2] {7, 7}> ()  y = Reshape(x, s)", "float[3,4] x")
    assert not found.batches
    assert "Reshape" in found.obstacle


@pytest.mark.parametrize("kind", ["seq(float[a,4]) x", "optional(float[n,4]) x"])
def test_sequences_and_optionals_are_made_too(kind):
    node = "ConcatFromSequence <axis = 0>" if kind.startswith("seq") else "OptionalGetElement"
    found = _found(f"y = {node}(x)", kind)
    assert found.obstacle == ""
    assert isinstance(found.outputs[0]["y"], np.ndarray)
