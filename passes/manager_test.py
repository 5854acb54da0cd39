"""The manager holds every pass to its contract."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from qc.ir import dialect
from qc.ir.errors import ContractError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes import judge
from qc.passes.base import Contract, Exact, Lossy, Outcome, Pass, Result, Site, Structural
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array.astype(np.float32), name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))


def _model() -> Model:
    """Two products with a swish between them."""
    rng = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 8])
    w, v = _constant("w", rng.standard_normal((8, 8))), _constant("v", rng.standard_normal((4, 8)))
    first = dialect.linear(x, w, name="first")
    act = dialect.swish(first.outputs[0], name="act")
    last = dialect.linear(act.outputs[0], v, name="last")
    for node, name in ((first, "a"), (act, "b"), (last, "y")):
        node.outputs[0].name = name
    graph = ir.Graph(
        [x], [last.outputs[0]], nodes=[first, act, last], initializers=[w, v], opset_imports={"": 23}, name="g"
    )
    return Model.of(ir.Model(graph, ir_version=10))


@dataclasses.dataclass(frozen=True)
class ScaleWeight(Pass):
    """Multiplies the first product's weight."""

    factor: float = 1.0

    def call(self, model, context=None):
        node = next(n for n in model.graph if n.name == "first")
        weight = node.inputs[1]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(self.factor), name="w")
        return Result.of(model, [Site("first", Outcome.CHANGED)])


@dataclasses.dataclass(frozen=True)
class ScaleWeightLossily(ScaleWeight):
    """The same, admitting it."""

    contract: ClassVar[Contract] = Lossy()


@dataclasses.dataclass(frozen=True)
class FindNothing(Pass):
    """Skips everything."""

    def call(self, model, context=None):
        return Result.of(model, [Site("first", Outcome.SKIPPED, "it is not round")])


@dataclasses.dataclass(frozen=True)
class RenameOutput(Pass):
    """Changes the outputs, so that nothing is comparable."""

    contract: ClassVar[Contract] = Structural()

    def call(self, model, context=None):
        model.graph.outputs[0].name = "z"
        return Result.of(model, [Site("y", Outcome.CHANGED)])


@dataclasses.dataclass(frozen=True)
class RenameValues(Pass):
    """Gives the last inner value another name, which changes nothing."""

    def call(self, model, context=None):
        model.graph[1].outputs[0].name += "_"
        return Result.of(model, [Site("act", Outcome.CHANGED)])


def test_an_exact_pass_that_is_exact_goes_through():
    _, (report,) = PassManager([ScaleWeight()]).run(_model())
    assert report.contract == "exact"
    assert report.modified
    assert [d.max_abs for d in report.differences] == [0.0]


def test_an_exact_pass_that_is_not_stops_with_its_name_and_the_first_value_that_differs():
    with pytest.raises(ContractError, match=r"scale-weight .*'a'.*qc::Linear"):
        PassManager([ScaleWeight(factor=1.5)]).run(_model())


@dataclasses.dataclass(frozen=True)
class Stumble(Pass):
    """Fails on a model whose first weight was scaled."""

    def call(self, model, context=None):
        weight = next(n for n in model.graph if n.name == "first").inputs[1].const_value.numpy()
        if not np.array_equal(weight, np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)):
            raise KeyError("lost")
        return Result.of(model, [])


def test_exact_neighbours_are_compared_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(judge, "Session", lambda model: loaded.append(model) or Session(model))
    _, reports = PassManager([ScaleWeight(), ScaleWeight(), FindNothing(), ScaleWeight()]).run(_model())
    assert len(loaded) == 2  # before and behind
    assert [[d.max_abs for d in r.differences] for r in reports] == [[0.0], [0.0], [], [0.0]]
    assert [r.verify_seconds > 0 for r in reports] == [False, False, False, True]


@pytest.mark.parametrize("after", [RenameValues(), Stumble()])
def test_among_exact_neighbours_the_one_at_fault_is_named(after):
    with pytest.raises(ContractError, match=r"Pass scale-weight promises .*'a'.*qc::Linear"):
        PassManager([RenameValues(), ScaleWeight(factor=1.5), after]).run(_model())


