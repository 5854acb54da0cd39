"""Packing of projections: which groups become one product, and that the product is the same."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.quant import read_weight
from qc.passes.base import Outcome
from qc.passes.fuse.pack_projections import PackProjections
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.weights import QuantizeWeights

COLUMNS = 64


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))


def projections(
    rows: Sequence[int], biases: Sequence[bool] = (), dtypes: Sequence[type] = (), scopes: Sequence[str] = ()
) -> Model:
    """Layers that read the same input and are all outputs; a narrower weight lies behind a Cast."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["batch", "seq", COLUMNS]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, constants, outputs = [], [], []
    for i, size in enumerate(rows):
        dtype = dtypes[i] if dtypes else np.float32
        weight = constant(f"w{i}", rng.standard_normal((size, COLUMNS)).astype(dtype))
        constants.append(weight)
        if dtype is not np.float32:
            nodes.append(ir.node("Cast", [weight], {"to": int(ir.DataType.FLOAT)}))
            cast = nodes[-1].outputs[0]
            cast.name, cast.dtype, cast.shape = f"w{i}.float", ir.DataType.FLOAT, weight.shape
            weight = cast
        bias = constant(f"b{i}", rng.standard_normal(size).astype(np.float32)) if biases and biases[i] else None
        constants += [bias] if bias is not None else []
        nodes.append(dialect.linear(x, weight, bias, name=f"layer{i}"))
        if scopes:
            nodes[-1].metadata_props["qc.scope"] = scopes[i]
        outputs.append(nodes[-1].outputs[0])
        outputs[-1].name = f"y{i}"
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports={"": 23}, name="g")
    return Model.of(ir.Model(graph, ir_version=10))


def run(model: Model, *before: QuantizeWeights | QuantizeActivations) -> tuple[Model, PassReport]:
    """Runs the pass last; the manager compares outputs before and after in ONNX Runtime."""
    model, reports = PassManager([Step(p, optional=True) for p in (*before, PackProjections())]).run(model)
    return model, reports[-1]


def ops(model: Model) -> list[str]:
    return [n.op_type for n in model.graph]


@pytest.mark.parametrize("rows", [(32, 32), (64, 16, 16), (8, 24, 40, 1)])
def test_layers_on_one_value_become_one_and_a_split(rows: tuple[int, ...]) -> None:
    model, report = run(projections(rows))
    assert ops(model) == ["Linear", "Split"]
    linear, split = model.graph
    assert linear.inputs[1].shape == [sum(rows), COLUMNS]
    assert [o.name for o in model.graph.outputs] == [f"y{i}" for i in range(len(rows))]
    assert list(split.outputs) == list(model.graph.outputs)
    assert report.contract == "exact"
    assert [(s.name, s.outcome) for s in report.sites] == [(f"layer{i}", Outcome.CHANGED) for i in range(len(rows))]
    assert len(model.graph.initializers) == 2


@pytest.mark.parametrize("biases", [(True, True), (False, True), (True, False)])
def test_missing_biases_become_zeros_where_another_layer_has_one(biases: tuple[bool, bool]) -> None:
    model, _ = run(projections((16, 32), biases))
    bias = read_weight(model.graph[0].inputs[2]).numpy()
    assert [bool(part.any()) for part in np.split(bias, [16])] == list(biases)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_stay_narrow(dtype: type) -> None:
    model, _ = run(projections((32, 16), dtypes=(dtype, dtype)))
    assert ops(model) == ["Cast", "Linear", "Split"]
    assert read_weight(model.graph[1].inputs[1]).stored_bytes == 48 * COLUMNS * 2


@pytest.mark.parametrize(
    "options", [{"format": "uint4"}, {"format": "int2", "scale": "f16"}, {"format": "int8", "group": 0}]
)
def test_codes_and_scales_are_kept(options: dict) -> None:
    separate, _ = PassManager([QuantizeWeights(**options)]).run(projections((32, 5, 16)))
    parts = [read_weight(n.inputs[1]).quantized() for n in separate.graph if n.op_type == "Linear"]
    packed, report = run(projections((32, 5, 16)), QuantizeWeights(**options))
    whole = read_weight(next(n for n in packed.graph if n.op_type == "Linear").inputs[1])
    assert np.array_equal(whole.quantized().codes, np.concatenate([p.codes for p in parts]))
    assert np.array_equal(whole.quantized().decode(), np.concatenate([p.decode() for p in parts]))
    assert max(d.max_abs for d in report.differences) < 1e-4
    assert whole.name == "w0+w1+w2"
    assert whole.stored_bytes * 8 == whole.quantized().stored_bits


