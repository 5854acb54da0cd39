from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.kernels import LowerFloatLinear, LowerQuantizedWeights
from qc.backends.ort.packed import kernel_block
from qc.ir import dialect
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.quant import Format, QuantizedTensor, emit, require_opset
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.passes.base import Outcome

ROWS = 48


def _input(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        type=ir.TensorType(ir.tensor(array).dtype),
        shape=ir.Shape(array.shape),
    )


def _model(inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node]) -> Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}, name="test")
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.producer() is None:
                graph.register_initializer(value)
    model = Model.of(ir.Model(graph, ir_version=10))
    dialect.sync_functions(model)
    return model


def _quantized(text: str, rows: int, columns: int, store: Store, seed: int = 0) -> ir.Node:
    """A decode node of random codes in that format."""
    format = Format.parse(text)
    rng = np.random.default_rng(seed)
    values, groups = format.values, format.groups(columns)
    codes = rng.integers(values.low, values.high + 1, (rows, columns)).astype(np.int8 if values.symmetric else np.uint8)
    params = {"scale": (rng.random((rows, groups)) * 0.02 + 0.01).astype(format.scale.dtype.numpy())}
    if not values.symmetric:
        params["zero_point"] = rng.integers(0, values.high + 1, (rows, groups)).astype(np.uint8)
    return emit(QuantizedTensor(format, codes, params), ir.Value(name=f"w{seed}"), store)


def _linear_model(text: str, columns: int, *, bias: bool = False) -> Model:
    store = Store()
    decode = _quantized(text, ROWS, columns, store)
    x = _input("x", ir.DataType.FLOAT, "rows", columns)
    b = _constant("b", np.arange(ROWS, dtype=np.float32)) if bias else None
    node = dialect.linear(x, decode.outputs[0], b, name="proj")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    model = _model([x], [node.outputs[0]], [decode, node])
    require_opset(model, Format.parse(text))
    dialect.sync_functions(model)
    model.meta["store"] = store  # the model's weights live in it
    return model


def _ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _x(columns: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(9).standard_normal((5, columns), np.float32)}


def _gap(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(after[k] - v).max() / np.abs(v).max()) for k, v in before.items())


_FORMATS = [f"{sign}int{bits}:g{group}{scale}"
            for bits, groups in ((2, (32, 64, 128)), (4, (16, 32, 64, 128, 256)), (8, (16, 32, 128, 256)))
            for sign in ("", "u") for group in groups for scale in ("", ":f16")]  # fmt: skip
_ROWWISE = [f"{sign}int{bits}" for bits in (2, 4, 8) for sign in ("", "u")]


@pytest.mark.parametrize("text", [*_FORMATS, *_ROWWISE, "int4:g512", "uint2:g256"])
@pytest.mark.parametrize("columns", [256, 200])
def test_a_quantized_linear_becomes_one_kernel_that_differs_by_the_rounding_of_activations(text, columns):
    model = _linear_model(text, columns)
    before = Session(model).run(_x(columns))
    result = LowerQuantizedWeights()(model)
    assert [op for op in _ops(model) if op != "Cast"] == ["MatMulNBits"]
    assert result.sites[0].outcome is Outcome.CHANGED
    gap = _gap(before, Session(model, optimize=True).run(_x(columns)))
    assert 1e-5 < gap < 3e-2


@pytest.mark.parametrize("text", ["int4:g32", "uint4:g64:f16", "uint4"])
@pytest.mark.parametrize("bias", [False, True])
def test_at_accuracy_level_0_four_bits_are_exact(text, bias):
    model = _linear_model(text, 96, bias=bias)
    before = Session(model).run(_x(96))
    LowerQuantizedWeights(accuracy_level=0)(model)
    assert [op for op in _ops(model) if op != "Cast"] == ["MatMulNBits"], "the bias is an input of the kernel"
    assert _gap(before, Session(model).run(_x(96))) < 1e-5


@pytest.mark.parametrize("text", ["int4:g32:f16", "uint8:g64:f16", "int2:g32:f16"])
def test_the_verifying_runtime_reads_half_precision_scales(text):
    model = _linear_model(text, 96)
    before = Session(model).run(_x(96))
    LowerQuantizedWeights()(model)
    assert _gap(before, Session(model).run(_x(96))) < 1e-5, "unpacked, the kernel keeps float activations"


@pytest.mark.parametrize("text", ["int2:g32", "int8:g32"])
def test_formats_that_are_slow_with_float_activations_are_refused_and_the_model_stays(text):
    model = _linear_model(text, 64)
    with pytest.raises(UnsupportedError, match="accuracy level 4"):
        LowerQuantizedWeights(accuracy_level=0)(model)
    assert _ops(model) == ["DequantizeLinear", "Linear"]


@pytest.mark.parametrize("text", ["int2:g16", "int4:g8"])
def test_a_group_without_a_fast_kernel_is_refused(text):
    model = _linear_model(text, 96)
    with pytest.raises(UnsupportedError, match="choose"):
        LowerQuantizedWeights()(model)


def test_an_unknown_accuracy_level_is_an_input_error():
    with pytest.raises(InputError, match="accuracy level"):
        LowerQuantizedWeights(accuracy_level=2)


@pytest.mark.parametrize(
    ("text", "columns", "block"),
    [
        ("int8", 1024, 256),
        ("int8", 384, 128),
        ("int4", 100, 128),
        ("int2", 1024, 128),
        ("int4:g1024", 2048, 256),
        ("int4:g48", 96, 16),
    ],
)
def test_rows_and_long_groups_are_cut_into_the_longest_blocks_that_need_no_padding(text, columns, block):
    assert kernel_block(Format.parse(text), columns, 4) == block