def test_exact_neighbours_that_each_keep_their_promise_may_add_up():
    steps = [ScaleWeight(factor=1 + 8e-5), ScaleWeight(factor=1 + 8e-5)]
    model, reports = PassManager(steps).run(_model())
    assert len(reports) == 2
    scaled = ScaleWeight(factor=(1 + 8e-5) ** 2).call(_model()).model
    assert np.allclose(*(next(iter(m.graph)).inputs[1].const_value.numpy() for m in (model, scaled)), rtol=1e-6)


@pytest.mark.parametrize(("factor", "passes"), [(1.001, True), (1.5, False)])
def test_where_activations_are_rounded_one_step_of_the_grid_is_no_breach(factor, passes):
    model = _model()
    x = model.graph.inputs[0]
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    decode = ir.node("DequantizeLinear", list(quantize.outputs))
    decode.outputs[0].type = x.type
    model.graph.insert_before(model.graph.node(0), [quantize, decode])
    model.graph.node(2).replace_input_with(0, decode.outputs[0])
    manager = PassManager([ScaleWeight(factor)])
    if passes:
        manager.run(model)
        return
    with pytest.raises(ContractError, match="scale-weight"):
        manager.run(model)


def test_a_lossy_pass_has_its_error_measured():
    _, (report,) = PassManager([ScaleWeightLossily(factor=1.1)]).run(_model())
    (difference,) = report.differences
    assert difference.output == "y"
    assert 5 < difference.sqnr < 40


def test_an_exact_pass_is_compared_with_what_the_lossy_one_left():
    _, reports = PassManager([ScaleWeightLossily(factor=1.1), ScaleWeight()]).run(_model())
    assert reports[1].differences[0].max_abs == 0.0


def test_a_pass_that_was_asked_for_and_finds_nothing_is_an_error_with_its_reasons():
    with pytest.raises(UnsupportedError, match="it is not round"):
        PassManager([Step(FindNothing())]).run(_model())


def test_an_optional_pass_may_find_nothing():
    _, (report,) = PassManager([Step(FindNothing(), optional=True)]).run(_model())
    assert not report.modified
    assert report.count(Outcome.SKIPPED) == 1


def test_a_structural_pass_is_not_compared():
    model, (report,) = PassManager([RenameOutput()]).run(_model())
    assert report.differences == ()
    assert model.signature.outputs[0].name == "z"


def test_a_pass_that_leaves_an_illegal_node_is_refused_by_the_stage():
    @dataclasses.dataclass(frozen=True)
    class Foreign(Pass):
        """Inserts an operator of an unknown domain."""

        def call(self, model, context=None):
            node = ir.node("Mystery", [model.graph.inputs[0]], domain="elsewhere", name="mystery")
            model.graph.insert_before(model.graph[0], node)
            return Result.of(model, [Site("mystery", Outcome.CHANGED)])

    with pytest.raises(ContractError, match="elsewhere::Mystery"):
        PassManager([Foreign()]).run(_model())


def test_without_verification_nothing_is_run():
    _, (report,) = PassManager([ScaleWeight(factor=1.5)], verify=False).run(_model())
    assert report.differences == ()


def test_passes_of_onnx_ir_run_in_our_manager_and_ours_in_theirs():
    model, reports = PassManager([common.RemoveUnusedNodesPass(), ScaleWeight()]).run(_model())
    assert [r.name for r in reports] == ["RemoveUnusedNodesPass", "scale-weight"]
    assert ir.passes.Sequential(ScaleWeight(), common.RemoveUnusedNodesPass())(model).modified


def test_observers_hear_of_each_pass_before_and_after():
    heard = []
    PassManager([ScaleWeight()], observer=lambda name, report: heard.append((name, report is not None))).run(_model())
    assert heard == [("scale-weight", False), ("scale-weight", True)]


def test_a_pass_keeps_the_roles_of_inputs_and_outputs():
    model = _model()
    model.graph.inputs[0].metadata_props["qc.role"] = "hidden"
    model, _ = PassManager([ScaleWeight()]).run(model)
    assert model.signature.inputs[0].role == "hidden"


