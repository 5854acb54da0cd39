from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.npu.weights import LowerWeights
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.passes.pipeline import parse_pipeline

_RNG = np.random.default_rng(0)
_WEIGHT = _RNG.standard_normal((48, 64), np.float32)
_X = _RNG.standard_normal((2, 3, 64), np.float32)


def _linear(recipe: str, weight: np.ndarray = _WEIGHT) -> Model:
    text = '<ir_version: 10, opset_import: ["" : 23, "qc" : 1]> f (float[b,n,64] x) => (float[b,n,48] y) { }'
    model = Model.of(ir.from_onnx_text(text))
    x, name = model.graph.inputs[0], "w"
    held, bias = (
        ir.Value(name=n, const_value=ir.tensor(a), shape=ir.Shape(a.shape))
        for n, a in (("w", weight), ("b", weight[:, 0]))
    )
    for value in (held, bias):
        value.dtype = ir.DataType.FLOAT
        model.graph.register_initializer(value)
    node = dialect.linear(x, held, bias, name=name)
    model.graph.append(node)
    node.outputs[0].name, node.outputs[0].shape = "y", ir.Shape(["b", "n", 48])
    model.graph.outputs[0] = node.outputs[0]
    dialect.sync_functions(model)
    for step in parse_pipeline(recipe) if recipe else []:
        step.action(model)
        dialect.sync_functions(model)
    return model


@pytest.mark.parametrize(
    ("recipe", "dtype", "tolerance"),
    [
        ("quantize-weights{format=int8,group=0}", ir.DataType.INT8, 1e-5),
        ("quantize-weights{format=int4,group=0}", ir.DataType.INT4, 1e-5),
        ("quantize-weights{format=int3,group=0}", ir.DataType.INT4, 1e-5),
        ("quantize-weights{format=uint4,group=32}", ir.DataType.INT8, 1e-2),
        ("", ir.DataType.INT16, 1e-4),
    ],
)
def test_a_weight_gets_the_codes_that_an_npu_multiplies(recipe, dtype, tolerance):
    model = _linear(recipe)
    before = Session(model).run({"x": _X})["y"]
    assert LowerWeights()(model).modified
    after = Session(model).run({"x": _X})["y"]
    assert np.abs(after - before).max() <= tolerance * np.abs(before).max()
    decode = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    assert decode.inputs[0].dtype == dtype
    assert tuple(decode.inputs[0].shape) == (64, 48), "columns are output channels"
    assert (decode.inputs[1].const_value.numpy() > 0).all(), "the units take a negative scale for a positive one"
    assert not LowerWeights()(model).modified


def test_negative_scales_become_signs_of_output_channels():
    model = _linear("quantize-weights{format=int4,group=0}", -np.abs(_WEIGHT))
    LowerWeights()(model)
    positive = Counter(n.op_type for n in model.graph)
    model = _linear("quantize-weights{format=int4,group=0}", np.abs(_WEIGHT))
    LowerWeights()(model)
    negative = Counter(n.op_type for n in model.graph)
    assert negative - positive == {"Mul": 1}


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_table_with_scales_per_row_is_looked_up_as_codes_and_scales(format):
    signature = "(int64[n] i, int64[m] j, float[32,4096] w) => (float[n,4096] y, float[m,4096] z)"
    text = f'<ir_version: 10, opset_import: ["" : 23]> f {signature} {{ y = Gather(w, i) z = Gather(w, j) }}'
    model = Model.of(ir.from_onnx_text(text))
    table = model.graph.inputs[2]
    model.graph.inputs.remove(table)
    table.const_value = ir.tensor(_RNG.standard_normal((32, 4096), np.float32), name="w")
    model.graph.register_initializer(table)
    for step in parse_pipeline(f"quantize-weights{{format={format},group=0}}"):
        step.action(model)
    feed = {"i": np.array([3, 0, 31, 3]), "j": np.array([7])}
    before = Session(model).run(feed)
    assert LowerWeights()(model).modified
    after = Session(model).run(feed)
    for name, value in before.items():
        assert np.abs(after[name] - value).max() <= 1e-4 * np.abs(value).max()
    assert sum(n.op_type == "Gather" for n in model.graph) == 4
    held = [v.const_value.dtype for v in model.graph.initializers.values() if v.const_value.size == 32 * 4096]
    assert held == [ir.DataType.INT8], "both read the same codes"
    assert not LowerWeights()(model).modified
