from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from qc.passes.base import Outcome
from qc.passes.canonicalize.rotary import RecogniseRotary

_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((2, 3, 5, 8)).astype(np.float32)  # [batch, heads, sequence, channels]
_P = np.array([[0, 1, 2, 3, 4], [7, 6, 9, 2, 2]])
_FREQ = (0.3 ** np.arange(4)).astype(np.float32)

_INTS = "".join(
    f"i{n} = Constant <value = int64[1] {{{v}}}> () "
    for n, v in {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "8": 8, "m1": -1, "far": 2**62}.items()
)
_ANGLES = "u = Unsqueeze (p, i2) f = Cast <to = 1> (u) a = Mul (f, w) "
_HALVES = _ANGLES + "aa = Concat <axis = -1> (a, a) c0 = Cos (aa) s0 = Sin (aa) "
_TABLES = _HALVES + "c = Unsqueeze (c0, i1) s = Unsqueeze (s0, i1) "
_ROTATE = (
    "{0}1 = Slice ({0}, i0, i4, i3) {0}2 = Slice ({0}, i4, i8, i3) {0}n = Neg ({0}2) "
    "{0}r = Concat <axis = -1> ({0}n, {0}1) "
)
_TURN = _ROTATE.format("x") + "xc = Mul (x, c) xs = Mul (xr, s) "

_HEADER = 'float["b",3,"s",8] x, int64["b","s"] p, float[4] w'


def _build(build, body: str, header: str = _HEADER, outputs: str = 'float["b",3,"s",8] y', **weights: np.ndarray):
    model = build(f"g ({header}) => ({outputs}) {{" + _INTS + body + "}", w=_FREQ, **weights)
    common.ShapeInferencePass()(model)
    return model


def _ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type != "Constant"]


def _rotation(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.op_type == "RotaryEmbedding")


def test_rotation_by_halves_reads_tables_at_the_positions(build, keeps):
    model = _build(build, _TABLES + _TURN + "y = Add (xc, xs)")
    result = keeps(RecogniseRotary(positions=16), model, x=_X, p=_P)
    assert _ops(model) == ["RotaryEmbedding"]
    node = _rotation(model)
    assert [v.name for v in node.inputs] == ["x", "rotary_cos", "rotary_sin", "p"]
    expected = np.cos(np.arange(16)[:, None] * _FREQ)
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), expected, atol=1e-6)
    assert result.sites[0].details["rows"] == 16


@pytest.mark.parametrize(
    "cut",
    ["x1, x2 = Split <axis = -1, num_outputs = 2> (x)", "x1 = Slice (x, i0, i4, i3) x2 = Slice (x, i4, i8, i3)"],
)
def test_rotation_written_on_the_halves_takes_one_angle_per_pair(build, keeps, cut):
    body = (
        _ANGLES
        + "c0 = Cos (a) s0 = Sin (a) c = Unsqueeze (c0, i1) s = Unsqueeze (s0, i1) "
        + cut
        + (
            " ac = Mul (x1, c) bs = Mul (x2, s) re = Sub (ac, bs) bc = Mul (x2, c) as = Mul (x1, s) im = Add (bc, as) "
            "y = Concat <axis = -1> (re, im)"
        )
    )
    model = _build(build, body)
    keeps(RecogniseRotary(positions=16), model, x=_X, p=_P)
    assert _ops(model) == ["RotaryEmbedding"]
    assert _rotation(model).inputs[1].const_value.shape == (16, 4)


def test_rotation_of_neighbours_is_interleaved(build, keeps):
    body = (
        _ANGLES + "a1 = Unsqueeze (a, im1) ap = Concat <axis = -1> (a1, a1) "
        "sh = Constant <value = int64[3] {0, 0, 8}> () "
        "aa = Reshape (ap, sh) c0 = Cos (aa) s0 = Sin (aa) c = Unsqueeze (c0, i1) s = Unsqueeze (s0, i1) "
        "even = Slice (x, i0, ifar, i3, i2) odd = Slice (x, i1, ifar, i3, i2) no = Neg (odd) "
        "u1 = Unsqueeze (no, im1) u2 = Unsqueeze (even, im1) st = Concat <axis = -1> (u1, u2) "
        "back = Constant <value = int64[4] {0, 0, 0, 8}> () xr = Reshape (st, back) "
        "xc = Mul (x, c) xs = Mul (xr, s) y = Add (xs, xc)"
    )
    model = _build(build, body)
    for value in (n.outputs[0] for n in model.graph if n.op_type == "Reshape"):
        if value.name == "xr":
            value.shape = ir.Shape(["b", 3, "s", 8])
    keeps(RecogniseRotary(positions=16), model, x=_X, p=_P)
    assert _ops(model) == ["RotaryEmbedding"]
    assert _rotation(model).attributes["interleaved"].value == 1


def test_rotation_of_the_first_channels_covers_the_whole_value(build, keeps):
    body = (
        _TABLES
        + ("i12 = Constant <value = int64[1] {12}> () x = Slice (z, i0, i8, i3) rest = Slice (z, i8, ifar, i3) ")
        + _TURN
        + "t = Add (xc, xs) y = Concat <axis = -1> (t, rest)"
    )
    header = _HEADER.replace("8] x", "12] z")
    model = _build(build, body, header, 'float["b",3,"s",12] y')
    keeps(RecogniseRotary(positions=16), model, z=np.concatenate([_X, _X[..., :4]], -1), p=_P)
    assert _ops(model) == ["RotaryEmbedding"]
    assert _rotation(model).attributes["rotary_embedding_dim"].value == 8


