from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.passes.base import Outcome
from qc.passes.canonicalize.linear import RecogniseLinear

_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((2, 3, 4)).astype(np.float32)
_W = _RNG.standard_normal((5, 4)).astype(np.float32)  # [N, K]
_B = _RNG.standard_normal(5).astype(np.float32)


def _linears(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if dialect.is_op(n, "Linear")]


def test_product_with_transposed_weight_and_bias_is_one_linear(build, keeps):
    model = build(
        "g (float[2,3,4] x, float[5,4] w, float[5] b) => (float[2,3,5] y) "
        "{ t = Transpose <perm = [1, 0]> (w) m = MatMul (x, t) y = Add (b, m) }",
        w=_W,
        b=_B,
    )
    keeps(RecogniseLinear(), model, x=_X)
    (node,) = model.graph
    assert dialect.is_op(node, "Linear")
    assert node.overload == "bias"
    assert [v.name for v in node.inputs] == ["x", "w", "b"]


def test_weight_stored_columns_first_is_turned_lazily_and_keeps_its_name(build, keeps):
    model = build("g (float[2,3,4] x, float[4,5] w) => (float y) { y = MatMul (x, w) }", w=np.ascontiguousarray(_W.T))
    keeps(RecogniseLinear(), model, x=_X)
    (node,) = _linears(model)
    weight = node.inputs[1]
    assert weight.name == "w"
    assert isinstance(weight.const_value, ir.LazyTensor)
    np.testing.assert_array_equal(weight.const_value.numpy(), _W)


def test_weight_behind_a_cast_stays_behind_it(build, keeps):
    model = build(
        "g (float[2,3,4] x, bfloat16[4,5] w) => (float y) { c = Cast <to = 1> (w) y = MatMul (x, c) }",
        w=np.ascontiguousarray(_W.T).astype(ml_dtypes.bfloat16),
    )
    keeps(RecogniseLinear(), model, x=_X)
    cast, node = model.graph
    assert cast.op_type == "Cast"
    assert node.inputs[1] is cast.outputs[0]
    assert cast.inputs[0].name == "w"
    assert cast.inputs[0].dtype == ir.DataType.BFLOAT16


def test_blocked_int4_weight_is_turned_with_its_scales(build, keeps):
    codes = _RNG.integers(-8, 8, (4, 6)).astype(ml_dtypes.int4)
    scales = _RNG.uniform(0.1, 1, (2, 6)).astype(np.float32)
    model = build(
        "g (float[2,3,4] x, int4[4,6] q, float[2,6] s) => (float y) "
        "{ w = DequantizeLinear <axis = 0, block_size = 2> (q, s) y = MatMul (x, w) }",
        q=codes,
        s=scales,
    )
    keeps(RecogniseLinear(), model, x=_X)
    decode = _linears(model)[0].inputs[1].producer()
    assert decode.attributes["axis"].value == 1
    np.testing.assert_array_equal(decode.inputs[0].const_value.numpy(), codes.T)
    np.testing.assert_array_equal(decode.inputs[1].const_value.numpy(), scales.T)


def test_one_transpose_shared_by_two_products_blocks_neither(build, keeps):
    model = build(
        "g (float[2,3,4] x, float[2,3,4] z, float[5,4] w) => (float y) "
        "{ t = Transpose <perm = [1, 0]> (w) a = MatMul (x, t) b = MatMul (z, t) y = Add (a, b) }",
        w=_W,
    )
    keeps(RecogniseLinear(), model, x=_X, z=2 * _X)
    first, second = _linears(model)
    assert first.inputs[1] is second.inputs[1]
    assert len(model.graph) == 3


def test_embedding_tied_to_the_head_is_shared(build, keeps):
    model = build(
        "g (int64[2,3] i, float[5,4] w) => (float y) "
        "{ e = Gather (w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul (e, t) }",
        w=_W,
    )
    keeps(RecogniseLinear(), model, i=np.array([[0, 1, 2], [4, 3, 2]]))
    assert set(model.graph.initializers) == {"w"}


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_scales_becomes_linear(build, keeps, transposed):
    model = build(
        f"g (float[3,4] x, float w, float[1,5] b) => (float y) "
        f"{{ y = Gemm <alpha = 0.5, beta = 2.0, transB = {transposed}> (x, w, b) }}",
        w=_W if transposed else np.ascontiguousarray(_W.T),
        b=_B[None],
    )
    keeps(RecogniseLinear(), model, x=_X[0])
    (node,) = model.graph
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), 0.5 * _W)
    np.testing.assert_allclose(node.inputs[2].const_value.numpy(), 2 * _B)


