from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.passes.canonicalize.linear import RecogniseLinear
from qc.passes.canonicalize.stacks import SplitStacks

_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((5, 4)).astype(np.float32)
_STACK = _RNG.standard_normal((3, 6, 4)).astype(np.float32)

_EXPERTS = (
    "one = Constant <value = int64 {1}> () last = Constant <value = int64 {-1}> () "
    "a = Gather <axis = 0> (s, one) b = Gather <axis = 0> (s, last) "
    "at = Transpose <perm = [1, 0]> (a) bt = Transpose <perm = [1, 0]> (b) "
    "p = MatMul (x, at) q = MatMul (x, bt) y = Add (p, q)"
)


def _ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type != "Constant"]


def test_each_expert_gets_a_weight_of_its_own(build, keeps):
    model = build(f"g (float[5,4] x, float[3,6,4] s) => (float[5,6] y) {{ {_EXPERTS} }}", s=_STACK)
    keeps(SplitStacks(), model, x=_X)
    assert "Gather" not in _ops(model)
    assert set(model.graph.initializers) == {"s.1", "s.2"}
    np.testing.assert_array_equal(model.graph.initializers["s.2"].const_value.numpy(), _STACK[2])
    keeps(RecogniseLinear(), model, x=_X)
    assert _ops(model) == ["Linear", "Linear", "Add"]


def test_a_stack_in_half_precision_is_cut_before_it_is_decoded(build, keeps):
    text = f"g (float[5,4] x, float16[3,6,4] h) => (float[5,6] y) {{ s = Cast <to = 1> (h) {_EXPERTS} }}"
    model = build(text, h=_STACK.astype(np.float16))
    keeps(SplitStacks(), model, x=_X)
    assert set(model.graph.initializers) == {"h.1", "h.2"}
    assert _ops(model).count("Cast") == 2


def test_one_entry_read_twice_is_stored_once(build, keeps):
    model = build(
        "g (float[6,4] x, float[3,6,4] s) => (float[6,4] y) { i = Constant <value = int64 {0}> () "
        "a = Gather <axis = 0> (s, i) b = Gather <axis = 0> (s, i) p = Add (x, a) y = Mul (p, b) }",
        s=_STACK,
    )
    keeps(SplitStacks(), model, x=_STACK[1])
    assert set(model.graph.initializers) == {"s.0"}


def test_a_stack_that_is_read_as_a_whole_stays(build, keeps):
    model = build(
        "g (float[6,4] x, float[3,6,4] s) => (float[3,6,4] y) { i = Constant <value = int64 {0}> () "
        "a = Gather <axis = 0> (s, i) p = Add (x, a) y = Mul (s, p) }",
        s=_STACK,
    )
    (site,) = keeps(SplitStacks(), model, x=_STACK[1]).sites
    assert "Mul reads the whole stack" in site.reason


def test_look_ups_of_several_rows_and_of_inputs_stay(build, keeps):
    model = build(
        "g (int64[2] i, float[3,6,4] s, float[3,4] x) => (float y, float z) { a = Gather <axis = 0> (s, i) "
        "y = Relu (a) k = Constant <value = int64 {0}> () z = Gather <axis = 0> (x, k) }",
        s=_STACK,
    )
    assert not keeps(SplitStacks(), model, i=np.array([2, 0]), x=_X[:3]).sites
