from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.decoding import DecodeWhenLoaded
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.quant import Format, emit
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.passes.quantize.assign import assign


def _linear(spelling: str, rows: int, columns: int) -> Model:
    rng = np.random.default_rng(0)
    weight, metric = rng.standard_normal((rows, columns), np.float32), np.ones(columns, np.float32)
    decode = emit(assign(weight, Format.parse(spelling), metric), ir.Value(name="w"), Store())
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["m", columns]))
    linear = dialect.linear(x, decode.outputs[0], name="proj")
    linear.outputs[0].name, linear.outputs[0].dtype = "y", ir.DataType.FLOAT
    held = [v for v in decode.inputs if v is not None]
    graph = ir.Graph(
        [x], linear.outputs, nodes=[decode, linear], initializers=held, opset_imports={"": 23}, name="test"
    )
    model = Model.of(ir.Model(graph, ir_version=10))
    dialect.sync_functions(model)
    return model


@pytest.mark.parametrize("spelling", ["int8", "uint4:g16", "int4:g8", "uint8:in16", "int8:in", "int8:tensor"])
def test_the_numbers_stay_and_the_decoding_node_goes(spelling):
    model = _linear(spelling, 32, 48)
    x = np.random.default_rng(1).standard_normal((3, 48), np.float32)
    before = Session(model).run({"x": x})["y"]
    result = DecodeWhenLoaded()(model)
    assert result.modified
    assert "DequantizeLinear" not in {n.op_type for n in model.graph}
    np.testing.assert_array_equal(Session(model).run({"x": x})["y"], before)


def test_a_group_cut_short_is_left_alone():
    model = _linear("int4:g32", 16, 48)
    names = [n.op_type for n in model.graph]
    result = DecodeWhenLoaded()(model)
    assert not result.modified
    assert [n.op_type for n in model.graph] == names
    assert "cut short" in result.sites[0].reason


def test_groups_that_happen_to_divide_unevenly_are_recognised():
    """9 columns in groups of 4 make 3 groups, and 9 is a multiple of 3."""
    model = _linear("int8:g4", 16, 9)
    assert not DecodeWhenLoaded()(model).modified
