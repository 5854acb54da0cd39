"""The sweep works part by part, on what the parts before it yield by then."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import ContractError, InputError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import BlockPass, Context, Contract, Exact, Lossy, Outcome, Result, Site
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.weights import QuantizeWeights
from qc.passes.statistics import Request, Statistic

WIDTH, BLOCKS = 64, 3


def network(tied: bool = False) -> Model:
    """``x + swish(x W)`` three times, between an embedding and a product with the same table if `tied`."""
    rng = np.random.default_rng(0)
    tokens = ir.val("tokens", ir.DataType.INT64, ["batch", "seq"])
    table = _constant("table", rng.standard_normal((128, WIDTH)))
    nodes = [ir.node("Gather", [table, tokens], name="lookup")]
    x, weights = nodes[0].outputs[0], [table]
    for i in range(BLOCKS):
        weights.append(_constant(f"w{i}", rng.standard_normal((WIDTH, WIDTH)) / 8))
        product = dialect.linear(x, weights[-1], name=f"product{i}")
        act = dialect.swish(product.outputs[0], name=f"act{i}")
        add = ir.node("Add", [x, act.outputs[0]], name=f"add{i}")
        nodes += [product, act, add]
        x = add.outputs[0]
    if not tied:
        weights.append(_constant("head", rng.standard_normal((128, WIDTH))))
    nodes.append(dialect.linear(x, weights[0 if tied else -1], name="head"))
    for node in nodes:
        value = node.outputs[0]
        value.name, value.dtype = f"{node.name}.out", ir.DataType.FLOAT
        value.shape = ir.Shape(["batch", "seq", 128 if node.name == "head" else WIDTH])
    opsets = {"": 23}
    graph = ir.Graph(
        [tokens], [nodes[-1].outputs[0]], nodes=nodes, initializers=weights, opset_imports=opsets, name="g"
    )
    model = Model.of(ir.Model(graph, ir_version=10))
    dialect.sync_functions(model)
    return model


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array.astype(np.float32), name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))


def samples(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"tokens": rng.integers(0, 128, (2, 5))} for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Double(BlockPass):
    """Doubles the weights of products, and remembers the largest input of each."""

    contract: ClassVar[Contract] = Lossy()
    seen: ClassVar[dict[str, float]] = {}

    @property
    def sequential(self) -> bool:
        return True

    def needs(self, model: ir.Model) -> Sequence[Request]:
        return [Request(Statistic.ABS_MAX, n.inputs[0]) for n in model.graph if dialect.is_op(n, "Linear")]

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        assert context is not None
        sites = []
        for node in (n for n in model.graph if dialect.is_op(n, "Linear") and context.covers(n)):
            self.seen[str(node.name)] = float(context.statistics[Request(Statistic.ABS_MAX, node.inputs[0])].max())
            value = node.inputs[1]
            value.const_value = ir.tensor(2 * value.const_value.numpy(), name=value.name)
            sites.append(Site(str(node.name), Outcome.CHANGED))
        return Result.of(model, sites)


@dataclasses.dataclass(frozen=True)
class DoubleInSecret(Double):
    """The same, pretending that nothing changes."""

    contract: ClassVar[Contract] = Exact()


@dataclasses.dataclass(frozen=True)
class Sequential(QuantizeWeights):
    """Quantizes part by part."""

    @classmethod
    def spec_name(cls) -> str:
        return "quantize-weights"

    @property
    def sequential(self) -> bool:
        return True


def weights(model: ir.Model) -> dict[str, bytes]:
    return {str(n): v.const_value.tobytes() for n, v in model.graph.initializers.items()}


def test_each_part_sees_what_the_changed_parts_before_it_yield() -> None:
    model = network()
    Double.seen.clear()
    changed, _ = PassManager([Double()]).run(model, calibration=samples())
    inputs = {str(n.name): n.inputs[0] for n in changed.graph if dialect.is_op(n, "Linear")}
    observer = changed.clone()
    observer.graph.outputs.extend(
        v for n in observer.graph for v in n.outputs if v.name in {x.name for x in inputs.values()}
    )
    session, largest = Session(observer), dict.fromkeys(inputs, 0.0)
    for outputs in map(session.run, samples()):
        for name, value in inputs.items():
            largest[name] = max(largest[name], float(np.abs(outputs[value.name]).max()))
    assert Double.seen == pytest.approx(largest, rel=1e-6)


def test_the_report_tells_how_far_each_part_is_from_the_float_network() -> None:
    before, batches = network(), samples(2)
    _, (report,) = PassManager([Sequential()]).run(before.clone(), calibration=batches)
    errors = {e.label: (e.before, e.after) for e in report.blocks}
    assert list(errors) == ["stem", "block 0.0", "block 0.1", "block 0.2", "tail"]
    changed, _ = PassManager([Sequential()]).run(before.clone(), calibration=batches)
    outputs = [_inner(m, "add1.out", batches) for m in (before, changed)]
    noise = np.square(outputs[1] - outputs[0]).sum() / np.square(outputs[0]).sum()
    assert errors["block 0.1"][1] == pytest.approx(-10 * np.log10(noise), abs=1e-3)
    assert errors["block 0.2"][0] == errors["block 0.1"][1]
    assert {s.details["block"] for s in report.sites} == {"stem", "block 0.0", "block 0.1", "block 0.2", "tail"}


def _inner(model: Model, name: str, batches: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    probe = model.clone()
    probe.graph.outputs.extend(v for n in probe.graph for v in n.outputs if v.name == name)
    session = Session(probe)
    return np.concatenate([session.run(b)[name].reshape(-1) for b in batches]).astype(np.float64)


def test_a_sweep_lists_the_sites_of_one_call_on_everything() -> None:
    swept = PassManager([Sequential()]).run(network(), calibration=samples())[1][0]
    alone = PassManager([QuantizeWeights()]).run(network(), calibration=samples())[1][0]
    assert [s.name for s in swept.sites] == [s.name for s in alone.sites]
    assert [s.outcome for s in swept.sites] == [s.outcome for s in alone.sites]


def test_a_table_that_two_parts_share_is_quantized_once() -> None:
    changed, (report,) = PassManager([Sequential()]).run(network(tied=True), calibration=samples())
    assert [n for n in weights(changed) if n.startswith("table")] == ["table.codes", "table.scale"]
    assert report.sites[-1].details["shared_with"] == report.sites[0].name


def test_static_ranges_are_those_of_what_the_changed_parts_yield() -> None:
    batches = samples()
    steps = [Step(Double()), Step(QuantizeActivations(mode="static", range="minmax", float_weights=True))]
    model, reports = PassManager(steps).run(network(), calibration=batches)
    assert {s.outcome for s in reports[-1].sites} == {Outcome.CHANGED}
    for node in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        seen = _inner(model, str(node.inputs[0].name), batches)
        scale = node.inputs[1].const_value.numpy()
        np.testing.assert_allclose(scale, (max(seen.max(), 0) - min(seen.min(), 0)) / 255, rtol=1e-3)


def test_weights_decide_static_ranges_in_a_sweep_too() -> None:
    steps = [Step(Double()), Step(QuantizeActivations(mode="static", bits=4, float_weights=True))]
    model, reports = PassManager(steps).run(network(), calibration=samples())
    assert {s.outcome for s in reports[-1].sites} == {Outcome.CHANGED}
    assert all(s.details["sqnr_db"] > 10 for s in reports[-1].sites)
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph) == BLOCKS + 1


def test_activations_in_files_give_the_same_bytes(tmp_path) -> None:
    batches = [{"tokens": np.random.default_rng(2).integers(0, 128, (8, 64))}] * 3
    found = [
        weights(PassManager([Sequential()]).run(network(), calibration=batches, context=Context(**options))[0])
        for options in ({}, {"activations": 0, "work": tmp_path / "a"}, {"activations": 200_000})
    ]
    assert found[0] == found[1] == found[2]
    assert (tmp_path / "a").is_dir()
    assert not list((tmp_path / "a").iterdir()), "no file outlives its array"


def test_a_pass_that_breaks_its_promise_is_stopped_at_the_block_where_it_does() -> None:
    with pytest.raises(ContractError, match=r"double-in-secret must not change what block 0\.0 computes"):
        PassManager([DoubleInSecret()]).run(network(), calibration=samples())


def test_numbers_that_are_none_are_refused_with_the_block_and_the_sample() -> None:
    model = network()
    table = model.graph.initializers["table"].const_value.numpy().copy()
    table[7] = np.nan
    model.graph.initializers["table"].const_value = ir.tensor(table, name="table")
    batches = [{"tokens": np.array([[1, 2]])}, {"tokens": np.array([[1, 7]])}]
    with pytest.raises(InputError, match=r"found NaN in 'lookup\.out', an output of stem .* batch 1"):
        PassManager([Double()], verify=False).run(model, calibration=batches)


def test_neighbours_join_the_sweep_and_others_end_it() -> None:
    steps = [Step(QuantizeWeights(exclude=("w", "head"))), Step(Double()), Step(QuantizeWeights(format="uint4"))]
    _, reports = PassManager(steps).run(network(), calibration=samples())
    assert [[s.details["block"] for s in r.sites][:2] for r in reports] == [
        ["stem", "block 0.0"], ["block 0.0", "block 0.1"], ["stem", "block 0.0"]
    ]  # fmt: skip
    assert [bool(r.blocks) for r in reports] == [False, False, True]


def test_a_network_without_repeats_is_one_part() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 64])
    w = _constant("w", np.random.default_rng(0).standard_normal((80, 64)))
    node = dialect.linear(x, w, name="only")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["batch", 80])
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    model = Model.of(ir.Model(graph, ir_version=10))
    _, (report,) = PassManager([Sequential()]).run(model)
    (error,) = report.blocks
    assert error.label == "stem"
    assert error.before is None
    assert error.after == pytest.approx(23, abs=5)


EXPERT = """
    g (float[n,64] x, bool[n] chosen) => (float[n,64] y) {
      rows = Compress <axis = 0> (x, chosen)
      h = qc.Linear (rows, w)
      total = ReduceSum <keepdims = 1> (h, axes)
      y = Add (x, total)
    }
"""


@pytest.mark.parametrize("assign", ["search", "gptq"])
def test_an_expert_that_no_token_is_sent_to_is_quantized_as_if_nothing_were_known(assign: str) -> None:
    rng = np.random.default_rng(0)
    model = parse(EXPERT, weights={"w": rng.standard_normal((64, 64)).astype(np.float32), "axes": np.array([0])})
    batch = {"x": rng.standard_normal((6, 64)).astype(np.float32), "chosen": np.zeros(6, bool)}
    _, (report,) = PassManager([Sequential(assign=assign)]).run(model, calibration=[batch], probe=[batch])
    (site,) = report.sites
    assert site.outcome is Outcome.CHANGED
    assert site.details["sqnr_db"] > 20
