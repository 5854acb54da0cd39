from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.ir.quant import read_weight
from qc.passes.canonicalize.fold import FoldConstants

_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((2, 3, 4)).astype(np.float32)
_W = _RNG.standard_normal((4, 4)).astype(np.float32)


def _ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_constant_expressions_are_computed(build, keeps):
    model = build(
        "g (float[2,3,4] x) => (float[2,12] y) { a = Constant <value = int64[1] {4}> () "
        "b = Constant <value = int64[1] {3}> () n = Mul (a, b) two = Constant <value = int64[1] {2}> () "
        "s = Concat <axis = 0> (two, n) y = Reshape (x, s) }"
    )
    keeps(FoldConstants(), model, x=_X)
    assert _ops(model) == ["Reshape"]


def test_transpose_and_cast_of_a_weight_stay(build, keeps):
    model = build(
        "g (float[2,3,4] x, float16[4,4] w) => (float y) "
        "{ c = Cast <to = 1> (w) t = Transpose <perm = [1, 0]> (c) y = MatMul (x, t) }",
        w=_W.astype(np.float16),
    )
    keeps(FoldConstants(), model, x=_X)
    assert _ops(model) == ["Cast", "Transpose", "MatMul"]
    assert "w" in model.graph.initializers


def test_a_small_weight_that_a_node_holds_becomes_one_that_the_graph_holds(build, keeps):
    model = build(
        "g (float[1,1,h,4] x) => (float y) { w = Constant <value = float[1,1,1,2] {1.0, -2.0}> () y = Conv (x, w) }"
    )
    keeps(FoldConstants(), model, x=_X[None, :1])
    assert [read_weight(n.inputs[1]).shape for n in model.graph] == [(1, 1, 1, 2)]


def test_equal_parameters_are_not_merged(build, keeps):
    gain = np.ones(4, np.float32)
    text = "g (float[2,3,4] x, float[4] a, float[4] b) => (float y) { h = Mul (x, a) y = Mul (h, b) }"
    model = build(text, a=gain, b=gain)
    result = keeps(FoldConstants(), model, x=_X)
    assert not result.modified
    assert set(model.graph.initializers) == {"a", "b"}


def test_no_ops_disappear_and_the_output_keeps_its_name(build, keeps):
    model = build(
        "g (float[2,3,4] x) => (float[2,3,4] y) { one = Constant <value = float {1.0}> () r = Relu (x) "
        "m = Mul (r, one) zero = Constant <value = int64[1] {0}> () far = Constant <value = int64[1] "
        "{9223372036854775807}> () "
        "s = Slice (m, zero, far, zero) c = Cast <to = 1> (s) y = Transpose <perm = [0, 1, 2]> (c) }"
    )
    result = keeps(FoldConstants(), model, x=_X)
    assert result.modified
    assert _ops(model) == ["Relu"]
    assert model.graph.outputs[0].name == "y"


def test_a_resize_to_the_sizes_that_an_image_has_disappears(build, keeps):
    """As of position embeddings, at the size that they were made for; not one that enlarges a part."""
    crop = 'coordinate_transformation_mode = "tf_crop_and_resize"'
    model = build(
        "g (float[1,2,3,4] x) => (float[1,2,3,4] y, float[1,2,3,4] z) "
        "{ n = Constant <value = int64[4] {1, 2, 3, 4}> () "
        "part = Constant <value = float[8] {0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5}> () "
        'same = Resize <mode = "cubic"> (x, , , n) y = Relu (same) '
        f'cut = Resize <mode = "linear", {crop}> (x, part, , n) z = Relu (cut) }}'
    )
    keeps(FoldConstants(), model, x=_X.reshape(1, 2, 3, 4))
    assert _ops(model) == ["Relu", "Resize", "Relu"]


def test_a_neutral_constant_that_raises_the_rank_stays(build, keeps):
    text = "g (float[4] x, float[1,1] one) => (float y) { r = Relu (x) y = Mul (r, one) }"
    model = build(text, one=np.ones((1, 1), np.float32))
    keeps(FoldConstants(), model, x=_X[0, 0])
    assert _ops(model) == ["Relu", "Mul"]


def test_a_partial_slice_stays(build, keeps):
    model = build(
        "g (float[2,3,4] x) => (float y) { a = Constant <value = int64[1] {0}> () "
        "b = Constant <value = int64[1] {2}> () y = Slice (x, a, b, b) }"
    )
    keeps(FoldConstants(), model, x=_X)
    assert _ops(model).count("Slice") == 1


def test_subgraphs_are_left_alone(build, keeps):
    model = build(
        "g (float[2,3,4] x, bool c) => (float y) { y = If (c) <then_branch = t () => (float a) "
        "{ one = Constant <value = float {1.0}> () a = Mul (x, one) }, else_branch = e () => (float b) "
        "{ b = Neg (x) }> }"
    )
    keeps(FoldConstants(), model, x=_X, c=np.array(True))
    assert _ops(model) == ["If"]
