"""Every line of the table of operators: what it admits folds exactly, what it forbids has a counterexample."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from channel_actions import NAMES, difference, random_action

from qc.ir.channels import ChannelGroup, find_groups
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.execute import Executor
from qc.ir.model import Model
from qc.ir.store import Store
from qc.ir.text import parse
from qc.passes.transform.actions import Action, Merge, Orthogonal, Permute, Scale, Shift, Split
from qc.passes.transform.fold import Folded, apply, fold

torch = pytest.importorskip("torch", reason="the models are run in float64 by the torch executor")

EXACT = 1e-10
CHANGED = 1e-3

TOKENS = "g (float[batch,seq,6] x) => (float[batch,seq,5] y)"
IMAGES = "g (float[batch,3,9,9] x) => (float[batch,5,H,W] y)"
BIASES = {"b1": (8,), "b2": (5,)}
LINEARS = {"w1": (8, 6), "w2": (5, 8), **BIASES}
CONVS = {"w1": (8, 3, 3, 3), "w2": (5, 8, 3, 3), **BIASES}
HEADS = """
  q0 = qc.Linear:bias (x, wq, bq)  k0 = qc.Linear:bias (x, wk, bk)  v0 = qc.Linear:bias (x, w1, b1)
  q1 = Reshape (q0, to_q)  k1 = Reshape (k0, to_k)  v1 = Reshape (v0, to_k)
  q = Transpose <perm=[0,2,1,3]> (q1)  k = Transpose <perm=[0,2,1,3]> (k1)  v = Transpose <perm=[0,2,1,3]> (v1)
"""
JOIN = "  t = Transpose <perm=[0,2,1,3]> (a)  h = Reshape (t, to_o)  y = qc.Linear:bias (h, w2, b2)"
ATTENTION = {"wq": (16, 6), "wk": (8, 6), "w1": (8, 6), "w2": (5, 16), "bq": (16,), "bk": (8,), **BIASES}
INTEGERS = {"to_q": [0, 0, 4, 4], "to_k": [0, 0, 2, 4], "to_o": [0, 0, 16]}


def between(middle: str) -> str:
    """``h`` is produced by w1, ``z`` is consumed by w2."""
    return f"{TOKENS} {{ h = qc.Linear:bias (x, w1, b1) {middle} y = qc.Linear:bias (z, w2, b2) }}"


def images(middle: str, first: str = "", second: str = "") -> str:
    return f"{IMAGES} {{ h = Conv {first} (x, w1, b1) {middle} y = Conv {second} (z, w2, b2) }}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph, and what the group of the channels that `weight` produces admits."""

    text: str
    admits: str
    weights: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: LINEARS)
    weight: str = "w1"
    role: str = "producers"