def test_sequence_before_heads_is_transposed_around_the_operator(build, keeps):
    body = _HALVES + "c = Unsqueeze (c0, i2) s = Unsqueeze (s0, i2) " + _TURN + "y = Add (xc, xs)"
    model = _build(build, body, _HEADER.replace('3,"s"', '"s",3'), 'float["b","s",3,8] y')
    keeps(RecogniseRotary(positions=16), model, x=_X.transpose(0, 2, 1, 3).copy(), p=_P)
    assert _ops(model) == ["Transpose", "RotaryEmbedding", "Transpose"]


def test_positions_computed_in_the_graph_are_expanded_to_the_batch(build, keeps):
    body = (
        (
            "sh = Shape <start = 2, end = 3> (x) n = Squeeze (sh) zero = Constant <value = int64 {0}> () "
            "one = Constant <value = int64 {1}> () r = Range (zero, n, one) p = Unsqueeze (r, i0) "
        )
        + _TABLES
        + _TURN
        + "y = Add (xc, xs)"
    )
    model = _build(build, body, 'float["b",3,"s",8] x, float[4] w')
    keeps(RecogniseRotary(positions=16), model, x=_X)
    assert "RotaryEmbedding" in _ops(model)
    assert "Cos" not in _ops(model)


def test_equal_tables_are_shared_and_different_ones_are_not(build, keeps):
    second = (
        "fz = Cast <to = 1> (u) az = Mul (fz, w2) aaz = Concat <axis = -1> (az, az) c0z = Cos (aaz) s0z = Sin (aaz) "
        "cz = Unsqueeze (c0z, i1) sz = Unsqueeze (s0z, i1) "
    )
    third = _ROTATE.format("z") + "zc = Mul (z, cz) zs = Mul (zr, sz) z0 = Add (zc, zs)"
    body = _TABLES + second + _TURN + "y = Add (xc, xs) " + third
    header, outputs = _HEADER + ', float["b",3,"s",8] z, float[4] w2', 'float["b",3,"s",8] y, float["b",3,"s",8] z0'
    for factor, tables in ((1.0, 2), (2.0, 4)):
        model = _build(build, body, header, outputs, w2=factor * _FREQ)
        keeps(RecogniseRotary(positions=16), model, x=_X, z=-_X, p=_P)
        assert sum(name.startswith("rotary_") for name in model.graph.initializers) == tables


def test_scale_of_cos_and_sin_lands_in_the_table(build, keeps):
    scaled = _TABLES.replace(
        "c = Unsqueeze (c0, i1)",
        "k = Constant <value = float {1.5}> () c1 = Mul (c0, k) s1 = Mul (s0, k) c = Unsqueeze (c1, i1)",
    ).replace("(s0, i1)", "(s1, i1)")
    model = _build(build, scaled + _TURN + "y = Add (xc, xs)")
    keeps(RecogniseRotary(positions=16), model, x=_X, p=_P)
    assert _rotation(model).inputs[1].const_value.numpy()[0, 0] == pytest.approx(1.5)


def test_rotation_that_something_else_reads_halfway_keeps_that_value(build, keeps):
    model = _build(build, _TABLES + _TURN + "y = Add (xc, xs)", outputs='float["b",3,"s",8] y, float["b",3,"s",8] xs')
    keeps(RecogniseRotary(positions=16), model, x=_X, p=_P)
    assert {"RotaryEmbedding", "Sin"} <= set(_ops(model))


_BY_LENGTH = _TABLES.replace("Mul (f, w)", "Mul (fl, w)").replace(
    "a = Mul", "sh = Shape <start = 1, end = 2> (p) l = Cast <to = 1> (sh) fl = Mul (f, l) a = Mul"
)


_BY_LARGEST = _BY_LENGTH.replace(
    "sh = Shape <start = 1, end = 2> (p) l = Cast <to = 1> (sh) fl = Mul (f, l)",
    "pf = Cast <to = 1> (p) far = ReduceMax <keepdims = 0> (pf) four = Constant <value = float {4.0}> () "
    "long = Greater (far, four) "
    "more = Add (f, f) fl = Where (long, more, f)",
)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_BY_LARGEST, "cos and sin depend on more than each position (a scaling by length, for example)"),
        (_BY_LENGTH, "cos and sin depend on more than each position (a scaling by length, for example)"),
        (
            _TABLES.replace("Concat <axis = -1> (a, a)", "Concat <axis = -1> (a, a7)").replace(
                "aa =", "k = Constant <value = float {7.0}> () a7 = Mul (a, k) aa ="
            ),
            "the two channels of a rotated pair have different angles",
        ),
        (_TABLES.replace("Cast <to = 1> (u)", "Identity (q)"), "cos and sin are not computed from integer positions"),
    ],
)
def test_what_is_no_table_of_positions_is_left_alone(build, keeps, body, reason):
    model = _build(build, body + _TURN + "y = Add (xc, xs)", _HEADER + ', float["b","s",1] q')
    before = ir.to_proto(model).SerializeToString()
    result = keeps(RecogniseRotary(positions=16), model, x=_X, p=_P, q=_P[..., None].astype(np.float32))
    assert [(s.outcome, s.reason) for s in result.sites] == [(Outcome.SKIPPED, reason)]
    assert ir.to_proto(model).SerializeToString() == before


def test_swapped_halves_without_minus_are_no_rotation(build, keeps):
    body = (_TABLES + _TURN).replace("Neg (x2)", "Relu (x2)") + "y = Add (xc, xs)"
    assert not keeps(RecogniseRotary(positions=16), _build(build, body), x=_X, p=_P).modified
