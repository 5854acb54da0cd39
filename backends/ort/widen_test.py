"""Re-encoding into kernels' integers: the same numbers, in the fewest bits that a kernel reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.kernels import LowerQuantizedWeights
from qc.backends.ort.order import OrderInputs
from qc.backends.ort.widen import WidenWeights
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.quant import Format, emit, read_weight, require_opset
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.passes.base import Outcome
from qc.passes.quantize.assign import assign

X = np.random.default_rng(1).standard_normal((3, 128), np.float32)


def linear_model(spelling: str) -> Model:
    rng = np.random.default_rng(0)
    weight, metric = rng.standard_normal((48, 128), np.float32), rng.random(128, np.float32)
    decode = emit(assign(weight, Format.parse(spelling), metric), ir.Value(name="w"), Store())
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 128]))
    linear = dialect.linear(x, decode.outputs[0], name="proj")
    linear.outputs[0].name, linear.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([x], [linear.outputs[0]], nodes=[decode, linear], opset_imports={"": 23}, name="test")
    for value in decode.inputs:
        assert value is not None
        graph.register_initializer(value)
    model = Model.of(ir.Model(graph, ir_version=10))
    require_opset(model, Format.parse(spelling))
    dialect.sync_functions(model)
    return model


@pytest.mark.parametrize(
    ("spelling", "stored"),
    [
        ("int3:g32", "int4:g32"), ("uint3:g32:f16", "uint4:g32"), ("uint1:g32", "uint2:g32"),
        ("uint1:g16", "uint4:g16"), ("int6", "int8"), ("uint7:g64", "uint8:g64"), ("mid1", "int2"),
        ("mid2:g32", "int4:g32"), ("mid3", "int4"), ("mid4:g16", "int8:g16"), ("mid7", "int8"), ("ternary", "int2"),
        ("ternary:tensor", "int2"), ("e1m2", "int4"), ("mxfp4", "int8:g32"), ("nvfp4", "int8:g16"),
        ("mxfp6", "int8:g32"), ("e3m0:g32", "int8:g32"), ("iq4nl:g32", "int8:g32"), ("bitmod3:g64", "int4:g64"),
        ("bitmod4:g64:f16", "int8:g64"), ("shift2", "int4"), ("shift3:g32", "int8:g32"),
        ("uint4:g32:q6x4", "uint4:g32"), ("int4:g16:s6", "int4:g16"), ("mxint8", "int8:g32"), ("int8:tensor", "int8"),
        ("uint4:g32:bf16", "uint4:g32"),
    ],
)  # fmt: skip
def test_codes_become_those_of_the_narrowest_kernel_with_the_same_numbers(spelling: str, stored: str) -> None:
    model = linear_model(spelling)
    before = read_weight(model.graph.node(0).outputs[0])
    assert before is not None
    numbers, size = before.numpy(), before.stored_bytes
    result = WidenWeights()(model)
    (site,) = result.sites
    assert (site.outcome, site.details["stored_as"]) == (Outcome.CHANGED, stored)
    after = read_weight(model.graph.node(0).outputs[0])
    assert after is not None
    assert (site.details["bytes_before"], site.details["bytes_after"]) == (size, after.stored_bytes)
    assert f"stored as {stored}: {after.stored_bytes:,} bytes instead of {size:,}" in result.notes[0]
    assert np.allclose(after.numpy(), numbers, rtol=1e-6, atol=0)
    dialect.sync_functions(model)
    reference = Session(model).run({"x": X})["y"]
    LowerQuantizedWeights()(model)
    assert [n.op_type for n in model.graph] == ["MatMulNBits"]
    found = Session(model).run({"x": X})["y"]
    assert np.abs(found - reference).max() < 0.02 * np.abs(reference).max()
    assert len(model.graph.initializers) <= 3


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ("nf4:g32", "no multiples of one number"), ("e4m3", "no multiples"), ("e3m2:g32", "no multiples"),
        ("lut3", "no multiples"), ("zint4:g32", "no multiples"), ("mid8", "no multiples"), ("shift4", "no multiples"),
        ("bin2", "no multiples"), ("int3:g20", "blocks have"), ("uint3:in", "no kernel takes"),
        ("uint3:g32+lowrank2", "no kernel takes"),
    ],
)  # fmt: skip
def test_what_has_no_such_form_is_left_as_it_is(spelling: str, reason: str) -> None:
    model = linear_model(spelling)
    nodes = list(model.graph)
    result = WidenWeights()(model)
    assert not result.modified
    assert [s.outcome for s in result.sites] == [Outcome.SKIPPED]
    assert reason in result.sites[0].reason
    assert list(model.graph) == nodes


@pytest.mark.parametrize("spelling", ["uint4:g32+order", "uint3:g32:f16+order", "nf4:g64+order"])
def test_columns_in_another_order_become_inputs_in_that_order(spelling: str) -> None:
    model = linear_model(spelling)
    reference = Session(model).run({"x": X})["y"]
    assert OrderInputs()(model).modified
    assert not OrderInputs()(model).modified
    dialect.sync_functions(model)
    assert sorted(n.op_type for n in model.graph if n.op_type != "Constant")[-2:] == ["Gather", "Linear"]
    assert np.abs(Session(model).run({"x": X})["y"] - reference).max() < 1e-5 * np.abs(reference).max()
    assert not any("order" in str(w.format) for n in model.graph if (w := read_weight(n.outputs[0])))
