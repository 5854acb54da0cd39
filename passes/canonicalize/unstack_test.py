"""Slices of stacked weights."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.simplify import drop_identities, infer_shapes
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
    model = build("g (float[5,4] x, int64 e, float[2,3,4] w) => (float[3,4] s) { s = Gather <axis=0> (w, e) }", w=STACK)
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


def test_a_stack_in_half_precision_is_cut_before_it_is_decoded(build, keeps) -> None:
    model = build(
        "g (float[3,4] x, float16[2,3,4] h) => (float[3,4] y) { w = Cast <to = 1> (h)"
        " first = Constant <value = int64 {0}> () last = Constant <value = int64 {-1}> ()"
        " a = Gather <axis=0> (w, first) b = Gather <axis=0> (w, last) p = Mul (x, a) y = Add (p, b) }",
        h=STACK.astype(np.float16),
    )
    keeps(UnstackWeights(), model, x=np.ones((3, 4), np.float32))
    assert set(model.graph.initializers) == {"h.0", "h.1"}
    assert [n.op_type for n in model.graph].count("Cast") == 2


def test_one_slice_read_twice_is_stored_once(build, keeps) -> None:
    model = build(
        "g (float[3,4] x, float[2,3,4] w) => (float[3,4] y) { e = Constant <value = int64 {0}> ()"
        " a = Gather <axis=0> (w, e) b = Gather <axis=0> (w, e) p = Add (x, a) y = Mul (p, b) }",
        w=STACK,
    )
    keeps(UnstackWeights(), model, x=np.ones((3, 4), np.float32))
    assert set(model.graph.initializers) == {"w.0"}


@pytest.mark.parametrize("half", [False, True])
def test_parts_of_a_split_become_weights(build, keeps, half) -> None:
    """Those of queries and of keys and values, which torch keeps in one."""
    w, b = np.arange(24, dtype=np.float32).reshape(6, 4), np.arange(6, dtype=np.float32)
    model = build(
        "g (float[5,4] x, float[6,4] w, float[6] b) => (float[5,2] y, float[5,4] z)"
        "{ n = Constant <value = int64[2] {2, 4}> ()"
        + ("d = Cast <to = 1> (w) " if half else "d = Identity (w) ")
        + "q, k = Split <axis=0> (d, n) qb, kb = Split <axis=0> (b, n) u = Transpose <perm=[1,0]> (q)"
        " v = Transpose <perm=[1,0]> (k) s = MatMul (x, u) t = MatMul (x, v) y = Add (s, qb) z = Add (t, kb) }",
        w=w.astype(np.float16) if half else w,
        b=b,
    )
    infer_shapes(model)
    drop_identities(model)
    keeps(UnstackWeights(), model, x=np.ones((5, 4), np.float32))
    keeps(RecogniseLinear(), model, x=np.ones((5, 4), np.float32))
    assert set(model.graph.initializers) >= {"w.0", "w.1"}
    assert not {"w", "b"} & set(model.graph.initializers)
    assert [n.op_type for n in model.graph if n.op_type in ("Split", "Linear")] == ["Linear", "Linear"]


def test_a_split_of_a_stack_that_something_else_reads_stays(build) -> None:
    model = build(
        "g (float[6,4] x, float[6,4] w) => (float[2,4] y, float[4,4] z, float[6,4] t)"
        "{ n = Constant <value = int64[2] {2, 4}> () q, k = Split <axis=0> (w, n)"
        " y = Neg (q) z = Neg (k) t = Add (x, w) }",
        w=np.ones((6, 4), np.float32),
    )
    infer_shapes(model)
    assert not UnstackWeights()(model).modified
