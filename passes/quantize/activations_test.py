"""Dynamic activation quantization in front of int8 layers, executed in ONNX Runtime by the manager."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
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


@pytest.mark.parametrize("options", ["format=int4", "format=uint8,group=0", "format=int8,group=16"])
def test_a_recipe_without_any_matching_weight_fails_with_the_reason(options: str) -> None:
    with pytest.raises(UnsupportedError, match="integer kernels want int8 per channel"):
        run(f"quantize-weights{{{options}}},quantize-activations")


@pytest.mark.parametrize("options", [{"bits": 4}, {"granularity": "token"}, {"mode": "static"}])
def test_other_choices_are_refused_when_the_pass_is_built(options: dict) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"Expected {name}"):
        QuantizeActivations(**options)
