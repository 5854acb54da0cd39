"""The meaning of formats, against hand-worked values and ONNX Runtime's own decoder."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.ir import dialect
from qc.ir._quant_body import decode_function
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import (
    Affine,
    FloatScale,
    Format,
    QuantizedTensor,
    SearchedFloat,
    Sparse,
    Table,
    Weight,
    emit,
    named_formats,
    read_weight,
    require_opset,
)
from qc.ir.runtime import Session
from qc.ir.store import Store

SPELLINGS = [f"{u}int{b}{g}{s}" for u in ("", "u") for b in (2, 4, 8) for g in ("", ":g16") for s in ("", ":f16")]
STANDARD = ["mxfp4", "mxfp6", "mxfp8", "mxint8", "nvfp4", "nf4-dq"]
GROUPINGS = [f"{v}{g}" for v in ("int8", "uint4", "e2m1", "uint3") for g in (":tensor", ":in", ":in16")]
SCALES = [f"uint4:g16:{s}" for s in ("bf16", "e8m0", "e4m3", "q6", "q8x2", "s6x2")]
NAMES = [name for name in named_formats() if name not in STANDARD and not name.startswith(("vq", "aq", "bitstack"))]
OTHERS = [f"{n}{g}{f}" for n in NAMES for g, f in (("", ""), (":g16", ":f16" * Format.parse(n).values.scaled))]
VECTORS = ["vq6x4", "vq4x4:g16", "vq9x2x2", "vq4x4:in", "aq5x4x2", "aq5x4:g8:f16", "bitstack1x3", "bitstack3x2"]
REMAINDERS = [
    "int4:g16+order", "uint3:g16:q6+order", "lut3+sparse0.5", "uint4:g16+sparse3", "int2+lowrank3", "nf4:g16+lowrank1",
    "mid1+columns10:int8", "lut2:g16+columns20:uint4:g4:f16", "e2m1:g16:e8m0+columns5:lut1",
    "uint1:g8+columns75:uint2:g8+columns33:uint3:g8",
]  # fmt: skip
EVERY = list(dict.fromkeys([*SPELLINGS, *STANDARD, *GROUPINGS, *SCALES, *OTHERS, *VECTORS, *REMAINDERS]))


def random_tensor(format: Format, rows: int = 24, columns: int = 40) -> QuantizedTensor:
    """Codes, zero points and tables of any legal values, scales of any sign where they may have one."""
    rng = np.random.default_rng(0)
    inner = format.remainder.inner((rows, columns)) if format.remainder is not None else (rows, columns)
    held = format.scale.encode(rng.normal(size=format.grid(inner)).astype(np.float32))
    for stream in format.streams((rows, columns)):
        if stream.name in held:
            continue
        if stream.bits is not None:
            top = 1 << stream.bits if stream.bits else 3
            top = 2 if isinstance(format.values, SearchedFloat) and stream.name == "kind" else top
            array = rng.integers(stream.low, stream.low + top, stream.shape)
            held[stream.name] = array.astype(np.int8 if stream.low else np.uint8 if top <= 256 else np.uint16)
        elif stream.dtype is not None and stream.dtype.is_floating_point():
            held[stream.name] = np.abs(rng.normal(size=stream.shape) + 1).astype(stream.dtype.numpy())
    for stream in format.streams((rows, columns)):
        if stream.name.endswith("order"):
            held[stream.name] = rng.permutation(stream.shape[0]).astype(np.uint16)
    if isinstance(format.remainder, Sparse):
        places = np.sort(rng.choice(rows * columns, format.remainder.count((rows, columns)), replace=False))
        held["sparse_columns"] = (places % columns).astype(np.uint16)
        held["sparse_counts"] = np.bincount(places // columns, minlength=rows).astype(np.uint16)
    if isinstance(format.values, Table) and not np.all(np.isfinite(format.values.values)):
        held["codes"] &= 0x7B  # NaN is no value of a weight
    return QuantizedTensor(format, held.pop("codes"), held)


def constant(name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))


def graph_of(*nodes: ir.Node) -> ir.Graph:
    """A graph of decode nodes whose constants are its initializers; read_weight accepts only values of a graph."""
    constants = {id(v): v for n in nodes for v in n.inputs if v is not None}
    graph = ir.Graph(
        [], [n.outputs[0] for n in nodes], nodes=nodes, initializers=list(constants.values()), opset_imports={"": 23}
    )
    graph.name = "g"
    return graph


def dequantize(*inputs: ir.Value, **attributes: int) -> Weight | None:
    node = ir.node("DequantizeLinear", inputs, attributes)
    node.outputs[0].dtype = ir.DataType.FLOAT
    graph_of(node)
    return read_weight(node.outputs[0])


@given(
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    group=st.none() | st.integers(1, 10**6),
    half=st.booleans(),
)
def test_a_format_reads_back_from_its_spelling(bits: int, symmetric: bool, group: int | None, half: bool) -> None:
    scale = FloatScale(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
    format = Format(Affine(bits, symmetric), group, scale)
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize("spelling", EVERY)
def test_every_spelling_reads_back(spelling: str) -> None:
    format = Format.parse(spelling)
    assert Format.parse(str(format)) == format
    assert spelling in (str(format), *STANDARD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int",
        "int1",
        "int9",
        "float4",
        "int4:32",
        "int4:g0",
        "int4:g-1",
        "int4:f64",
        "int4:f16:g32",
        "INT4",
        "int4 ",
    ],
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="found"):
        Format.parse(text)


def test_scales_have_a_float_type_of_known_spelling() -> None:
    with pytest.raises(InputError, match="DOUBLE"):
        FloatScale(ir.DataType.DOUBLE)


def test_affine_formats_are_named_in_all_widths_with_and_without_zero_point() -> None:
    assert {f"{u}int{b}" for u in ("", "u") for b in range(2, 9)} < set(named_formats())


@pytest.mark.parametrize(
    ("spelling", "low", "high"),
    [("int2", -2, 1), ("uint2", 0, 3), ("int4", -8, 7), ("uint4", 0, 15), ("int8", -128, 127), ("uint8", 0, 255)],
)
def test_codes_cover_the_range_of_their_type(spelling: str, low: int, high: int) -> None:
    values = Format.parse(spelling).values
    assert (values.low, values.high) == (low, high)


def test_decoding_by_hand() -> None:
    codes = np.array([[1, -2, 7, -8, 3]], np.int8)
    scale = np.array([[0.5, 2.0, -1.0]], np.float32)
    symmetric = Format.parse("int4:g2").decode(codes, {"scale": scale})
    assert symmetric.tolist() == [[0.5, -1.0, 14.0, -16.0, -3.0]]
    params = {"scale": np.array([[0.25]], np.float32), "zero_point": np.array([[3]], np.uint8)}
    assert Format.parse("uint2").decode(np.array([[0, 1, 2, 3]], np.uint8), params).tolist() == [
        [-0.75, -0.5, -0.25, 0]
    ]


@pytest.mark.parametrize(
    ("spelling", "shape", "expected"),
    [
        ("int4:g32:f16", (4096, 4096), 4.5),
        ("int4:g128:f16", (4096, 4096), 4.125),
        ("uint4:g128:f16", (4096, 4096), 4.15625),
        ("int4:g32", (4096, 4096), 5.0),
        ("uint2:g128:f16", (4096, 4096), 2.140625),
        ("int8", (4096, 4096), 8 + 32 / 4096),
        ("int4:g32", (1, 33), (136 + 64) / 33),  # 33 codes take 17 bytes, the second group has a scale of its own
        ("uint2:g2", (1, 5), (16 + 96 + 8) / 5),
        ("int4:g32:f16", (64, 4096), 4.5),  # Q4_0 of llama.cpp: 18 bytes for 32; the next ones likewise
        ("zint4:g32:f16", (64, 4096), 5.0),
        ("int8:g32:f16", (64, 4096), 8.5),
        ("int3:g16:s6x16", (64, 4096), 110 * 8 / 256),
        ("int6:g16:s8x16", (64, 4096), 210 * 8 / 256),
        ("iq4nl:g32:f16", (64, 4096), 4.5),
        ("iq4nl:g32:s6x8", (64, 4096), 136 * 8 / 256),
    ],
)
def test_every_stored_bit_is_counted(spelling: str, shape: tuple[int, int], expected: float) -> None:
    assert Format.parse(spelling).stored_bits(shape) / (shape[0] * shape[1]) == pytest.approx(expected, rel=1e-12)


def bytes_of(tensor: QuantizedTensor) -> int:
    """Bytes of the initializers that a weight becomes."""
    node = emit(tensor, ir.Value(name="w", shape=ir.Shape(tensor.shape)), Store())
    return sum(len(v.const_value.tobytes()) for v in node.inputs if v is not None and v.const_value is not None)


@pytest.mark.parametrize("spelling", EVERY)
def test_bits_per_weight_are_the_bytes_that_are_stored(spelling: str) -> None:
    format = Format.parse(spelling)
    for rows, columns in ((3, 24), (5, 37), (7, 131), (1, 16)):  # the last group of a row may be short
        if (rows if format.axis == "out" else columns) % format.values.tile:
            continue
        tensor = random_tensor(format, rows, columns)
        assert tensor.bits_per_weight * rows * columns == pytest.approx(8 * bytes_of(tensor), rel=1e-12)


@pytest.mark.parametrize(
    "spelling", [*STANDARD, *VECTORS, *REMAINDERS, *SCALES, "lut3c16:f16", "nested3-6", "fdb2:g16"]
)
def test_no_body_holds_numbers_that_grow_with_the_weight(spelling: str) -> None:
    def constants(rows: int, columns: int) -> int:
        body = decode_function(f"{spelling}@{rows}x{columns}", 23)
        values = [n.attributes["value"].as_tensor() for n in body if n.op_type == "Constant"]
        return sum(v.nbytes for v in values)

    assert constants(96, 160) < constants(24, 40) + 256  # a last group that is shorter takes a few


@given(
    name=st.sampled_from(NAMES),
    group=st.sampled_from(["", ":tensor", ":in"]) | st.integers(1, 40).map(":g{}".format),
    scale=st.sampled_from(["", ":f16", ":bf16", ":e8m0", ":e4m3", ":q5", ":q8x3", ":s6x2"]),
    rest=st.sampled_from(["", "+order", "+sparse2", "+lowrank2", "+columns30:int3:g5"]),
    shape=st.tuples(st.integers(1, 9), st.integers(2, 70)),
)
@settings(max_examples=200)
def test_every_combination_of_parts_counts_its_bytes(
    name: str, group: str, scale: str, rest: str, shape: tuple[int, int]
) -> None:
    format = Format.parse(f"{name}{group}{scale if Format.parse(name).values.scaled else ''}{rest}")
    assert format.stored_bits(shape) == 8 * bytes_of(random_tensor(format, *shape))


@pytest.fixture(scope="module")
def graph() -> tuple[dict[str, QuantizedTensor], Model]:
    """A weight in every format, and a model whose outputs they are, decoded."""
    tensors = {spelling: random_tensor(Format.parse(spelling)) for spelling in EVERY}
    store = Store()
    nodes = [emit(tensor, ir.Value(name=spelling), store) for spelling, tensor in tensors.items()]
    model = Model.of(ir.Model(graph_of(*nodes), ir_version=10))
    for tensor in tensors.values():
        require_opset(model, tensor.format)
    dialect.sync_functions(model)
    return tensors, model


@pytest.fixture(scope="module")
def written(graph: tuple[dict, Model]) -> dict[str, tuple[QuantizedTensor, Weight | None, np.ndarray]]:
    """Every format as a tensor, as the weight that was written to a graph, and as the runtime decodes it."""
    tensors, model = graph
    decoded = Session(model).run({})
    outputs = {v.name: v for v in model.graph.outputs}
    names = {spelling: f"{spelling}.decoded" for spelling in tensors}
    return {s: (tensors[s], read_weight(outputs[name]), decoded[name]) for s, name in names.items()}


def test_the_torch_executor_decodes_every_format_alike(graph: tuple[dict, Model], written: dict) -> None:
    from qc.ir.execute import Executor

    some = [f"{spelling}.decoded" for spelling in [*STANDARD, *GROUPINGS, *SCALES, *OTHERS[::5]]]
    found = Executor(graph[1], outputs=some)({})
    assert not [s for s in some if not np.array_equal(found[s], written[s.removesuffix(".decoded")][2])]


@pytest.mark.parametrize("spelling", EVERY)
def test_a_written_weight_reads_back_and_the_runtime_decodes_it_alike(spelling: str, written: dict) -> None:
    tensor, weight, decoded = written[spelling]
    format = tensor.format
    assert (weight.format, weight.shape, weight.name) == (format, tensor.shape, spelling)
    assert weight.dtype == (format.native or ir.DataType.UINT8)
    read = weight.quantized()
    assert np.array_equal(read.codes, tensor.codes)
    assert read.params.keys() == tensor.params.keys()
    assert all(np.array_equal(read.params[k], v) for k, v in tensor.params.items())
    assert weight.stored_bytes * 8 == tensor.stored_bits == format.stored_bits(tensor.shape)
    assert np.array_equal(decoded, tensor.decode())
    assert np.array_equal(weight.numpy(), tensor.decode())


@pytest.mark.parametrize("spelling", [s for s in EVERY if Format.parse(s).values.books == 1 and "+" not in s])
def test_projecting_decoded_values_changes_none(spelling: str) -> None:
    tensor = random_tensor(Format.parse(spelling))
    again = tensor.format.nearest(tensor.decode(), tensor.params)
    assert again.shape == tensor.codes.shape
    found = tensor.format.decode(again, tensor.params)
    assert np.allclose(found, tensor.decode(), rtol=1e-6, atol=0)


def test_two_bits_need_a_newer_opset_and_others_leave_it_alone() -> None:
    model = ir.Model(graph_of(), ir_version=10)
    require_opset(model, Format.parse("int4"))
    assert model.graph.opset_imports[""] == 23
    require_opset(model, Format.parse("uint2"))
    assert model.graph.opset_imports[""] == 25


def test_a_float_initializer_is_a_weight_that_is_not_copied() -> None:
    array = np.ones((3, 4), np.float32)
    value = constant("w", array)
    ir.Graph([], [], nodes=[], initializers=[value])
    weight = read_weight(value)
    assert weight is not None
    assert (weight.format, weight.shape, weight.stored_bytes) == (None, (3, 4), 48)
    assert np.shares_memory(weight.numpy(), array)
    with pytest.raises(ValueError, match="'w' in FLOAT"):
        weight.quantized()


def test_a_narrow_float_behind_a_cast_is_a_weight_whose_raw_numbers_stay_narrow() -> None:
    held = Store().put("w", np.ones((30, 40), ml_dtypes.bfloat16))
    data = ir.Value(name="w", const_value=held, shape=held.shape, type=ir.TensorType(held.dtype))
    node = ir.node("Cast", [data], {"to": int(ir.DataType.FLOAT)})
    node.outputs[0].dtype = ir.DataType.FLOAT
    graph_of(node)
    weight = read_weight(node.outputs[0])
    assert weight is not None
    assert (weight.name, weight.dtype, weight.stored_bytes) == ("w", ir.DataType.BFLOAT16, 2400)
    assert weight.raw().dtype == ml_dtypes.bfloat16
    assert not weight.raw().flags.owndata
    assert weight.numpy().dtype == np.float32


def test_reading_a_quantized_weight_leaves_no_file_mapped_and_can_be_repeated() -> None:
    tensor = random_tensor(Format.parse("uint4:g16"), rows=400)
    node = emit(tensor, ir.Value(name="w"), Store())
    graph_of(node)
    weight = read_weight(node.outputs[0])
    assert weight is not None
    for _ in range(2):
        assert np.array_equal(weight.quantized().codes, tensor.codes)
        assert all(v.const_value.raw is None for v in node.inputs if isinstance(v.const_value, ir.ExternalTensor))


def test_releasing_a_weight_never_breaks_a_view_of_it() -> None:
    held = Store().put("w", np.ones((30, 40), np.float32))
    value = ir.Value(name="w", const_value=held, shape=ir.Shape((30, 40)), type=ir.TensorType(held.dtype))
    ir.Graph([], [], nodes=[], initializers=[value])
    weight = read_weight(value)
    assert weight is not None
    view = weight.raw()
    weight.release()
    assert np.all(view == 1)
    assert np.all(weight.numpy() == 1)


def test_values_that_are_no_constant_weights_are_none() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    relu = ir.node("Relu", [x])
    computed = ir.node("DequantizeLinear", [ir.Value(name="codes"), constant("scale", np.float32(1))])
    cast = ir.node("Cast", [constant("ids", np.arange(4))], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].dtype = ir.DataType.FLOAT
    graph_of(cast)
    assert read_weight(None) is None
    assert all(read_weight(v) is None for v in (x, relu.outputs[0], computed.outputs[0], cast.outputs[0]))


@pytest.mark.parametrize(
    ("scale", "attributes", "expected"),
    [
        ((4, 2), {"axis": 1, "block_size": 4}, "int8:g4"),
        ((4, 2), {"block_size": 4}, "int8:g4"),
        ((4, 2), {"axis": -1, "block_size": 5}, "int8:g5"),
        ((4,), {"axis": 0}, "int8"),
        ((4,), {"axis": -2}, "int8"),
        ((8,), {"axis": 1}, "int8:in"),
        ((1, 8), {"axis": 0, "block_size": 4}, "int8:in4"),
        ((), {}, "int8:tensor"),
        ((4, 2), {"axis": 0, "block_size": 4}, None),
        ((8,), {"axis": 0}, None),
    ],
)
def test_decode_nodes_are_recognised_by_their_shapes(
    scale: tuple[int, ...], attributes: dict[str, int], expected: str | None
) -> None:
    codes = constant("w", np.ones((4, 8), np.int8))
    found = dequantize(codes, constant("s", np.ones(scale, np.float32)), **attributes)
    assert (None if found is None else str(found.format)) == expected


def test_symmetric_codes_may_have_zero_points_that_are_zero() -> None:
    codes, scale = constant("w", np.ones((4, 8), np.int8)), constant("s", np.ones(4, np.float32))
    zeros = dequantize(codes, scale, constant("z", np.zeros(4, np.int8)), axis=0)
    assert zeros is not None
    assert str(zeros.format) == "int8"
    codes, scale = constant("w", np.ones((4, 8), np.int8)), constant("s", np.ones(4, np.float32))
    assert dequantize(codes, scale, constant("z", np.ones(4, np.int8)), axis=0) is None


def test_a_missing_zero_point_of_unsigned_codes_is_zero() -> None:
    codes, scale = constant("w", np.full((4, 8), 5, np.uint8)), constant("s", np.ones(4, np.float32))
    weight = dequantize(codes, scale, axis=0)
    assert weight is not None
    assert np.all(weight.numpy() == 5)
    assert not weight.quantized().params["zero_point"].any()


def test_codes_of_other_ranks_and_types_are_no_weights() -> None:
    cube = constant("w", np.ones((2, 4, 8), np.int8))
    assert dequantize(cube, constant("s", np.ones(4, np.float32)), axis=1) is None
    wide = constant("w", np.ones((4, 8), np.int16))
    assert dequantize(wide, constant("s", np.ones(4, np.float32)), axis=0) is None


def test_codes_with_a_kernel_are_a_weight_with_one_scale_per_output_channel_or_one_in_all() -> None:
    codes = np.arange(64, dtype=np.int8).reshape(2, 4, 4, 2)
    channels = dequantize(constant("w", codes), constant("s", np.array([1, 2], np.float32)), axis=0)
    assert channels is not None
    assert (str(channels.format), channels.shape, channels.matrix) == ("int8", (2, 4, 4, 2), (2, 32))
    np.testing.assert_array_equal(channels.numpy()[1, 0, 0], [64, 66])
    whole = dequantize(constant("w", codes), constant("s", np.array(2, np.float32)))
    assert whole is not None
    assert str(whole.format) == "int8:tensor"
    assert whole.numpy()[1, 3, 3, 1] == 126
