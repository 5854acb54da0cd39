"""Illegal models are found, and distances between outputs mean what they say."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir.errors import ContractError
from qc.ir.verify import STAGES, check_structure, compare, sqnr


def _model(op_type: str = "Relu", domain: str = "", **attributes: object) -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, ["n", 3])
    node = ir.node(op_type, [x], attributes, domain=domain, name="only")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["n", 3])
    imports = {"": 23} | ({domain: 1} if domain else {})
    return ir.Model(ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports=imports, name="g"), ir_version=10)


def test_a_valid_model_passes():
    check_structure(_model(), STAGES["float"])


def test_a_domain_is_legal_at_its_stage_only():
    model = _model("QuickGelu", "com.microsoft")
    check_structure(model, STAGES["lowered"])
    with pytest.raises(ContractError, match=r"com\.microsoft::QuickGelu"):
        check_structure(model, STAGES["float"])


def test_a_domain_that_the_source_brought_stays_legal():
    check_structure(_model("Own", "acme"), STAGES["float"], frozenset({"acme"}))


def test_an_attribute_that_the_operator_does_not_have_is_found():
    with pytest.raises(ContractError, match="not valid ONNX"):
        check_structure(_model("Relu", slope=0.1), STAGES["float"])


def test_a_value_without_a_producer_is_found():
    model = _model()
    model.graph[0].replace_input_with(0, ir.val("lost", ir.DataType.FLOAT, ["n", 3]))
    with pytest.raises(ContractError, match=r"'lost'.*no producer"):
        check_structure(model, STAGES["float"])


def test_large_weights_are_not_read():
    def refuse():
        raise AssertionError("the weight was read")

    model = _model()
    lazy = ir.LazyTensor(refuse, ir.DataType.FLOAT, ir.Shape([1 << 20, 3]), name="w")
    weight = ir.Value(name="w", const_value=lazy, shape=lazy.shape, type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.register_initializer(weight)
    check_structure(model, STAGES["float"])
    assert weight.const_value is lazy


def test_sqnr_is_in_decibels():
    reference = np.array([3.0, 4.0])
    assert sqnr(reference, reference) == math.inf
    assert sqnr(reference, reference + np.array([0.3, 0.4])) == pytest.approx(20.0)
    assert sqnr(np.zeros(2), reference) == -math.inf


@pytest.mark.parametrize(
    ("a", "b", "max_abs"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, np.inf], [1.0, np.inf], 0.0),
        ([1.0, -np.inf], [1.5, -np.inf], 0.5),
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, 2.0], [1.0, np.nan], math.inf),
        ([1.0, 2.0], [1.0], math.inf),
        ([1, 2], [1, 4], 2.0),
    ],
)
def test_the_largest_difference_counts_what_only_one_side_has_as_infinite(a, b, max_abs):
    (difference,) = compare({"y": np.array(a)}, {"y": np.array(b)})
    assert difference.max_abs == max_abs


def test_only_outputs_of_both_sides_are_compared():
    assert compare({"y": np.ones(1)}, {"z": np.ones(1)}) == []
