from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.passes.base import Outcome
from qc.passes.canonicalize.activations import RecogniseActivations, glu_of

_X = np.linspace(-6, 6, 48, dtype=np.float32).reshape(2, 3, 8)
_NUMBERS = {
    "half": 0.5,
    "one": 1.0,
    "root2": 1.4142135,
    "inv": 0.70710677,
    "k": 0.044715,
    "c": 0.7978846,
    "three": 3.0,
    "q": 1.702,
}
_CONSTANTS = "".join(f"{n} = Constant <value = float {{{v}}}> () " for n, v in _NUMBERS.items())


def _build(build, body: str, inputs: str = "float[2,3,8] x", outputs: str = "float[2,3,8] y"):
    return build(f"g ({inputs}) => ({outputs}) {{" + _CONSTANTS + body + "}")


def _ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type != "Constant"]


_SPELLINGS = {
    "erf by division": ("d = Div (x, root2) e = Erf (d) a = Add (e, one) h = Mul (x, a) y = Mul (h, half)", "none"),
    "erf by product": ("d = Mul (x, inv) e = Erf (d) a = Add (one, e) h = Mul (half, x) y = Mul (h, a)", "none"),
    "tanh of a cube": (
        (
            "p = Pow (x, three) kp = Mul (k, p) s = Add (x, kp) u = Mul (c, s) t = Tanh (u) a = Add (t, one) "
            "h = Mul (x, half) y = Mul (h, a)"
        ),
        "tanh",
    ),
    "tanh of nested products": (
        (
            "x2 = Mul (x, x) kx = Mul (k, x2) i = Add (one, kx) xc = Mul (x, c) u = Mul (xc, i) t = Tanh (u) "
            "a = Add (one, t) ha = Mul (half, a) y = Mul (x, ha)"
        ),
        "tanh",
    ),
}


@pytest.mark.parametrize("name", _SPELLINGS)
def test_every_spelling_of_gelu_is_one_node(build, keeps, name):
    body, approximate = _SPELLINGS[name]
    model = _build(build, body)
    keeps(RecogniseActivations(), model, x=_X)
    (node,) = [n for n in model.graph if n.op_type != "Constant"]
    assert node.op_type == "Gelu"
    assert node.attributes["approximate"].value == approximate
    assert node.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        ("s = Sigmoid (x) y = Mul (x, s)", 1.0),
        ("d = Mul (q, x) s = Sigmoid (d) y = Mul (s, x)", 1.702),
    ],
)
def test_sigmoid_products_are_swish(build, keeps, body, alpha):
    model = _build(build, body)
    keeps(RecogniseActivations(), model, x=_X)
    (node,) = [n for n in model.graph if n.op_type != "Constant"]
    assert dialect.is_op(node, "Swish")
    assert node.attributes["alpha"].value == pytest.approx(alpha)


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid (x) y = Mul (s, s)",
        "t = Tanh (x) y = Mul (t, half)",
        "d = Mul (three, x) s = Sigmoid (d) y = Mul (s, x)",
        "e = Erf (x) a = Add (e, one) h = Mul (x, a) y = Mul (h, half)",
    ],
)
def test_other_functions_stay_and_say_so(build, keeps, body):
    model = _build(build, body)
    before = ir.to_proto(model).SerializeToString()
    result = keeps(RecogniseActivations(), model, x=_X)
    assert [s.outcome for s in result.sites] == [Outcome.SKIPPED]
    assert "not part of a known activation" in result.sites[0].reason
    assert ir.to_proto(model).SerializeToString() == before


def test_gate_of_another_value_is_no_swish(build, keeps):
    model = _build(build, "s = Sigmoid (z) y = Mul (x, s)", "float[2,3,8] x, float[2,3,8] z")
    assert not keeps(RecogniseActivations(), model, x=_X, z=-_X).modified


def test_sigmoid_with_another_use_keeps_its_value(build, keeps):
    model = _build(build, "s = Sigmoid (x) y = Mul (x, s)", outputs="float[2,3,8] y, float[2,3,8] s")
    keeps(RecogniseActivations(), model, x=_X)
    assert sorted(_ops(model)) == ["Sigmoid", "Swish"]
    assert [v.name for v in model.graph.outputs] == ["y", "s"]


def test_scope_of_the_module_is_kept(build):
    model = _build(build, "s = Sigmoid (x) y = Mul (x, s)")
    for node in model.graph:
        node.metadata_props["qc.scope"] = "mlp.act"
    result = RecogniseActivations()(model)
    assert result.sites[0].name == "mlp.act"
    assert next(n for n in model.graph if n.op_type == "Swish").metadata_props["qc.scope"] == "mlp.act"


def test_gated_linear_unit_is_read_in_either_order(build):
    for body in ("a = Gelu (x) y = Mul (a, z)", "a = Gelu (x) y = Mul (z, a)"):
        model = _build(build, body, "float[2,3,8] x, float[2,3,8] z")
        glu = glu_of(model.graph.outputs[0].producer())
        assert glu is not None
        assert (glu.gate.name, glu.up.name, glu.activation.op_type) == ("x", "z", "Gelu")


def test_product_with_a_constant_is_no_gated_unit(build):
    model = _build(build, "a = Gelu (x) y = Mul (a, half)")
    assert glu_of(model.graph.outputs[0].producer()) is None