def test_gemm_between_reshapes_acts_on_the_unflattened_value(build, keeps):
    model = build(
        'g (float["b","s",4] x, int64[3] back, float[4,5] w, float[5] b) => (float["b","s",5] y) '
        "{ flat = Constant <value = int64[2] {-1, 4}> () f = Reshape (x, flat) m = Gemm (f, w, b) "
        "y = Reshape (m, back) }",
        w=np.ascontiguousarray(_W.T),
        b=_B,
    )
    keeps(RecogniseLinear(), model, x=_X, back=np.array([2, 3, 5]))
    (node,) = _linears(model)
    assert node.inputs[0].name == "x"
    assert node.outputs[0].name == "y"


def test_reshapes_that_regroup_rows_stay(build, keeps):
    model = build(
        "g (float[2,3,4] x, int64[3] back, float[4,5] w, float[5] b) => (float[3,2,5] y) "
        "{ flat = Constant <value = int64[2] {-1, 4}> () f = Reshape (x, flat) m = Gemm (f, w, b) "
        "y = Reshape (m, back) }",
        w=np.ascontiguousarray(_W.T),
        b=_B,
    )
    keeps(RecogniseLinear(), model, x=_X, back=np.array([3, 2, 5]))
    assert [n.op_type for n in model.graph] == ["Constant", "Reshape", "Linear", "Reshape"]


def test_product_that_something_else_reads_keeps_its_value_and_the_add(build, keeps):
    model = build(
        "g (float[2,3,4] x, float[4,5] w, float[5] b) => (float y, float m) { m = MatMul (x, w) y = Add (m, b) }",
        w=np.ascontiguousarray(_W.T),
        b=_B,
    )
    keeps(RecogniseLinear(), model, x=_X)
    assert [n.op_type for n in model.graph] == ["Linear", "Add"]
    assert [v.name for v in model.graph.outputs] == ["y", "m"]


@pytest.mark.parametrize(
    ("text", "weights", "inputs", "reason"),
    [
        (
            "g (float[2,3,4] x, float[2,4,3] z) => (float y) { y = MatMul (x, z) }",
            {},
            {"z": _X.transpose(0, 2, 1)},
            "MatMul has no constant weight",
        ),
        (
            "g (float[2,3,4] x, float[2,4,5] w) => (float y) { y = MatMul (x, w) }",
            {"w": np.ones((2, 4, 5), np.float32)},
            {},
            "the weight has 3 axes, expected 2",
        ),
        (
            "g (float[2,3,1] p, float[2,3,4] x, float[1,5] w) => (float y) { y = MatMul (p, w) }",
            {"w": np.ones((1, 5), np.float32)},
            {"p": _X[..., :1]},
            "the weight has one input channel: an outer product, as of positions and frequencies",
        ),
        (
            "g (float[2,3,4] x, float[4,5] w, int64 i) => (float y, float r) { y = MatMul (x, w) r = Gather (w, i) }",
            {"w": np.ones((4, 5), np.float32)},
            {"i": np.array(1)},
            "Gather reads the [K, N] weight too; turning it would store it twice",
        ),
    ],
)
def test_what_is_left_alone_says_why_and_is_untouched(build, keeps, text, weights, inputs, reason):
    model = build(text, **weights)
    before = ir.to_proto(model).SerializeToString()
    result = keeps(RecogniseLinear(), model, x=_X, **inputs)
    assert [(s.outcome, s.reason) for s in result.sites] == [(Outcome.SKIPPED, reason)]
    assert ir.to_proto(model).SerializeToString() == before


def test_metadata_of_the_product_goes_to_the_linear(build):
    model = build("g (float[2,3,4] x, float[4,5] w) => (float y) { y = MatMul (x, w) }", w=np.ones((4, 5), np.float32))
    next(iter(model.graph)).metadata_props["qc.scope"] = "block.0.up"
    result = RecogniseLinear()(model)
    assert next(iter(model.graph)).metadata_props["qc.scope"] == "block.0.up"
    assert result.sites[0].name == "block.0.up"
