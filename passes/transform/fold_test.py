"""Every line of the table of operators: what it admits folds exactly, what it forbids has a counterexample."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from channel_actions import NAMES, difference, random_action
from operator_cases import CASES, TOKENS, Case, between, build, forced, group_of, run

from qc.ir._channels_table import OPERATORS
from qc.ir._channels_trace import Trace, operator_name
from qc.ir.channels import ChannelGroup, find_groups
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.execute import Executor
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.ir.text import parse
from qc.passes.transform import _edits
from qc.passes.transform.actions import Action, Merge, Orthogonal, Permute, Scale, Shift, Split
from qc.passes.transform.fold import Folded, apply, fold

torch = pytest.importorskip("torch", reason="the models are run in float64 by the torch executor")

EXACT = 1e-10
CHANGED = 1e-3


def test_every_line_of_the_table_has_a_case() -> None:
    traces = [Trace(build(case).graph) for case in CASES.values()]
    met = {limit.key for trace in traces for limit in trace.limits}
    seen = {operator_name(node) for case in CASES.values() for node in build(case).graph}
    assert {key for key, rule in OPERATORS.items() if rule.forbids and rule.tracer != "opaque"} <= met
    assert {key for key, rule in OPERATORS.items() if rule.tracer} - {"opaque", "Resize"} <= seen


@pytest.mark.parametrize("action", ["permute", "scale", "sign", "shift", "orthogonal"])
def test_what_resizing_admits_keeps_the_function_in_the_runtime(action: str) -> None:
    text = (
        "g (float[2,3,5,5] x) => (float[2,4,H,W] y)"
        ' { h = Conv (x, w1, b1) z = Resize <mode="linear"> (h, , scales) y = Conv (z, w2) }'
    )
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 8, 1, 1)}
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    model = parse(text, weights=weights | {"scales": np.array([1, 1, 2, 2], np.float32)})
    feeds = {"x": rng.standard_normal((2, 3, 5, 5)).astype(np.float32)}
    before = Session(model).run(feeds)
    group = next(g for g in find_groups(model) if g.producers and g.consumers)
    fold(model, group, random_action(group, action, rng), Store())
    assert difference([before], [Session(model).run(feeds)]) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_operator_admits_what_the_table_says(name: str) -> None:
    case = CASES[name]
    group = group_of(build(case), case)
    assert group.admits == set(case.admits.split())
    assert all(f.why for f in group.forbids.values())


@pytest.mark.parametrize("action", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_admitted_actions_keep_the_function_and_others_change_it(name: str, action: str) -> None:
    case = CASES[name]
    model = build(case)
    before = run(model)
    group = group_of(model, case)
    chosen = random_action(group, action, np.random.default_rng(2))
    if action in group.admits:
        result = fold(model, group, chosen, Store(), dtype=np.float64)
        assert result.modified
        assert not result.added
        assert difference(before, run(model)) < EXACT
        return
    with pytest.raises(UnsupportedError, match="does not admit"):
        fold(model, group, chosen, Store())
    assert difference(before, run(model)) == 0.0
    try:
        apply(model, forced(group), chosen, Store(), dtype=np.float64)
        after = run(model)
    except (UnsupportedError, InputError):
        return  # the action cannot even be written down: no vector holds it, or shapes no longer fit
    shapes = [[a.shape for a in outputs.values()] for outputs in before + after]
    assert shapes[: len(before)] != shapes[len(before) :] or difference(before, after) > CHANGED


@pytest.mark.parametrize("name", ["nothing", "value", "LayerNormalization, output", "gate", "BatchNormalization"])
def test_folds_hold_in_the_float32_that_is_stored(name: str) -> None:
    model = build(CASES[name])
    before = run(model)
    for action in NAMES:
        group = group_of(model, CASES[name])
        if action in group.admits and action != "split":
            fold(model, group, random_action(group, action, np.random.default_rng(3)), Store())
    assert difference(before, run(model)) < 1e-4
    assert all(v.dtype.name == "FLOAT" for v in model.graph.initializers.values() if v.dtype.is_floating_point())


def test_forgetting_one_consumer_changes_the_function() -> None:
    case = Case(
        f"{TOKENS} {{ n = RMSNormalization (x, g) h = qc.Linear (n, w1) p = qc.Linear (n, w3) z = Add (h, p)"
        " y = qc.Linear (z, w2) }",
        "",
        {"w1": (8, 6), "w3": (8, 6), "w2": (5, 8), "g": (6,)},
        role="consumers",
    )
    model = build(case)
    before = run(model)
    group = group_of(model, case)
    short = dataclasses.replace(group, uses=tuple(u for u in group.uses if u.name != "w3"))
    apply(model, short, Scale(np.linspace(1, 3, 6)), Store())
    assert difference(before, run(model)) > CHANGED


def test_the_identity_leaves_the_model_bit_identical() -> None:
    model = build(CASES["gate"])
    tensors = {n: v.const_value for n, v in model.graph.initializers.items()}
    group = group_of(model, CASES["gate"])
    width = group.width
    for action in (Scale(np.ones(width)), Permute(np.arange(width)), Shift(np.zeros(width)), Split(np.ones(width, int)),
                   Merge(np.arange(width))):  # fmt: skip
        assert fold(model, group, action, Store()) == Folded()
    assert {n: v.const_value for n, v in model.graph.initializers.items()} == tensors


def test_weights_that_others_read_are_cloned_and_their_readers_left_alone() -> None:
    text = (
        "g (int64[batch,seq] x) => (float[batch,seq,10] y)"
        " { h = Gather (w1, x) n = RMSNormalization (h, g) y = qc.Linear (n, w1) }"
    )
    case = Case(text, "", {"w1": (10, 8), "g": (8,)}, "w1", "consumers")
    model = build(case)
    before = run(model)
    fold(model, group_of(model, case), Scale(np.linspace(1, 2, 8)), Store(), dtype=np.float64)
    table, head = (n.inputs[s] for n in model.graph for s in (0, 1) if n.inputs[s].name.startswith("w1"))
    assert table is not head
    assert table.name == "w1"
    assert difference(before, run(model)) < EXACT


def test_readers_that_change_alike_go_on_sharing_a_weight() -> None:
    text = between("p = qc.Linear:bias (x, w1, b1) z = Add (p, h)")
    model = build(Case(text, ""))
    group = next(g for g in find_groups(model) if g.producers and g.consumers)
    fold(model, group, Scale(np.linspace(1, 2, 8)), Store())
    assert len(model.graph.initializers) == 4


def test_a_slice_of_a_packed_weight_leaves_the_other_rows_untouched() -> None:
    text = (
        f"{TOKENS} {{ p = qc.Linear:bias (x, w1, b1) lengths = Constant <value_ints=[8,8]> ()"
        " s, u = Split <axis=-1> (p, lengths) a = qc.Swish <alpha=1.0> (s) z = Mul (a, u) y = qc.Linear (z, w2) }"
    )
    case = Case(text, "", {"w1": (16, 6), "b1": (16,), "w2": (5, 8)}, "w2", "consumers")
    model = build(case)
    before, old = run(model), model.graph.initializers["w1"].const_value.numpy()
    group = group_of(model, case)
    assert [u.name for u in group.producers] == ["w1"]
    fold(model, group, Scale(-np.linspace(1, 2, 8)), Store(), dtype=np.float64)
    new = model.graph.initializers["w1"].const_value.numpy()
    assert np.array_equal(new[:8], old[:8])
    assert not np.isclose(new[8:], old[8:]).any()
    assert difference(before, run(model)) < EXACT


def test_factors_that_differ_within_a_rotated_pair_are_refused_and_would_change_the_function() -> None:
    case = CASES["query and key, rotated"]
    model = build(case)
    before, group = run(model), group_of(model, case)
    untied = Scale(np.linspace(1, 2, group.width))
    with pytest.raises(InputError, match="cells"):
        fold(model, group, untied, Store())
    apply(model, group, untied, Store())
    assert difference(before, run(model)) > CHANGED


def test_one_key_head_answers_for_all_its_query_heads() -> None:
    model = build(CASES["value"])
    group = group_of(model, CASES["value"])
    assert group.width == 8
    assert np.array_equal(np.bincount(group.consumers[0].index), np.full(8, 2))


@pytest.mark.parametrize("action", ["scale", "shift", "permute", "orthogonal", "split"])
def test_an_operator_at_run_time_takes_up_what_weights_cannot(action: str) -> None:
    model = build(CASES["Gelu"])
    before, group = run(model), group_of(model, CASES["Gelu"])
    group = dataclasses.replace(group, admits=frozenset())
    forbids = dict.fromkeys(NAMES, next(iter(group.forbids.values())))
    group = dataclasses.replace(group, forbids=forbids)
    chosen = random_action(group, action, np.random.default_rng(5))
    result = fold(model, group, chosen, Store(), runtime=True, dtype=np.float64)
    assert result.added
    assert sum(cost for _, cost in result.added) <= 64
    assert difference(before, run(model)) < EXACT


def test_split_channels_carry_their_share_and_no_operator_is_added() -> None:
    model = build(CASES["gate"])
    before, nodes = run(model), len(model.graph)
    group = group_of(model, CASES["gate"])
    carrier = next(n for n in model.graph if n.op_type == "Mul").outputs[0]
    old = Executor(model, outputs=[carrier], dtype=torch.float64)({"x": np.ones((1, 1, 6), np.float32)})["z"][0, 0]
    fold(model, group, Split(np.array([4, 1, 1, 1, 1, 1, 1, 2])), Store(), dtype=np.float64)
    new = Executor(model, outputs=[carrier], dtype=torch.float64)({"x": np.ones((1, 1, 6), np.float32)})["z"][0, 0]
    np.testing.assert_allclose(new[[0, 8, 9, 10]], np.full(4, old[0] / 4))
    np.testing.assert_allclose(new[[7, 11]], np.full(2, old[7] / 2))
    assert len(model.graph) == nodes
    assert difference(before, run(model)) < EXACT


def test_the_error_of_a_merged_pair_is_a_quarter_of_the_product_of_differences() -> None:
    model = build(CASES["nothing"])
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((1, 50, 6)).astype(np.float32)}
    hidden = next(n for n in model.graph if n.outputs[0].name == "h").outputs[0]
    h = Executor(model, outputs=[hidden], dtype=torch.float64)(feeds)["h"][0].numpy()
    columns = model.graph.initializers["w2"].const_value.numpy().astype(np.float64)
    before = Executor(model, dtype=torch.float64)(feeds)["y"].numpy()
    fold(model, group_of(model, CASES["nothing"]), Merge(np.array([0, 1, 2, 3, 4, 5, 6, 6])), Store(), dtype=np.float64)
    after = Executor(model, dtype=torch.float64)(feeds)["y"].numpy()
    expected = 0.25 * ((h[:, 6] - h[:, 7]) ** 2).sum() * ((columns[:, 6] - columns[:, 7]) ** 2).sum()
    np.testing.assert_allclose(((after - before) ** 2).sum(), expected)


def test_equal_channels_merge_exactly() -> None:
    model = build(CASES["nothing"])
    for name in ("w1", "b1"):
        held = model.graph.initializers[name].const_value.numpy().copy()
        held[7] = held[6]
        model.graph.initializers[name].const_value = ir.tensor(held)
    before = run(model)
    fold(model, group_of(model, CASES["nothing"]), Merge(np.array([0, 1, 2, 3, 4, 5, 6, 6])), Store(), dtype=np.float64)
    assert difference(before, run(model)) < EXACT


def test_quantized_weights_are_refused_with_the_reason() -> None:
    from qc.passes.quantize.weights import QuantizeWeights

    case = Case(CASES["nothing"].text, "", {"w1": (32, 6), "b1": (32,), "w2": (5, 32), "b2": (5,)})
    model = build(case)
    assert QuantizeWeights(format="int8", group=0)(model).modified
    with pytest.raises(UnsupportedError, match="is quantized"):
        fold(model, group_of(model, case), Scale(np.full(32, 2.0)), Store())


@pytest.mark.parametrize(
    "action",
    [
        Scale(np.zeros(8)),
        Scale(np.ones(7)),
        Permute(np.zeros(8, int)),
        Split(np.zeros(8, int)),
        Shift(np.full(8, np.nan)),
    ],
)
def test_numbers_that_do_not_fit_are_refused(action: Action) -> None:
    model = build(CASES["nothing"])
    with pytest.raises(InputError, match="Expected"):
        fold(model, group_of(model, CASES["nothing"]), action, Store())


def heads_of(model: Model) -> list[ChannelGroup]:
    return [g for g in find_groups(model) if g.kind == "heads"]


def test_key_heads_move_with_their_query_heads_and_query_heads_within_a_key_head() -> None:
    model = build(CASES["query and key, rotated"])
    before = run(model)
    keys, queries = heads_of(model)
    assert (keys.width, queries.width) == (2, 4)
    assert {u.name for u in keys.uses if u.value is not None} == {"wq", "bq", "wk", "bk", "w1", "b1", "w2"}
    assert {u.name for u in queries.uses if u.value is not None} == {"wq", "bq", "w2"}
    fold(model, keys, Permute(np.array([1, 0])), Store(), dtype=np.float64)
    fold(model, heads_of(model)[1], Permute(np.array([1, 0, 2, 3])), Store(), dtype=np.float64)
    assert difference(before, run(model)) < EXACT


def test_a_query_head_cannot_leave_its_key_head() -> None:
    model = build(CASES["value"])
    before, queries = run(model), heads_of(model)[1]
    with pytest.raises(InputError, match="blocks"):
        fold(model, queries, Permute(np.array([2, 1, 0, 3])), Store())
    apply(model, queries, Permute(np.array([2, 1, 0, 3])), Store())
    assert difference(before, run(model)) > CHANGED


def test_pairs_of_a_rotary_embedding_turn_but_do_not_flip() -> None:
    model = build(CASES["query and key, rotated"])
    before, group = run(model), group_of(model, CASES["query and key, rotated"])
    flip = Orthogonal(np.diag([-1.0] + [1.0] * 7))
    with pytest.raises(InputError, match="not reflections"):
        fold(model, group, flip, Store())
    apply(model, group, flip, Store())
    assert difference(before, run(model)) > CHANGED


def test_a_rotation_without_centring_or_with_gains_left_in_place_changes_the_function() -> None:
    for name in ("LayerNormalization, input", "RMSNormalization, input"):
        model = build(CASES[name])
        before, group = run(model), group_of(model, CASES[name])
        uses = tuple(u for u in group.family.uses if u.role != "gain")
        family = dataclasses.replace(group.family, uses=uses, centred=())
        chosen = random_action(group, "orthogonal", np.random.default_rng(4))
        apply(model, dataclasses.replace(group, family=family), chosen, Store())
        assert difference(before, run(model)) > CHANGED


def test_centring_a_true_root_mean_square_norm_changes_the_function() -> None:
    model = build(CASES["RMSNormalization, input"])
    before, group = run(model), group_of(model, CASES["RMSNormalization, input"])
    weight = model.graph.initializers["w1"]
    weight.const_value = ir.tensor(weight.const_value.numpy() - weight.const_value.numpy().mean(axis=0))
    assert group.admits >= {"orthogonal"}
    assert not group.family.centred
    assert difference(before, run(model)) > CHANGED


def test_layer_normalization_becomes_root_mean_square_when_its_stream_is_rotated() -> None:
    model = build(CASES["LayerNormalization, input"])
    group = group_of(model, CASES["LayerNormalization, input"])
    fold(model, group, random_action(group, "orthogonal", np.random.default_rng(6)), Store())
    assert [n.op_type for n in model.graph if "Norm" in n.op_type] == ["RMSNormalization"]
    assert "b3" not in model.graph.initializers


def test_the_weights_of_a_fold_are_written_to_the_store(tmp_path: Path) -> None:
    model = build(Case(CASES["nothing"].text, "", {"w1": (64, 6), "b1": (64,), "w2": (5, 64), "b2": (5,)}))
    group = next(g for g in find_groups(model) if g.producers and g.consumers)
    fold(model, group, Scale(np.linspace(1, 2, 64)), Store(tmp_path))
    assert (tmp_path / "weights.bin").stat().st_size >= 4 * 64 * (6 + 5)


@pytest.mark.parametrize("action", ["scale", "permute", "orthogonal", "shift"])
def test_a_large_weight_is_changed_in_parts_to_the_same_numbers(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (1 << 22, 7):
        monkeypatch.setattr(_edits, "_AT_ONCE", limit)
        model = build(CASES["residual"])
        group = group_of(model, CASES["residual"])
        fold(model, group, random_action(group, action, np.random.default_rng(2)), Store(), dtype=np.float64)
        results.append({n: v.const_value.numpy() for n, v in model.graph.initializers.items()})
    for name, whole in results[0].items():
        np.testing.assert_allclose(results[1][name], whole, rtol=1e-12, atol=1e-12)