def test_a_float_linear_becomes_a_product_that_keeps_the_weight_as_stored():
    x = _input("x", ir.DataType.FLOAT, "batch", "rows", 8)
    w = _constant("w", np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32))
    node = dialect.linear(x, w, _constant("b", np.ones(6, np.float32)))
    node.outputs[0].name = "y"
    model = _model([x], [node.outputs[0]], [node])
    feed = {"x": np.random.default_rng(1).standard_normal((2, 3, 8), np.float32)}
    before = Session(model).run(feed)
    LowerFloatLinear()(model)
    assert _ops(model) == ["FusedMatMul", "Add"]
    assert model.graph.initializers["w"] is w
    assert _gap(before, Session(model).run(feed)) < 1e-6
    assert not LowerFloatLinear()(model).modified


def test_a_float_linear_in_double_precision_falls_back_to_the_standard_operator():
    x = _input("x", ir.DataType.DOUBLE, "rows", 8)
    node = dialect.linear(x, _constant("w", np.random.default_rng(0).standard_normal((6, 8))))
    node.outputs[0].name = "y"
    model = _model([x], [node.outputs[0]], [node])
    feed = {"x": np.random.default_rng(1).standard_normal((3, 8))}
    before = Session(model).run(feed)
    LowerFloatLinear()(model)
    assert _ops(model) == ["Transpose", "MatMul"]
    assert _gap(before, Session(model).run(feed)) < 1e-12


def test_a_float_linear_is_left_to_the_float_pass():
    x = _input("x", ir.DataType.FLOAT, "rows", 8)
    node = dialect.linear(x, _constant("w", np.ones((6, 8), np.float32)))
    node.outputs[0].name = "y"
    model = _model([x], [node.outputs[0]], [node])
    result = LowerQuantizedWeights()(model)
    assert not result.modified
    assert result.sites[0].reason == "its weight is float"


def _tied_model(text: str, columns: int, *, head: bool = True) -> Model:
    store = Store()
    decode = _quantized(text, ROWS, columns, store)
    tokens = _input("tokens", ir.DataType.INT64, "batch", "rows")
    look_up = ir.node("Gather", [decode.outputs[0], tokens])
    look_up.outputs[0].name, look_up.outputs[0].dtype = "embedded", ir.DataType.FLOAT
    nodes, outputs = [decode, look_up], [look_up.outputs[0]]
    if head:
        node = dialect.linear(look_up.outputs[0], decode.outputs[0])
        node.outputs[0].name, node.outputs[0].dtype = "logits", ir.DataType.FLOAT
        nodes, outputs = [*nodes, node], [*outputs, node.outputs[0]]
    model = _model([tokens], outputs, nodes)
    require_opset(model, Format.parse(text))
    dialect.sync_functions(model)
    model.meta["store"] = store
    return model


_TOKENS = {"tokens": np.array([[0, 5, ROWS - 1], [7, 7, 1]], np.int64)}


@pytest.mark.parametrize("text", [*_FORMATS[::3], *_ROWWISE, "int2:g16"])
@pytest.mark.parametrize("columns", [256, 200])
def test_a_look_up_in_a_quantized_table_decodes_the_same_numbers(text, columns):
    model = _tied_model(text, columns, head=False)
    before = Session(model).run(_TOKENS)
    LowerQuantizedWeights()(model)
    assert [op for op in _ops(model) if op != "Cast"] == ["GatherBlockQuantized"]
    assert _gap(before, Session(model).run(_TOKENS)) < 1e-6


@pytest.mark.parametrize("text", ["int4:g32", "uint4:g32:f16", "int8", "uint2:g64"])
def test_a_tied_table_is_stored_once(text):
    model = _tied_model(text, 256)
    before = Session(model).run(_TOKENS)
    LowerQuantizedWeights()(model)
    assert sorted(op for op in _ops(model) if op != "Cast") == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    stored = [
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8 and "zero" not in str(v.name)
    ]
    assert len(stored) == 1
    after = Session(model, optimize=True).run(_TOKENS)
    assert _gap({"embedded": before["embedded"]}, after) < 1e-6
    assert _gap(before, after) < 3e-2


def test_a_tied_table_whose_rows_need_padding_is_stored_for_each_kernel():
    model = _tied_model("int4:g64", 200)
    before = Session(model).run(_TOKENS)
    LowerQuantizedWeights()(model)
    assert sorted(_ops(model)) == ["GatherBlockQuantized", "MatMulNBits"]
    assert _gap(before, Session(model, optimize=True).run(_TOKENS)) < 3e-2


def test_a_weight_that_is_a_graph_output_too_is_still_decoded_for_it():
    model = _linear_model("int4:g32", 64)
    decoded = model.graph.node(0).outputs[0]
    model.graph.outputs.append(decoded)
    before = Session(model).run(_x(64))
    LowerQuantizedWeights()(model)
    assert sorted(_ops(model)) == ["DequantizeLinear", "MatMulNBits"]
    assert _gap(before, Session(model, optimize=True).run(_x(64))) < 3e-2


def test_packed_weights_are_computed_when_they_are_read():
    model = _linear_model("int4:g32", 64)
    LowerQuantizedWeights()(model)
    blocks = next(v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8)
    assert isinstance(blocks.const_value, ir.LazyTensor)
