"""Slices of stacked weights."""

from __future__ import annotations

import numpy as np

from qc.passes.canonicalize.linear import RecogniseLinear
from qc.passes.canonicalize.unstack import UnstackWeights

STACK = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def test_a_constant_slice_becomes_a_weight(build, keeps) -> None:
    model = build(
        "g (float[5,4] x, float[2,3,4] w) => (float[5,3] y)"
        "{ e = Constant <value = int64 {1}> () s = Gather <axis=0> (w, e) t = Transpose <perm=[1,0]> (s)"
        " y = MatMul (x, t) }",
        w=STACK,
    )
    keeps(UnstackWeights(), model, x=np.ones((5, 4), np.float32))
    keeps(RecogniseLinear(), model, x=np.ones((5, 4), np.float32))
    weight = next(iter(model.graph)).inputs[1]
    assert weight.name == "w.1"
    assert np.array_equal(weight.const_value.numpy(), STACK[1])
    assert "w" not in model.graph.initializers


def test_a_slice_chosen_at_run_time_stays(build) -> None:
    model = build(
        "g (float[5,4] x, int64 e, float[2,3,4] w) => (float[3,4] s) { s = Gather <axis=0> (w, e) }", w=STACK
    )
    result = UnstackWeights()(model)
    assert not result.modified
    assert result.sites[0].reason == "which slice is read is computed"


def test_a_stack_that_is_read_whole_too_stays(build) -> None:
    model = build(
        "g (float[5,4] x, float[2,3,4] w) => (float[3,4] s, float[2,3,4] t)"
        "{ e = Constant <value = int64 {0}> () u = Gather <axis=0> (w, e) s = Neg (u) t = Neg (w) }",
        w=STACK,
    )
    result = UnstackWeights()(model)
    assert not result.modified
    assert result.sites[0].reason == "Neg reads the stack too"
