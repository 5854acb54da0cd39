"""Dynamic activation quantization in front of int8 layers, executed in ONNX Runtime by the manager."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.passes.base import Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline
from qc.passes.quantize.activations import QuantizeActivations

PAIR = ["DynamicQuantizeLinear", "DequantizeLinear"]


def fan_out() -> Model:
    """Three layers on one input, and one on the first of them."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["batch", 3, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights = [], []
    for name in ("q", "k", "v", "o"):
        tensor = ir.tensor(rng.standard_normal((32, 32)).astype(np.float32) / 6, name=name)
        weights.append(
            ir.Value(name=name, const_value=tensor, shape=ir.Shape((32, 32)), type=ir.TensorType(tensor.dtype))
        )
        node = dialect.linear(x if name != "o" else nodes[0].outputs[0], weights[-1], name=name)
        node.outputs[0].name = f"{name}.out"
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes[1:]]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g")
    return Model.of(ir.Model(graph, ir_version=10))


def run(pipeline: str) -> tuple[Model, PassReport]:
    model, reports = PassManager(parse_pipeline(pipeline)).run(fan_out())
    return model, reports[-1]


def test_layers_on_one_value_share_one_pair() -> None:
    model, report = run("quantize-weights{format=int8,group=0},quantize-activations")
    ops = [n.op_type for n in model.graph]
    assert ops.count("DynamicQuantizeLinear") == 2
    readers = {n.name: n.inputs[0] for n in model.graph if n.op_type == "Linear"}
    assert readers["q"] is readers["k"] is readers["v"] is not readers["o"]
    assert [v.producer().op_type for v in (readers["q"], readers["q"].producer().inputs[0])] == PAIR[::-1]
    assert {s.outcome for s in report.sites} == {Outcome.CHANGED}
    assert report.sites[0].details["value"] == "x"


def test_the_loss_is_that_of_eight_bits() -> None:
    _, report = run("quantize-weights{format=int8,group=0},quantize-activations")
    assert report.contract == "lossy"
    assert all(38 < d.sqnr < 50 for d in report.differences)


def test_running_again_changes_nothing() -> None:
    _, report = run("quantize-weights{format=int8,group=0},quantize-activations,quantize-activations")
    assert not report.modified
    assert {s.outcome for s in report.sites} == {Outcome.MATCHED}


def test_only_layers_with_a_matching_weight_are_changed() -> None:
    model, report = run("quantize-weights{format=int8,group=0,exclude=[^k$]},quantize-activations")
    reasons = {s.name: s.reason for s in report.sites if s.outcome is Outcome.SKIPPED}
    assert list(reasons) == ["k"]
    assert "weight is float" in reasons["k"]
    assert next(n for n in model.graph if n.name == "k").inputs[0].name == "x"


def test_a_recipe_without_any_matching_weight_fails_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="weight is float"):
        run("quantize-activations")


@pytest.mark.parametrize("format", ["int4", "uint4,group=64", "uint8,group=0", "int8,group=16"])
def test_layers_are_changed_whatever_the_format_of_their_weight(format: str) -> None:
    _, report = run(f"quantize-weights{{format={format}}},quantize-activations{{granularity=token,symmetric=true}}")
    assert {s.outcome for s in report.sites} == {Outcome.CHANGED}
    assert all(30 < d.sqnr < 60 for d in report.differences)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("bits", [4, 5, 8, 16])
def test_the_error_is_at_most_half_a_step_of_the_range(granularity: str, symmetric: str, bits: int):
    options = f"bits={bits},granularity={granularity},symmetric={symmetric},float-weights=true"
    model, report = run(f"quantize-activations{{{options}}}")
    assert {s.outcome for s in report.sites} == {Outcome.CHANGED}
    x = model.graph.inputs[0]
    rounded = next(n.inputs[0] for n in model.graph if n.name == "q")
    model.graph.outputs.append(rounded)
    given = np.random.default_rng(1).standard_normal((2, 3, 32), np.float32) * np.arange(3, dtype=np.float32)[:, None]
    found = Session(model).run({x.name: given})[rounded.name]
    axis = -1 if granularity == "token" else None
    low, high = np.minimum(given.min(axis, keepdims=True), 0), np.maximum(given.max(axis, keepdims=True), 0)
    span = 2 * np.maximum(-low, high) if symmetric == "true" else high - low
    steps = 2**bits - (2 if symmetric == "true" else 1)
    assert np.all(np.abs(found - given) <= span / steps / 2 * 1.001 + 1e-12)
    points = [len(np.unique(row)) for row in (found.reshape(6, -1) if axis else [found])]
    assert max(points) <= 2**bits


def test_a_clipped_range_rounds_finer_inside_and_clips_outside() -> None:
    given = np.array([[[1.0, -0.5, 0.003, 0.2] * 8] * 3], np.float32)
    errors = {}
    for clip in (1.0, 0.5):
        model, _ = run(f"quantize-activations{{symmetric=true,granularity=token,clip={clip},float-weights=true}}")
        rounded = next(n.inputs[0] for n in model.graph if n.name == "q")
        model.graph.outputs.append(rounded)
        errors[clip] = np.abs(Session(model).run({"x": given})[rounded.name] - given)[0, 0, :4]
    assert errors[1.0][0] == 0
    assert errors[0.5][0] == pytest.approx(0.5, rel=1e-5)
    assert errors[0.5][1:].max() <= 0.25 / 127 * 1.001 < errors[1.0][1:].max()


def test_an_excluded_layer_keeps_its_input() -> None:
    model, report = run("quantize-weights{format=int8,group=0},quantize-activations{exclude=[^k$]}")
    assert [s.reason for s in report.sites if s.outcome is Outcome.SKIPPED] == ["excluded by ^k$"]
    assert next(n for n in model.graph if n.name == "k").inputs[0].name == "x"


@pytest.mark.parametrize("options", [{"bits": 3}, {"granularity": "channel"}, {"mode": "never"}, {"clip": 1.5}])
def test_other_choices_are_refused_when_the_pass_is_built(options: dict) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"Expected {name}"):
        QuantizeActivations(**options)
