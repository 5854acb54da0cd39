"""Which chains of operators behind a head are found."""

from __future__ import annotations

import pytest

from qc.backends.tvm.logits import behind_head
from qc.ir.text import parse

HEAD = """<ir_version: 10, opset_import: ["": 23, "qc": 1]>
f (float[b,s,4] x) => (float[b,s,8] y%s)
<float[8,4] w = {%s}, float[8] bias = {1,2,3,4,5,6,7,8}, float one = {1}, float[2,1] rows = {1,2}> {
  head = qc.Linear (x, w)
  %s
}"""


@pytest.mark.parametrize(
    ("body", "more", "found"),
    [
        ("y = Add (head, bias)", "", ["head", "y"]),
        ("a = Div (head, one)  b = Tanh (a)  y = Mul (one, b)", "", ["head", "a", "b", "y"]),
        ("c = Constant <value_float = 2.0> ()  y = Pow (head, c)", "", ["head", "y"]),
        ("y = Softmax (head)", "", []),
        ("y = Mul (head, head)", "", []),
        ("a = Tanh (head)  y = Add (a, head)", "", []),
        ("y = Tanh (head)", ", float[b,s,8] head", []),
        ("y = Tanh (head)  z = Relu (y)", ", float[b,s,8] z", []),
        ("y = Mul (head, rows)", "", []),
    ],
)
def test_what_is_computed_of_one_row_alone_is_found(body: str, more: str, found: list[str]) -> None:
    graph = parse(HEAD % (more, ",".join("1" * 32), body)).graph
    graph.outputs[0].metadata_props["qc.role"] = "logits"
    for node in graph:
        for value in node.outputs:
            value.dtype = graph.outputs[0].dtype
            value.shape = graph.outputs[0].shape
    assert [v.name for v in behind_head(graph)] == found
