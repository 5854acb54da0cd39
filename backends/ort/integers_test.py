from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.coverage import coverage
from qc.backends.ort.fuse.inline import InlineDialect
from qc.backends.ort.integers import LowerIntegerLinear
from qc.backends.ort.kernels import LowerFloatLinear, LowerQuantizedWeights
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.ir.verify import compare
from qc.passes.base import Context, Outcome
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

ROWS, COLUMNS = 48, 64
_TOKENS = np.array([1, 20, 0], np.float32)[:, None]
_X = {"x": np.random.default_rng(4).standard_normal((2, 3, COLUMNS), np.float32) * _TOKENS}


def _linears(pipeline: str, *, count: int = 1, bias: bool = False) -> Model:
    """Linears on one x, after a pipeline."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "rows", COLUMNS]))

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array.astype(np.float32), name=name)
        return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))

    weights = [constant(f"w{i}", rng.standard_normal((ROWS, COLUMNS))) for i in range(count)]
    biases = [constant(f"b{i}", np.arange(ROWS)) for i in range(count)] if bias else [None] * count
    nodes = [dialect.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"y{i}"
    constants = weights + [b for b in biases if b is not None]
    outputs = [n.outputs[0] for n in nodes]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports={"": 23}, name="g")
    context = Context(store=Store())
    model, _ = PassManager(parse_pipeline(pipeline)).run(Model.of(ir.Model(graph, ir_version=10)), context=context)
    model.meta["store"] = context.store  # the model's weights live in it
    return model


def _ops(model: Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Cast"]


def _gap(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    return max(d.max_abs / d.scale for d in compare(before, after))


@pytest.mark.parametrize("weights", ["format=int8,group=0", "format=int8,group=0,scale=f16", "format=uint8,group=0"])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_products_on_one_input_share_its_quantization(weights: str, bias: bool) -> None:
    model = _linears(f"quantize-weights{{{weights}}},quantize-activations", count=3, bias=bias)
    before = Session(model).run(_X)
    assert LowerIntegerLinear()(model).modified
    assert _ops(model) == ["DynamicQuantizeLinear"] + ["MatMulIntegerToFloat"] * 3
    assert _gap(before, Session(model).run(_X)) < 1e-5
    assert not LowerIntegerLinear()(model).modified


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("grid", ["granularity=token,symmetric=true", "symmetric=true", "clip=0.9"])
@pytest.mark.parametrize("bias", [False, True])
def test_grids_that_fit_bytes_are_multiplied_as_integers(bits: int, grid: str, bias: bool) -> None:
    pipeline = f"quantize-weights{{format=int8,group=0}},quantize-activations{{bits={bits},{grid}}}"
    model = _linears(pipeline, count=2, bias=bias)
    before = Session(model).run(_X)
    result = LowerIntegerLinear()(model)
    assert {s.outcome for s in result.sites} == {Outcome.CHANGED}
    assert _ops(model).count("MatMulIntegerToFloat") == 2
    assert _ops(model).count("QuantizeLinear") == 1
    assert not any(node.domain == dialect.DOMAIN for node in model.graph)
    for optimize in (False, True):
        assert _gap(before, Session(model, optimize=optimize).run(_X)) < 1e-5


@pytest.mark.parametrize("grid", ["", "symmetric=true", "bits=4", "bits=4,symmetric=true"])
def test_static_grids_that_fit_bytes_are_multiplied_as_integers(grid: str) -> None:
    model = _linears(f"quantize-weights{{format=int8,group=0}},quantize-activations{{mode=static,{grid}}}", count=3)
    before = Session(model).run(_X)
    result = LowerIntegerLinear()(model)
    assert {s.outcome for s in result.sites} == {Outcome.CHANGED}
    assert _ops(model) == ["QuantizeLinear"] + ["Clip"] * ("4" in grid) + ["MatMulIntegerToFloat"] * 3
    kinds = {v.dtype for n in model.graph if n.op_type == "QuantizeLinear" for v in n.outputs}
    assert kinds == {ir.DataType.UINT8}, "which x86 multiplies faster than signed codes"
    for optimize in (False, True):
        assert _gap(before, Session(model, optimize=optimize).run(_X)) < 1e-5
    assert not LowerIntegerLinear()(model).modified


@pytest.mark.parametrize("grid", ["bits=16", "granularity=channel"])
def test_other_static_grids_run_in_float_and_are_listed_as_slow(grid: str) -> None:
    model = _linears(f"quantize-weights{{format=int8,group=0}},quantize-activations{{mode=static,{grid}}}")
    assert not LowerIntegerLinear()(model).modified
    LowerFloatLinear()(model)
    slow = {e["op"]: str(e["reason"]) for e in coverage(model).nodes if not e["on_target"]}
    assert "product that then runs in float" in slow["QuantizeLinear"]


@pytest.mark.parametrize("grid", ["granularity=token", "bits=16", "bits=16,granularity=token,symmetric=true"])
def test_other_grids_run_in_float_and_are_listed_as_slow(grid: str) -> None:
    model = _linears(f"quantize-weights{{format=int8,group=0}},quantize-activations{{{grid}}}")
    before = Session(model).run(_X)
    result = LowerIntegerLinear()(model)
    assert [s.outcome for s in result.sites] == [Outcome.SKIPPED]
    assert "no integer kernel" in result.sites[0].reason
    LowerFloatLinear()(model)
    InlineDialect()(model)
    assert _gap(before, Session(model).run(_X)) < 1e-5
    slow = {e["op"]: str(e["reason"]) for e in coverage(model).nodes if not e["on_target"]}
    assert "no integer kernel reads" in slow["Round"]


@pytest.mark.parametrize("grid", ["", "{granularity=token}", "{granularity=token,symmetric=true}", "{bits=16}"])
def test_four_bit_weights_go_to_the_kernel_that_quantizes_activations_by_itself(grid: str) -> None:
    model = _linears(f"quantize-weights{{format=int4}},quantize-activations{grid}")
    before = Session(model).run(_X)
    result = LowerIntegerLinear()(model)
    assert not result.modified
    assert "int8 per channel" in result.sites[0].reason
    LowerQuantizedWeights()(model)
    assert _ops(model) == ["MatMulNBits"]
    assert _gap(before, Session(model, optimize=True).run(_X)) < 3e-2


def test_fewer_bits_than_the_kernel_has_are_rounded_in_front_of_it() -> None:
    model = _linears("quantize-weights{format=int4},quantize-activations{bits=4,granularity=token,symmetric=true}")
    before = Session(model).run(_X)
    LowerQuantizedWeights()(model)
    assert _ops(model) == ["DynamicQuantize", "MatMulNBits"]
    assert _gap(before, Session(model, optimize=True).run(_X)) < 1e-5, "the kernel does not round them again"


def test_equal_roundings_of_one_value_are_computed_once() -> None:
    model = _linears("quantize-weights{format=int8,group=0}", count=2)
    x = model.graph.inputs[0]
    for node in [n for n in model.graph if n.op_type == "Linear"]:
        rounding = dialect.dynamic_quantize(x, bits=8, token=True, symmetric=True)
        model.graph.insert_before(node, rounding)
        node.replace_input_with(0, rounding.outputs[0])
    dialect.sync_functions(model)
    before = Session(model).run(_X)
    LowerIntegerLinear()(model)
    assert _ops(model).count("QuantizeLinear") == 1
    assert _gap(before, Session(model).run(_X)) < 1e-5
