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


BATCHES = [
    {"x": np.random.default_rng(n).standard_normal((n, 3, 32), np.float32) * np.float32(0.5 + 2 * (n == 3))}
    for n in (1, 3, 2)
]


def calibrated(options: str, weights: str = "quantize-weights{format=int8,group=0},") -> tuple[Model, PassReport]:
    steps = parse_pipeline(f"{weights}quantize-activations{{mode=static,{options}}}")
    model, reports = PassManager(steps).run(fan_out(), calibration=BATCHES)
    return model, reports[-1]


def on_grid(model: Model, given: np.ndarray) -> np.ndarray:
    """What the layers `q`, `k`, `v` read of an input."""
    rounded = next(n.inputs[0] for n in model.graph if n.name == "q")
    model.graph.outputs.append(rounded)
    return Session(model).run({"x": given})[rounded.name]


SEEN = np.concatenate([b["x"] for b in BATCHES])


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize(("bits", "kind"), [(4, "INT4"), (8, "INT8"), (16, "INT16")])
def test_static_ranges_are_those_of_all_calibration_batches(symmetric: str, bits: int, kind: str) -> None:
    model, report = calibrated(f"range=minmax,bits={bits},symmetric={symmetric}")
    assert {s.outcome for s in report.sites} == {Outcome.CHANGED}
    ops = [n.op_type for n in model.graph]
    assert ops.count("QuantizeLinear") == 2
    quantize = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    assert quantize.outputs[0].dtype.name == (kind if symmetric == "true" else "U" + kind)
    span = 2 * np.abs(SEEN).max() if symmetric == "true" else SEEN.max() - SEEN.min()
    steps = 2**bits - (2 if symmetric == "true" else 1)
    error = np.abs(on_grid(model, SEEN) - SEEN)
    assert error.max() <= span / steps / 2 * 1.001
    assert error.max() > span / steps / 4, "the range is no smaller than it says"


def test_channels_have_ranges_of_their_own() -> None:
    model, _ = calibrated("granularity=channel")
    channels = SEEN.reshape(-1, 32)
    error = np.abs(on_grid(model, SEEN) - SEEN).reshape(-1, 32)
    assert np.all(error.max(0) <= (channels.max(0) - channels.min(0)) / 510 * 1.001)


@pytest.mark.parametrize("rule", ["percentile,percentile=99", "mse", "output"])
def test_rules_that_clip_round_the_bulk_finer(rule: str) -> None:
    (wide, _), (narrow, _) = calibrated("bits=4,range=minmax"), calibrated(f"bits=4,range={rule}")
    bulk = np.float32(np.clip(SEEN, -0.5, 0.5))
    errors = [np.square(on_grid(m, bulk) - bulk).sum() for m in (wide, narrow)]
    assert errors[1] < 0.9 * errors[0]


def test_the_output_rule_weighs_channels_by_the_weights_that_read_them() -> None:
    model = fan_out()
    readers = [n for n in model.graph if n.name in ("q", "k", "v")]
    for node in readers:
        weight = node.inputs[1]
        array = weight.const_value.numpy().copy()
        array[:, 1:] *= 1e-3  # so that channel 0 alone counts
        weight.const_value = ir.tensor(array, name=weight.name)
    batch = np.random.default_rng(0).standard_normal((8, 3, 32), np.float32)
    batch[..., 1:] *= 0.02
    steps = parse_pipeline("quantize-activations{mode=static,bits=4,float_weights=true}")
    model, _ = PassManager(steps).run(model, calibration=[{"x": batch}])
    loss = np.square(on_grid(model, batch) - batch).mean((0, 1))
    assert loss[0] < 1.5 * (np.abs(batch).max() / 15) ** 2 / 3
    batch[..., 0] *= 1e-3
    assert loss[1:].mean() > 0.5 * np.square(batch[..., 1:]).mean(), "the others round to zero"


def test_values_that_lose_too_much_get_sixteen_bits() -> None:
    for least, kinds in ((1, {"UINT8"}), (100, {"UINT16"})):
        model, report = calibrated(f"least_sqnr={least}")
        assert {n.outputs[0].dtype.name for n in model.graph if n.op_type == "QuantizeLinear"} == kinds
        assert {s.details["bits"] for s in report.sites} == {16 if kinds == {"UINT16"} else 8}
        assert all(30 < s.details["sqnr_db"] < 50 for s in report.sites)


@pytest.mark.parametrize(
    ("options", "opset", "needed"),
    [
        ("granularity=token", 13, 18),
        ("mode=static,bits=16", 13, 21),
        ("mode=static,least_sqnr=30", 13, 21),
        ("mode=static,granularity=channel", 11, 13),
        ("", 10, 11),
    ],
)
def test_a_model_of_an_older_opset_is_left_alone_or_served(options: str, opset: int, needed: int) -> None:
    steps = parse_pipeline(f"quantize-activations{{float_weights=true,{options}}}")
    for found in (opset, needed):
        model = fan_out()
        model.graph.opset_imports[""] = found
        if found < needed:
            with pytest.raises(UnsupportedError, match=f"opset {found}, expected at least {needed}"):
                PassManager(steps).run(model, calibration=BATCHES)
        else:
            _, reports = PassManager(steps).run(model, calibration=BATCHES)
            assert {s.outcome for s in reports[-1].sites} == {Outcome.CHANGED}
            assert model.graph.opset_imports[""] == found, "raising it would change what other operators mean"


def test_a_value_that_is_not_finite_on_calibration_data_is_left_alone() -> None:
    bad = [{"x": np.where(b["x"] > 2, np.nan, b["x"]).astype(np.float32)} for b in BATCHES]
    steps = parse_pipeline("quantize-activations{mode=static,float_weights=true}")
    with pytest.raises(UnsupportedError, match="not finite"):
        PassManager(steps, verify=False).run(fan_out(), calibration=bad)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"granularity": "channel"},
        {"mode": "never"},
        {"clip": 1.5},
        {"range": "entropy"},
        {"percentile": 40.0},
        {"granularity": "token", "mode": "static"},
        {"bits": 6, "mode": "static"},
    ],
)
def test_other_choices_are_refused_when_the_pass_is_built(options: dict) -> None:
    name = next(iter(options))
    with pytest.raises(InputError, match=f"Expected {name}"):
        QuantizeActivations(**options)
