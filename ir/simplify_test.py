"""Clean-up keeps every output, its name, and every type."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from qc.ir.model import Model
from qc.ir.simplify import all_graphs, drop_identities, infer_shapes, merge_equal

_HEAD = '<ir_version: 10, opset_import: ["" : 23]>'


def _parse(text: str) -> Model:
    return Model.of(ir.serde.deserialize_model(onnx.parser.parse_model(_HEAD + text)))


def _ops(graph: ir.Graph) -> list[str]:
    return [n.op_type for n in graph]


def test_an_identity_goes_and_its_output_keeps_its_name():
    model = _parse("g (float[4] x) => (float[4] y) { a = Identity(x)  b = Neg(a)  y = Identity(b) }")
    assert drop_identities(model)
    assert _ops(model.graph) == ["Neg"]
    assert [v.name for v in model.graph.outputs] == ["y"]


@pytest.mark.parametrize(
    "body",
    ["y = Identity(x)", "a = Neg(x)  y = Identity(a)  z = Identity(a)", "z = Neg(x)  y = Identity(z)"],
    ids=["an input", "one value twice", "another output"],
)
def test_no_two_outputs_become_one_value(body):
    outputs = "float[4] y" + (", float[4] z" if "z =" in body else "")
    model = _parse(f"g (float[4] x) => ({outputs}) {{ {body} }}")
    names = [v.name for v in model.graph.outputs]
    drop_identities(model)
    assert [v.name for v in model.graph.outputs] == names
    assert len(set(map(id, model.graph.outputs))) == len(names)


def test_both_outputs_of_a_loop_body_stay():
    model = _parse("""g (float[5,4] x, float[4] s0) => (float[4] s, float[5,4] y) {
        s, y = Scan <num_scan_inputs = 1, body = step (float[4] a, float[4] v) => (float[4] b, float[4] o) {
            b = Add(a, v)  o = Identity(b)
        }> (s0, x)
    }""")
    drop_identities(model)
    (body,) = model.graph.subgraphs()
    assert [v.name for v in body.outputs] == ["b", "o"]


def test_sequences_stay_sequences():
    model = _parse("""g (float[4] x) => (float[4] y) {
        s = SequenceConstruct(x, x)  i = Constant <value = int64 {1}> ()  y = SequenceAt(s, i)
    }""")
    assert infer_shapes(model)
    assert isinstance(next(iter(model.graph)).outputs[0].type, ir.SequenceType)


def test_equal_names_in_two_branches_do_not_mix_their_shapes():
    model = _parse("""g (float[3,4] x, bool c) => (float[a,b] y) {
        y = If(c) <
            then_branch = t () => (float[3,4] r) { h = Neg(x)  r = Relu(h) },
            else_branch = e () => (float[4,3] r) { h = Transpose <perm = [1, 0]> (x)  r = Relu(h) }
        >
    }""")
    infer_shapes(model)
    shapes = [next(iter(g)).outputs[0].shape.numpy() for g in model.graph.subgraphs()]
    assert sorted(shapes) == [(3, 4), (4, 3)]


def test_equal_nodes_merge_but_random_foreign_and_output_nodes_do_not():
    model = _parse("""g (float[4] x) => (float[4] y, float[4] z, float[4] u) {
        a = Neg(x)  b = Neg(x)  y = Add(a, b)
        r = RandomNormalLike(x)  q = RandomNormalLike(x)  z = Sub(r, q)
        u = Add(a, b)
    }""")
    assert merge_equal(model)
    assert _ops(model.graph) == ["Neg", "Add", "RandomNormalLike", "RandomNormalLike", "Sub", "Add"]


def test_functions_and_subgraphs_are_all_visited():
    model = _parse("""g (float[4] x, bool c) => (float[4] y) {
        y = If(c) <
            then_branch = t () => (float[4] r) { r = Neg(x) }, else_branch = e () => (float[4] r) { r = Abs(x) }
        >
    }""")
    assert len(list(all_graphs(model))) == 3