EVERYTHING = "permute scale sign shift orthogonal split merge"
GATE = {**LINEARS, "w3": (8, 6), "b3": (8,)}
VECTOR = {**LINEARS, "g": (8,)}
CASES = {
    "nothing": Case(between("z = Identity (h)"), EVERYTHING),
    "residual": Case(between("p = qc.Linear:bias (x, w3, b3) z = Add (p, h)"), EVERYTHING, GATE),
    "Neg": Case(between("z = Neg (h)"), "permute scale sign orthogonal split merge"),
    "Relu": Case(between("z = Relu (h)"), "permute scale split"),
    "LeakyRelu": Case(between("z = LeakyRelu <alpha=0.1> (h)"), "permute scale split"),
    "Abs": Case(between("z = Abs (h)"), "permute scale split"),
    "Relu squared": Case(between("r = Relu (h) z = Mul (r, r)"), "permute scale split"),
    "Pow": Case(between("r = Relu (h) c = Constant <value_float=2.0> () z = Pow (r, c)"), "permute scale split"),
    "Sqrt": Case(between("r = Abs (h) z = Sqrt (r)"), "permute scale split"),
    "Tanh": Case(between("z = Tanh (h)"), "permute sign split"),
    "Gelu": Case(between("z = Gelu (h)"), "permute split"),
    "Sigmoid": Case(between("z = Sigmoid (h)"), "permute split"),
    "Swish": Case(between("z = qc.Swish <alpha=1.0> (h)"), "permute split"),
    "Clip": Case(
        between("lo = Constant <value_float=0.0> () hi = Constant <value_float=1.0> () z = Clip (h, lo, hi)"),
        "permute split",
    ),
    "Min": Case(between("z = Min (h, g)"), "permute scale split", VECTOR),
    "Max": Case(between("z = Max (g, h)"), "permute scale split", VECTOR),
    "Min of two": Case(between("p = qc.Linear:bias (x, w3, b3) z = Min (p, h)"), "permute scale split", GATE),
    "Min with one number": Case(
        between("c = Constant <value_float=0.3> () z = Min (h, c)"), "permute split"
    ),
    "gate": Case(
        between("p = qc.Linear:bias (x, w3, b3) s = qc.Swish <alpha=1.0> (p) z = Mul (s, h)"),
        "permute scale sign split",
        GATE,
    ),
    "gate, its nonlinear side": Case(
        between("p = qc.Linear:bias (x, w3, b3) s = qc.Swish <alpha=1.0> (p) z = Mul (s, h)"),
        "permute split",
        GATE,
        "w3",
    ),
    "product": Case(
        between("p = qc.Linear:bias (x, w3, b3) z = Mul (p, h)"), "permute scale sign split", GATE
    ),
    "layer scale": Case(between("z = Mul (h, g)"), "permute scale sign orthogonal split", VECTOR),
    "scalar factor": Case(
        between("c = Constant <value_float=3.0> () z = Mul (h, c)"), "permute scale sign orthogonal split merge"
    ),
    "scalar term": Case(between("c = Constant <value_float=3.0> () z = Add (h, c)"), "permute shift split"),
    "constant vector": Case(between("z = Add (h, g)"), EVERYTHING, VECTOR),
    "RMSNormalization, input": Case(between("z = RMSNormalization (h, g)"), "permute sign orthogonal", VECTOR),
    "RMSNormalization, output": Case(
        between("z = RMSNormalization (h, g)"), "permute scale sign orthogonal", VECTOR, "w2", "consumers"
    ),
    "LayerNormalization, input": Case(
        between("z = LayerNormalization (h, g, b3)"), "permute orthogonal", {**VECTOR, "b3": (8,)}
    ),
    "LayerNormalization, output": Case(
        between("z = LayerNormalization (h, g, b3)"),
        "permute scale sign shift orthogonal",
        {**VECTOR, "b3": (8,)},
        "w2",
        "consumers",
    ),
    "Concat": Case(
        between("p = qc.Linear:bias (x, w3, b3) z = Concat <axis=-1> (p, h)"),
        "permute scale sign shift orthogonal",
        {**LINEARS, "w3": (4, 6), "b3": (4,), "w2": (5, 12)},
    ),
    "Slice": Case(
        f"{TOKENS} {{ p = qc.Linear:bias (x, w1, b1) z = Slice (p, one, eight, last) y = qc.Linear:bias (z, w2, b2) }}",
        "permute scale sign shift orthogonal",
        {**LINEARS, "w2": (5, 7)},
        "w2",
        "consumers",
    ),
    "output": Case(
        "g (float[batch,6] x) => (float[batch,5] y, float[batch,8] h)"
        " { h = qc.Linear:bias (x, w1, b1) y = qc.Linear:bias (h, w2, b2) }",
        "",
    ),
    "unknown operator": Case(between("z = Softmax <axis=-1> (h)"), ""),
    "query and key": Case(
        f"{TOKENS} {{ {HEADS} a = Attention (q, k, v) {JOIN} }}",
        "permute scale sign shift orthogonal",
        ATTENTION,
        "wk",
    ),
    "query and key, rotated": Case(
        f"{TOKENS} {{ {HEADS} qr = RotaryEmbedding (q, cos, sin) kr = RotaryEmbedding (k, cos, sin)"
        f" a = Attention (qr, kr, v) {JOIN} }}",
        "scale sign orthogonal",
        {**ATTENTION, "cos": (2, 7, 2), "sin": (2, 7, 2)},
        "wk",
    ),
    "key under a soft cap": Case(
        f"{TOKENS} {{ {HEADS} a = Attention <softcap=1.0> (q, k, v) {JOIN} }}",
        "permute scale sign orthogonal",
        ATTENTION,
        "wk",
    ),
    "value": Case(
        f"{TOKENS} {{ {HEADS} a = Attention (q, k, v) {JOIN} }}", "permute scale sign shift orthogonal", ATTENTION
    ),
    "Conv": Case(images("z = Identity (h)"), EVERYTHING, CONVS),
    "Conv, padded": Case(
        images("z = Identity (h)", second="<pads=[1,1,1,1]>"), "permute scale sign orthogonal split merge", CONVS
    ),
    "Conv, depthwise": Case(
        images("z = Conv <group=8> (h, w3, b3)"), "permute scale sign split", {**CONVS, "w3": (8, 1, 3, 3), "b3": (8,)}
    ),
    "Conv, grouped": Case(
        images("z = Identity (h)", second="<group=2>").replace("[batch,5", "[batch,6"),
        "permute scale sign shift orthogonal",
        {**CONVS, "w2": (6, 4, 3, 3), "b2": (6,)},
    ),
    "BatchNormalization": Case(
        images("z = BatchNormalization (h, g, b3, m, v)"),
        "permute scale sign shift split",
        {**CONVS, "g": (8,), "b3": (8,), "m": (8,), "v": (8,)},
    ),
    "MaxPool": Case(
        images("z = MaxPool <kernel_shape=[2,2]> (h)"), "permute scale shift split", CONVS
    ),
    "AveragePool": Case(images("z = AveragePool <kernel_shape=[2,2]> (h)"), EVERYTHING, CONVS),
    "AveragePool, padding counted": Case(
        images("z = AveragePool <kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1> (h)"),
        "permute scale sign orthogonal split merge",
        CONVS,
    ),
    "Pad": Case(images("z = Pad (h, pads)"), "permute scale sign orthogonal split merge", CONVS),
    "mean over space": Case(
        "g (float[batch,3,9,9] x) => (float[batch,5] y) { h = Conv (x, w1, b1) axes = Constant <value_ints=[2,3]> ()"
        " z = ReduceMean <keepdims=0> (h, axes) y = qc.Linear:bias (z, w2, b2) }",
        EVERYTHING,
        {**CONVS, "w2": (5, 8)},
    ),
    "embedding": Case(
        "g (int64[batch,seq] x) => (float[batch,seq,5] y) { h = Gather (w1, x) y = qc.Linear:bias (h, w2, b2) }",
        EVERYTHING,
        {"w1": (10, 8), "w2": (5, 8), "b2": (5,)},
    ),
    "experts": Case(
        "g (float[3,seq,6] x) => (float[3,seq,5] y) { h = MatMul (x, w1) z = Relu (h) y = MatMul (z, w2) }",
        "permute scale",
        {"w1": (3, 6, 8), "w2": (3, 8, 5)},
    ),
}  # fmt: skip


