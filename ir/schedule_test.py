"""Constants go to the front and observers to the end, where the runtime computes both as late as it can."""

from __future__ import annotations

import onnx_ir as ir

from qc.ir.schedule import order_for_memory


def _value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2]))


def _weight(name: str) -> ir.Value:
    value = _value(name)
    value.const_value = ir.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=ir.DataType.FLOAT, name=name)
    return value


def test_decode_nodes_move_to_the_front_in_their_order() -> None:
    x, weights = _value("x"), [_weight("a"), _weight("b")]
    first_decode = ir.node("Cast", [weights[0]], {"to": 1}, name="decode a")
    first = ir.node("MatMul", [x, first_decode.outputs[0]], name="first")
    second_decode = ir.node("Cast", [weights[1]], {"to": 1}, name="decode b")
    turn = ir.node("Transpose", [second_decode.outputs[0]], name="turn b")
    second = ir.node("MatMul", [first.outputs[0], turn.outputs[0]], name="second")
    nodes = [first_decode, first, second_decode, turn, second]
    graph = ir.Graph([x], second.outputs, nodes=nodes, initializers=weights, opset_imports={"": 23})
    order_for_memory(graph)
    assert [n.name for n in graph] == ["decode a", "decode b", "turn b", "first", "second"]


def test_nodes_that_nothing_reads_go_to_the_end_the_shallowest_last() -> None:
    x = _value("x")
    first = ir.node("Neg", [x], name="first")
    second = ir.node("Neg", [first.outputs[0]], name="second")
    output = ir.node("Neg", [second.outputs[0]], name="output")
    observer = ir.node("Size", [first.outputs[0]], name="observer")
    outputs = [*output.outputs, *observer.outputs]
    graph = ir.Graph([x], outputs, nodes=[first, observer, second, output], opset_imports={"": 23})
    order_for_memory(graph)
    assert [n.name for n in graph] == ["first", "second", "output", "observer"]


def test_a_node_with_a_subgraph_stays_behind_what_the_subgraph_reads() -> None:
    x, condition = _value("x"), _weight("condition")
    negate = ir.node("Neg", [x], name="negate")
    branches = []
    for name in ("then", "else"):
        inner = ir.node("Neg", [negate.outputs[0]], name=name)
        branches.append(ir.Graph([], inner.outputs, nodes=[inner], name=name))
    attributes = {"then_branch": branches[0], "else_branch": branches[1]}
    choose = ir.node("If", [condition], attributes, name="choose")
    graph = ir.Graph([x], choose.outputs, nodes=[negate, choose], initializers=[condition], opset_imports={"": 23})
    order_for_memory(graph)
    assert [n.name for n in graph] == ["negate", "choose"]
