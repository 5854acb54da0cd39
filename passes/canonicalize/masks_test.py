from __future__ import annotations

import pytest

from qc.ir.model import Model, set_role
from qc.passes.canonicalize.masks import Mask, describe_mask

_CACHE = 'int64["b","s"] ids, int64["b","t"] am, float["b",2,"p",4] pk'
_INTS = "".join(f"i{n} = Constant <value = int64[1] {{{n}}}> () " for n in range(4)) + "".join(
    f"n{n} = Constant <value = int64 {{{n}}}> () " for n in (0, 1, 3)
)
_PLACES = (
    "bs = Shape <start = 1, end = 2> (ids) s = Squeeze (bs) bp = Shape <start = 2, end = 3> (pk) p = Squeeze (bp) "
    "t = Add (s, p) r = Range (n0, s, n1) q0 = Add (r, p) q = Unsqueeze (q0, i1) k0 = Range (n0, t, n1) "
    "k = Unsqueeze (k0, i0) "
)
_CAUSAL = _PLACES + "c = LessOrEqual (k, q) "
_WINDOW = _CAUSAL + "q3 = Sub (q, n3) g = Greater (k, q3) cw = And (c, g) "
_PADDED = "ab = Cast <to = 9> (am) a1 = Unsqueeze (ab, i1) a = Unsqueeze (a1, i2) "
_ADDED = "zero = Constant <value = float {0.0}> () low = Constant <value = float {-3.4e38}> () "


def _mask(build, body: str, header: str = _CACHE, kind: str = "bool") -> Mask:
    model: Model = build(f"g ({header}) => ({kind}[M,N,O,P] m) {{" + _INTS + body + "}")
    roles = {"ids": "tokens", "am": "mask", "pk": "past_key.0", "pos": "positions"}
    for value in model.graph.inputs:
        if value.name in roles:
            set_role(value, roles[value.name])
    model.record(max_positions=64)
    return describe_mask(model, model.graph.outputs[0])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (_CAUSAL + "m = Identity (c)", Mask("causal")),
        (_CAUSAL + _PADDED + "m = And (c, a)", Mask("causal", padded=True)),
        (_WINDOW + "m = Identity (cw)", Mask("causal_window", 3)),
        (_WINDOW + _PADDED + "m = And (cw, a)", Mask("causal_window", 3, True)),
        (_PADDED + "m = Identity (a)", Mask("padding", padded=True)),
    ],
)
def test_boolean_masks_are_told_apart(build, body, expected):
    assert _mask(build, body) == expected


def test_added_mask_means_the_same(build):
    body = _CAUSAL + _PADDED + _ADDED + "both = And (c, a) m = Where (both, zero, low)"
    assert _mask(build, body, kind="float") == Mask("causal", padded=True)


def test_positions_given_as_an_input_count(build):
    body = _PLACES + "u = Unsqueeze (pos, i2) u1 = Unsqueeze (u, i1) m = LessOrEqual (k, u1)"
    assert _mask(build, body, _CACHE + ', int64["b","s"] pos') == Mask("causal")


def test_encoder_mask_is_padding(build):
    mask = _mask(build, _PADDED + "m = Identity (a)", 'int64["b","s"] ids, int64["b","s"] am')
    assert mask == Mask("padding", padded=True)


def test_no_mask_is_none(build):
    model = build("g (float[1] x) => (float[1] y) { y = Relu (x) }")
    assert describe_mask(model, None) == Mask("none")


@pytest.mark.parametrize(
    ("body", "kind", "header", "reason"),
    [
        (_PLACES + "d = Sub (q, k) e = Abs (d) m = Less (e, n3)", "bool", _CACHE, "not causal_window"),
        (_PLACES + "m = Less (k, q)", "bool", _CACHE, "not causal"),
        (_PLACES + "d = Sub (k, q) m = Cast <to = 1> (d)", "float", _CACHE, "adds a bias"),
        ("m = Cast <to = 9> (x)", "bool", _CACHE + ', float["b",1,"s","t"] x', "depends on x"),
    ],
)
def test_what_fits_nothing_is_unknown_with_the_reason(build, body, kind, header, reason):
    mask = _mask(build, body, header, kind)
    assert mask.kind == "unknown"
    assert reason in mask.reason