def build(case: Case) -> Model:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in case.weights.items():
        values = rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 1)
        if name in ("g", "v"):
            values = 1 + 0.3 * np.abs(values)
        arrays[name] = values.astype(np.float32)
    words = set(case.text.replace(",", " ").replace(")", " ").split())
    used = {n: np.array(v, np.int64) for n, v in (INTEGERS | _SMALL).items() if n in words}
    return parse(case.text, weights=arrays | used)


_SMALL = {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "one": [1], "eight": [8], "last": [-1]}


def group_of(model: Model, case: Case) -> ChannelGroup:
    groups = [g for g in find_groups(model) if g.kind != "heads"]
    groups = [g for g in groups if any(u.name == case.weight and u.index.max() >= 0 for u in getattr(g, case.role))]
    assert len(groups) == 1, [g.id for g in groups]
    return groups[0]


def run(model: Model) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    sizes = {"batch": 2, "seq": 7}
    feeds = {}
    for port in model.signature.inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in port.shape]
        feeds[port.name] = rng.integers(0, 10, shape) if port.dtype.is_integer() else rng.standard_normal(shape)
    return [{n: t.numpy() for n, t in Executor(model, dtype=torch.float64)(feeds).items()}]


def forced(group: ChannelGroup) -> ChannelGroup:
    """The group as one would have it who does not know the operators in between."""
    signs = {"consumer": -1.0, "producer": 1.0, "bias": 1.0}
    uses = [
        dataclasses.replace(u, power=signs[u.role], parity=1, lead=True) for u in group.family.uses if u.role in signs
    ]
    return dataclasses.replace(group, uses=tuple(uses))


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
