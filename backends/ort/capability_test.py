from __future__ import annotations

import onnx_ir as ir
import pytest

from qc.backends.ort.capability import facts_of, has_kernel, limit_of, require_kernels
from qc.ir.errors import UnsupportedError

_IMPORTS = {"": 23, "com.microsoft": 1}


def _value(name: str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([2, 3]))


@pytest.mark.parametrize(
    ("op_type", "domain", "dtype", "expected"),
    [
        ("Add", "", ir.DataType.FLOAT, True),
        ("Constant", "", ir.DataType.FLOAT, True),
        ("QuickGelu", "com.microsoft", ir.DataType.FLOAT, True),
        ("Det", "", ir.DataType.FLOAT16, True),
        ("NoSuchOperator", "", ir.DataType.FLOAT, False),
        ("ComplexMul", "com.microsoft", ir.DataType.FLOAT, False),
    ],
)
def test_the_installed_runtime_says_what_it_runs(op_type, domain, dtype, expected):
    node = ir.node(op_type, [_value("x", dtype)] * (2 if op_type in ("Add", "ComplexMul") else 1), domain=domain)
    node.outputs[0].dtype = dtype
    assert has_kernel(node, _IMPORTS) is expected


def test_an_operator_that_only_expands_to_others_counts_as_run():
    node = ir.node("Swish", [_value("x")], {"alpha": 1.0})
    node.outputs[0].dtype = ir.DataType.FLOAT
    assert has_kernel(node, {"": 24})


def test_operators_without_a_kernel_are_listed_with_their_nodes():
    x = _value("x")
    first = ir.node("Relu", [x])
    second = ir.node("Frobnicate", [first.outputs[0]], name="block/frob", domain="my.domain")
    graph = ir.Graph([x], [second.outputs[0]], nodes=[first, second], opset_imports={"": 23, "my.domain": 1})
    with pytest.raises(UnsupportedError, match=r"my\.domain::Frobnicate.*block/frob"):
        require_kernels(ir.Model(graph, ir_version=10))


def test_local_functions_need_no_kernel():
    x = _value("x")
    node = ir.node("Mine", [x], domain="my.domain")
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 23, "my.domain": 1})
    inner = _value("a")
    body = ir.node("Relu", [inner])
    function = ir.Function(
        "my.domain", "Mine", graph=ir.Graph([inner], body.outputs, nodes=[body], opset_imports={"": 23}), attributes=[]
    )
    require_kernels(ir.Model(graph, ir_version=10, functions=[function]))


def test_the_facts_of_a_node_find_its_limit():
    inputs = [_value("x"), _value("b", ir.DataType.UINT8), _value("s"), _value("z")]
    node = ir.node("MatMulNBits", inputs, {"bits": 4, "block_size": 32, "accuracy_level": 4}, domain="com.microsoft")
    facts = facts_of(node)
    assert facts["zero_points"] == "float"
    assert "zero points" in limit_of("com.microsoft::MatMulNBits", facts).reason
    integer = facts | {"zero_points": "integer"}
    assert limit_of("com.microsoft::MatMulNBits", integer) is None