DECODER = """
  g (int64[batch,seq] ids, float[batch,2,past,4] k0, float[batch,2,past,4] v0)
    => (float[batch,seq,10] y, float[batch,2,total,4] k1, float[batch,2,total,4] v1) {
    x = Gather (table, ids)
    q = qc.Linear (x, wq)  k = qc.Linear (x, wk)  v = qc.Linear (x, wv)
    qs = Reshape (q, split)  ks = Reshape (k, split)  vs = Reshape (v, split)
    qh = Transpose <perm=[0,2,1,3]> (qs)  kh = Transpose <perm=[0,2,1,3]> (ks)  vh = Transpose <perm=[0,2,1,3]> (vs)
    k1 = Concat <axis=2> (k0, kh)  v1 = Concat <axis=2> (v0, vh)
    a = Attention (qh, k1, v1)
    t = Transpose <perm=[0,2,1,3]> (a)  f = Reshape (t, joined)  y = qc.Linear (f, wo)
  }
"""
ROLES = {
    "ids": "tokens",
    "k0": "past_key.0",
    "v0": "past_value.0",
    "k1": "present_key.0",
    "v1": "present_value.0",
    "y": "logits",
}


def _decoder() -> Model:
    rng = np.random.default_rng(0)
    shapes = {"table": (10, 8), "wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (10, 8)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    integers = {"split": np.array([0, 0, 2, 4]), "joined": np.array([0, 0, 8])}
    return parse(DECODER, weights=weights | integers, roles=ROLES)


@dataclasses.dataclass(frozen=True)
class ScaleValues(Pass):
    """Multiplies the values of attention by a factor, and divides what reads them."""

    contract: ClassVar[Contract] = Exact(cache=False)

    factor: float = 2.0
    back: float = 0.5

    def call(self, model, context=None):
        for name, factor in (("wv", self.factor), ("wo", self.back)):
            weight = model.graph.initializers[name]
            weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name=name)
        return Result.of(model, [Site("wv", Outcome.CHANGED)])


@dataclasses.dataclass(frozen=True)
class ScaleValuesSilently(ScaleValues):
    """The same, claiming that the cache holds what it held."""

    contract: ClassVar[Contract] = Exact()


def test_a_cache_in_other_coordinates_is_judged_by_the_step_that_reads_it():
    _, (first, second) = PassManager([ScaleValues(), ScaleValuesSilently(1.0, 1.0)]).run(_decoder())
    assert {d.output for d in first.differences} == {"y"}
    assert {d.output for d in second.differences} == {"y", "k1", "v1"}


@pytest.mark.parametrize("action", [ScaleValues(back=1.0), ScaleValuesSilently()])
def test_a_cache_that_the_model_itself_does_not_understand_is_a_breach(action):
    with pytest.raises(ContractError, match="scale-values"):
        PassManager([action]).run(_decoder())


def test_a_pass_that_breaks_only_the_step_behind_a_cache_is_found():
    @dataclasses.dataclass(frozen=True)
    class ScaleNewValues(ScaleValues):
        """Forgets that values of the cache are read beside new ones."""

        def call(self, model, context=None):
            node = next(n for n in model.graph if n.outputs[0].name == "v1")
            double = ir.node("Mul", [node.inputs[0], _constant("two", np.full(1, 2.0))])
            double.outputs[0].type, double.outputs[0].shape = node.outputs[0].type, node.inputs[0].shape
            model.graph.register_initializer(double.inputs[1])
            model.graph.insert_before(node, double)
            node.replace_input_with(0, double.outputs[0])
            return Result.of(model, [Site("v1", Outcome.CHANGED)])

    with pytest.raises(ContractError, match=r"scale-new-values .* 'y'"):
        PassManager([ScaleNewValues()]).run(_decoder())


def test_a_cache_of_unknown_origin_is_not_compared_in_other_coordinates():
    model = _decoder()
    given = {n: np.ones((1, 2, 3, 4), np.float32) for n in ("k0", "v0")} | {"ids": np.zeros((1, 1), np.int64)}
    _, (report,) = PassManager([ScaleValues()]).run(model, probe=[given])
    assert report.differences == ()