def test_layers_on_quantized_activations_are_packed_too() -> None:
    model, _ = run(projections((32, 16)), QuantizeWeights(format="int8", group=0), QuantizeActivations())
    assert ops(model).count("Linear") == 1
    assert ops(model).count("DynamicQuantizeLinear") == 1


def test_the_packed_layer_carries_the_module_paths_of_all() -> None:
    model, report = run(projections((32, 16), scopes=("attn.q", "attn.k")))
    assert model.graph[0].metadata_props["qc.scope"] == "attn.q+attn.k"
    assert [s.name for s in report.sites] == ["attn.q", "attn.k"]


def test_a_layer_alone_on_its_value_is_no_site() -> None:
    model, report = run(projections((32,)))
    assert (ops(model), list(report.sites), report.modified) == (["Linear"], [], False)


def test_more_than_four_readers_are_left_alone() -> None:
    model, report = run(projections((8,) * 5))
    assert ops(model) == ["Linear"] * 5
    assert "more than 4" in report.sites[0].reason


def test_only_weights_stored_alike_go_together() -> None:
    model, report = run(projections((8, 16, 24), dtypes=(np.float32, np.float16, np.float32)))
    assert ops(model).count("Linear") == 2
    assert next(n for n in model.graph if n.op_type == "Split").outputs[1].name == "y2"
    reasons = {s.name: s.reason for s in report.sites if s.outcome is Outcome.SKIPPED}
    assert reasons == {"layer1": "no other layer that reads this value has a weight in FLOAT16"}


def test_a_weight_with_another_reader_is_left_alone() -> None:
    model = projections((32, 16))
    shared = next(iter(model.graph.initializers.values()))
    model.graph.append(ir.node("Identity", [shared]))
    model.graph[-1].outputs[0].name = "copy"
    model.graph[-1].outputs[0].type, model.graph[-1].outputs[0].shape = shared.type, shared.shape
    model.graph.outputs.append(model.graph[-1].outputs[0])
    model, report = run(model)
    assert ops(model).count("Linear") == 2
    assert "used elsewhere" in report.sites[0].reason


def test_computed_weights_are_left_alone() -> None:
    model = projections((32, 32))
    weight = ir.Value(name="w", shape=ir.Shape((32, COLUMNS)), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(weight)
    model.graph[1].replace_input_with(1, weight)
    _, report = run(model)
    assert "its weight is computed" in [s.reason for s in report.sites]


def attended(model: Model) -> Model:
    """Two of the layers as queries and keys of an attention; the others stay as they are."""
    q, k, v = (n.outputs[0] for n in list(model.graph)[:3])
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    model.graph.append(ir.node("Attention", [q, k, v], heads))
    out = model.graph[-1].outputs[0]
    out.name, out.type, out.shape = "attended", q.type, q.shape
    model.graph.outputs[:] = [out, *list(model.graph.outputs)[3:]]
    return model


def test_decoding_kernels_pack_what_attention_reads_and_nothing_else() -> None:
    model = attended(projections((32, 32, 32, 16, 16)))
    steps = [QuantizeWeights(format="uint4"), Step(PackProjections(everywhere=False))]
    model, reports = PassManager(steps).run(model)
    assert [n.inputs[1].shape[0] for n in model.graph if n.op_type == "Linear"] == [96, 16, 16]
    assert [s.outcome for s in reports[-1].sites].count(Outcome.CHANGED) == 3
    assert {s.reason for s in reports[-1].sites if s.name in ("layer3", "layer4")} == {
        "its kernel decodes weights, and no attention reads the product packed"
    }


@pytest.mark.parametrize("before", [(), (QuantizeWeights(format="int8", group=0), QuantizeActivations())])
def test_kernels_that_do_not_decode_pack_everything(before: tuple) -> None:
    steps = [Step(p) for p in (*before, PackProjections(everywhere=False))]
    model, _ = PassManager(steps).run(projections((32, 16)))
    assert ops(model).count("Linear") == 1
