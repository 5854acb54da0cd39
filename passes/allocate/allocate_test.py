"""The allocation on small networks: budgets, monotony, and that quantize-weights follows it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.model import Model, set_role
from qc.ir.pooling import embedding
from qc.ir.quant import Format
from qc.ir.runtime import Session
from qc.passes.allocate._costs import relative_time
from qc.passes.allocate._trial import Trial
from qc.passes.allocate.allocate import Allocate
from qc.passes.base import Context, Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step, format_pipeline, parse_pipeline
from qc.passes.quantize._sites import weight_uses
from qc.passes.quantize.weights import QuantizeWeights

pytest.importorskip("scipy", reason="the solver comes with the allocate extra")

WIDTH, VOCABULARY = 64, 128


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def network(*, tied: bool = False, role: str = "logits") -> Model:
    """Embedding, three layers of which the second hardly matters, head."""
    tokens = ir.Value(name="ids", shape=ir.Shape(["batch", "seq"]), type=ir.TensorType(ir.DataType.INT64))
    set_role(tokens, "tokens")
    constants, nodes = {}, []

    def constant(name: str, array: np.ndarray) -> ir.Value:
        if name not in constants:
            tensor = ir.tensor(array, name=name)
            constants[name] = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
        return constants[name]

    def add(node: ir.Node, width: int) -> ir.Value:
        nodes.append(node)
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"v{len(nodes)}", ir.DataType.FLOAT, ir.Shape(["batch", "seq", width])
        return out

    table = constant("table", normal(VOCABULARY, WIDTH))
    x = add(ir.node("Gather", [table, tokens], {}), WIDTH)
    for i, gain in enumerate((0.5, 0.001, 0.5)):
        y = add(dialect.linear(x, constant(f"layer{i}", normal(WIDTH, WIDTH, seed=i) / 8)), WIDTH)
        y = add(ir.node("Tanh", [y]), WIDTH)
        y = add(ir.node("Mul", [y, constant(f"gain{i}", np.float32([gain]))]), WIDTH)
        x = add(ir.node("Add", [x, y]), WIDTH)
    head = table if tied else constant("head", normal(VOCABULARY, WIDTH, seed=9) / 8)
    logits = add(dialect.linear(x, head), VOCABULARY)
    set_role(logits, role)
    graph = ir.Graph([tokens], [logits], nodes=nodes, initializers=constants.values(), opset_imports={"": 23}, name="g")
    model = Model.of(ir.Model(graph, ir_version=10))
    dialect.sync_functions(model)
    return model


def batches(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"ids": rng.integers(0, VOCABULARY, (1, 32))} for _ in range(count)]


def run(model: Model, *steps: object) -> tuple[Model, list[PassReport]]:
    return PassManager(steps).run(model, calibration=batches(), probe=batches(2))  # type: ignore[arg-type]


def formats(report: PassReport) -> dict[str, str]:
    return {s.name: str(s.details["format"]) for s in report.sites if s.outcome is Outcome.CHANGED}


def bits(model: Model) -> float:
    weights = {u.weight.data: u.weight for u in weight_uses(model) if u.weight is not None}.values()
    return 8 * sum(w.stored_bytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)


@pytest.mark.parametrize("budget", [3.5, 4.2, 5.0, 8.5])
def test_the_quantized_weights_fit_the_budget_as_planned(budget: float) -> None:
    model, (plan, done) = run(network(), Allocate(bits=budget, plans=1), QuantizeWeights())
    assert formats(plan) == formats(done)
    assert budget - 0.5 < bits(model) <= budget
    assert plan.modified
    assert all(d.max_abs == 0 for d in plan.differences)


def test_more_bits_go_where_they_are_missed() -> None:
    _, (plan,) = run(network(), Allocate(bits=5.0))
    size = {name: Format.parse(f).values.bits for name, f in formats(plan).items()}
    assert size["layer1"] < min(size["layer0"], size["layer2"])


def test_the_outputs_move_less_than_with_one_format_of_as_many_bits() -> None:
    model, (uniform,) = run(network(), QuantizeWeights(format="uint4", group=64, scale="f16"))
    _, (_, planned) = run(network(), Allocate(bits=bits(model)), QuantizeWeights())
    assert planned.differences[0].sqnr > uniform.differences[0].sqnr


def test_fisher_information_tells_the_same_without_a_trial_of_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="gradients need torch")
    monkeypatch.setattr(Trial, "divergence", None)
    model, (plan, _) = run(network(), Allocate(bits=5.0, metric="fisher", plans=1), QuantizeWeights())
    assert 4.5 < bits(model) <= 5.0
    size = {name: Format.parse(f).values.bits for name, f in formats(plan).items()}
    assert size["layer1"] < min(size["layer0"], size["layer2"])


def test_formats_may_have_low_rank_terms() -> None:
    """LQ-LoRA: configurations of NF with a low-rank term, within a size."""
    choices = tuple(f"nf{b}:g16:q8x16+lowrank2" for b in (2, 3, 4))
    model, (plan, done) = run(network(), Allocate(bits=5.5, formats=choices, plans=1), QuantizeWeights())
    assert formats(plan) == formats(done)
    assert len(set(formats(plan).values())) > 1
    assert bits(model) <= 5.5


def test_groups_of_columns_may_have_widths_of_their_own() -> None:
    """SliM-LLM: within a weight, as many columns with a bit more as with one less; how many is chosen."""
    mixes = [f"mid1:g16:f16+columns{100 - p}:uint2:g16:f16+columns{100 * p / (100 - p):.1f}:uint3:g16:f16"
             for p in (10, 25)]  # fmt: skip
    choices = ("uint2:g16:f16", *mixes)
    _, (plan, done) = run(network(), Allocate(bits=3.9, formats=choices, plans=1), QuantizeWeights())
    assert formats(plan) == formats(done)
    assert set(formats(plan).values()) <= set(choices)


def test_parts_of_a_network_may_have_budgets_of_their_own() -> None:
    """MixDQ: two programs, one behind the other."""
    steps = Allocate(bits=3.2, exclude=("table", "head")), Allocate(bits=6.0, exclude=("layer",)), QuantizeWeights()
    model, _ = run(network(), *steps)
    stored = {u.weight.name: (u.weight.stored_bytes * 8, u.weight.shape) for u in weight_uses(model) if u.weight}
    for part, budget in ((["layer0", "layer1", "layer2"], 3.2), (["table", "head"], 6.0)):
        total = sum(n for name, (n, _) in stored.items() if name in part)
        assert budget - 1 < total / sum(s[0] * s[1] for name, (_, s) in stored.items() if name in part) <= budget


def test_a_shared_weight_has_one_format() -> None:
    model, (plan, _) = run(network(tied=True), Allocate(bits=4.5), QuantizeWeights())
    uses = [
        u for u in weight_uses(model) if u.name in ("table", "table.codes") or u.kind.value in ("head", "embedding")
    ]
    assert len(uses) == 2
    assert len({use.weight.data for use in uses if use.weight is not None}) == 1
    assert len(formats(plan)) == 4


def test_models_without_logits_are_judged_by_their_outputs() -> None:
    _, (plan,) = run(network(role="hidden"), Allocate(bits=4.2))
    assert any("plans moved by" in note for note in plan.notes)


def test_embeddings_get_more_bits_where_feedback_helps_products() -> None:
    bits = {}
    for codes in ("search", "gptq"):
        _, (plan,) = run(network(), Allocate(bits=4.5, assign=codes, plans=1))
        bits[codes] = {s.name: s.details["planned_bits"] for s in plan.sites if s.outcome is Outcome.CHANGED}
    assert bits["gptq"]["table"] > bits["search"]["table"]


def test_a_sentence_encoder_is_judged_by_its_embeddings() -> None:
    model, rows = network(role="hidden"), [b | {"mask": np.ones((1, 32), np.int64)} for b in batches()]
    mask = ir.Value(name="mask", shape=ir.Shape(["batch", "seq"]), type=ir.TensorType(ir.DataType.INT64))
    set_role(mask, "mask")
    model.graph.inputs.append(mask)
    model.record(pooling="mean")
    plan = {number: Format.parse("uint2:g64") for number, _ in enumerate(weight_uses(model))}
    found = Trial(model, Context(), rows).divergence(plan)
    manager = PassManager([QuantizeWeights(format="uint2", group=64, metric="none")], verify=False)
    quantized, _ = manager.run(model.clone())
    name = str(model.graph.outputs[0].name)
    hidden = [[Session(m).run(row)[name] for row in rows] for m in (model, quantized)]
    a, b = (np.array([embedding(v, rows[0]["mask"], "mean")[0] for v in values]) for values in hidden)
    assert found == pytest.approx(np.sum((a - b) ** 2) / np.sum(a**2), rel=1e-4)


def test_a_time_budget_is_kept() -> None:
    def time(report: PassReport) -> float:
        sizes = {"layer0": 1, "layer1": 1, "layer2": 1, "head": 2}
        found = {name: relative_time(Format.parse(formats(report)[name]), WIDTH, "ort-cpu") for name in sizes}
        return sum(sizes[name] * found[name] for name in sizes) / 5  # type: ignore[operator]

    _, (free,) = run(network(), Allocate(bits=5.5, plans=1))
    limit = 0.95 * time(free)
    _, (fast,) = run(network(), Allocate(bits=5.5, time=limit, plans=1))
    assert time(fast) <= limit + 1e-9
    assert formats(fast) != formats(free)


def test_a_target_with_kernels_of_3_bits_may_choose_them() -> None:
    choices = ("uint2:g64:f16", "uint3:g64:f16", "uint4:g64:f16")
    assert relative_time(Format.parse(choices[1]), WIDTH, "ort-cpu") is None
    _, (plan,) = run(network(), Allocate(bits=3.4, time=0.87, formats=choices, target="tvm-cpu", plans=1))
    assert choices[1] in formats(plan).values()


def test_an_excluded_weight_has_no_plan() -> None:
    model, (plan,) = run(network(), Allocate(bits=5.0, exclude=("layer1",)))
    assert "layer1" not in formats(plan)
    assert [u.name for u in weight_uses(model) if u.planned is None] == ["layer1"]


def test_a_budget_below_the_smallest_formats_is_refused() -> None:
    with pytest.raises(InputError, match="at least"):
        run(network(), Allocate(bits=2.0))


def test_nothing_is_planned_twice() -> None:
    model, _ = run(network(), Allocate(bits=5.0), QuantizeWeights())
    assert not any("qc.format" in n.metadata_props for n in model.graph)
    _, (plan,) = PassManager([Step(Allocate(bits=5.0), optional=True)]).run(model, calibration=batches())
    assert not plan.modified


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0.0},
        {"time": -1.0},
        {"formats": ()},
        {"formats": ("int99",)},
        {"target": "x"},
        {"assign": "x"},
        {"metric": "x"},
    ],
)
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        Allocate(**options)


def test_options_survive_the_spelling_as_a_pipeline() -> None:
    text = "allocate{bits=3.5,formats=[uint4:g32,int8:g128]}"
    assert format_pipeline(parse_pipeline(text)) == text
