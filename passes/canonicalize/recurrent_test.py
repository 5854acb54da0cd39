"""Weights of recurrent layers."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.recurrent import direction_weights, is_stack
from qc.passes.canonicalize.recurrent import RecogniseRecurrent

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 2, 3), np.float32)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_a_stored_stack_becomes_a_matrix_for_each_direction(build, keeps) -> None:
    w, r = values(2, 8, 3), values(2, 8, 2)
    model = build(
        "g (float[4,2,3] x, float[2,8,3] w, float[2,8,2] r) => (float[4,2,2,2] y)"
        '{ y = LSTM <hidden_size = 2, direction = "bidirectional"> (x, w, r) }',
        w=w,
        r=r,
    )
    keeps(RecogniseRecurrent(), model, x=X)
    layer = next(n for n in model.graph if n.op_type == "LSTM")
    for slot, stack in ((1, w), (2, r)):
        for weight, matrix in zip(direction_weights(layer.inputs[slot]), stack, strict=True):
            assert np.array_equal(weight.numpy(), matrix)
    assert all(is_stack(node) for node in model.graph if node is not layer)


def test_gates_in_another_order_are_read_from_the_parameters_they_are_made_of(build, keeps) -> None:
    """As exporters of PyTorch write a GRU: its update gate comes second, its biases are two vectors."""
    order = "".join(
        f"{n}1 = Slice ({n}, zero, two, zero)  {n}2 = Slice ({n}, two, four, zero)  {n}3 = Slice ({n}, four, six, zero)"
        f"  {n}4 = Concat <axis = 0> ({n}2, {n}1, {n}3)  "
        for n in "wrbc"
    )
    held = {n: values(6, *shape) for n, shape in {"w": (3,), "r": (2,), "b": (), "c": ()}.items()}
    model = build(
        "g (float[4,2,3] x, float[6,3] w, float[6,2] r, float[6] b, float[6] c) => (float[1,2,2] h) {"
        "zero = Constant <value_ints = [0]> ()  two = Constant <value_ints = [2]> ()"
        f"four = Constant <value_ints = [4]> ()  six = Constant <value_ints = [6]> ()  {order}"
        "W = Unsqueeze (w4, zero)  R = Unsqueeze (r4, zero)  d = Concat <axis = 0> (b4, c4)  B = Unsqueeze (d, zero)"
        "y, h = GRU <hidden_size = 2, linear_before_reset = 1> (x, W, R, B) }",
        **held,
    )
    keeps(RecogniseRecurrent(), model, x=X)
    weights = model.graph.initializers
    assert np.array_equal(weights["w"].const_value.numpy(), held["w"][[2, 3, 0, 1, 4, 5]])
    assert {n.op_type for n in model.graph} - {"Constant"} == {"Unsqueeze", "GRU"}


@pytest.mark.parametrize("how", ["is an input", "is computed"])
def test_a_weight_that_is_no_constant_stays(build, how: str) -> None:
    weight = "w" if how == "is an input" else "abs"
    model = build(
        "g (float[4,2,3] x, float[1,2,3] w, float[1,2,2] r) => (float[4,1,2,2] y)"
        f"{{ abs = Abs (w)  y = RNN <hidden_size = 2> (x, {weight}, r) }}",
        r=values(1, 2, 2),
    )
    result = RecogniseRecurrent()(model)
    assert not result.modified
    assert result.sites[0].reason == f"its weight '{weight}' is computed"
