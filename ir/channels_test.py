"""What the channel analysis sees in small graphs, and how it says it."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir.channels import ACTIONS, ChannelGroup, ChannelGroups, find_groups
from qc.ir.text import parse

GATED = """
  g (int64[batch,seq] ids) => (float[batch,seq,10] y) {
    x = Gather (table, ids)
    n = RMSNormalization (x, gain)
    s = qc.Linear (n, gate)  u = qc.Linear (n, up)
    a = qc.Swish <alpha=1.0> (s)  p = Mul (a, u)
    d = qc.Linear (p, down)
    r = Add (x, d)
    m = RMSNormalization (r, last)
    y = qc.Linear (m, table)
  }
"""
SHAPES = {"table": (10, 8), "gain": (8,), "last": (8,), "gate": (12, 8), "up": (12, 8), "down": (8, 12)}


def analysed(text: str, shapes: dict[str, tuple[int, ...]], **roles: str) -> ChannelGroups:
    return find_groups(parse(text, weights={n: np.ones(s, np.float32) for n, s in shapes.items()}, roles=roles))


def names(group: ChannelGroup) -> tuple[set[str], set[str], set[str]]:
    return tuple({u.name for u in part} for part in (group.producers, group.consumers, group.parameters))


@pytest.fixture(scope="module")
def gated() -> ChannelGroups:
    return analysed(GATED, SHAPES)


def test_the_parts_of_a_gated_layer(gated: ChannelGroups) -> None:
    found = {g.kind: g for g in gated}
    assert names(found["stream"]) == ({"table", "down"}, set(), {"gain", "last"})
    normalized = [g for g in gated if g.kind == "normalized"]
    assert [names(g) for g in normalized] == [(set(), {"gate", "up"}, {"gain"}), (set(), {"table"}, {"last"})]
    assert names(next(g for g in gated if g.producers and g.consumers)) == ({"up"}, {"down"}, set())
    assert found["output"].admits == frozenset()


def test_what_must_keep_one_index_is_one_family(gated: ChannelGroups) -> None:
    families: dict[int, set[str]] = {}
    for group in gated:
        families.setdefault(group.family.id, set()).add(group.kind)
    assert {"stream", "normalized"} in families.values()
    gate, up = (next(g for g in gated if {u.name for u in g.producers} == {name}) for name in ("gate", "up"))
    assert gate.family is up.family
    assert (gate.width, gate.admits) == (12, {"permute", "split"})
    assert up.admits == {"permute", "scale", "sign", "split"}


def test_what_is_not_admitted_names_the_operator_and_the_reason(gated: ChannelGroups) -> None:
    for group in gated:
        assert group.admits | set(group.forbids) == set(ACTIONS)
        assert all(f.operator and f.why for f in group.forbids.values())
    gate = next(g for g in gated if {u.name for u in g.producers} == {"gate"})
    assert gate.forbids["scale"].operator == "qc::Swish"


def test_the_description_is_json_and_the_drawing_names_the_weights(gated: ChannelGroups) -> None:
    rows = json.loads(json.dumps(gated.describe()))
    keys = {"id", "kind", "width", "family", "structure", "producers", "consumers", "parameters", "interior", "state"}
    assert all(set(row) == keys | {"admits", "forbids"} for row in rows)
    assert [row["id"] for row in rows] == list(range(len(gated)))
    drawing = gated.drawing()
    assert drawing.startswith("flowchart TD\n")
    assert all(f'"{name}"' in drawing for name in ("gate, up", "down") if "," not in name)


def test_coverage_counts_weights_and_explains_the_rest(gated: ChannelGroups) -> None:
    coverage = gated.coverage()
    assert coverage["weights"] == 2 * 96 + 96 + 80
    assert coverage["scalable"] == coverage["explained"] == 1.0
    encoder = analysed(
        "g (float[batch,6] x) => (float[batch,4] y) { h = qc.Linear (x, a) z = Gelu (h) y = qc.Linear (z, b) }",
        {"a": (8, 6), "b": (4, 8)},
    ).coverage()
    assert (encoder["scalable"], encoder["explained"]) == (0.0, 1.0)
    assert encoder["by_operator"] == {"Gelu": 32, "input": 48}


HEADS = """
  g (float[batch,seq,8] x, float[batch,2,past,4] k0, float[batch,2,past,4] v0)
    => (float[batch,seq,8] y, float[batch,2,total,4] k1, float[batch,2,total,4] v1) {
    q = qc.Linear (x, wq)  k = qc.Linear (x, wk)  v = qc.Linear (x, wv)
    qs = Reshape (q, four)  ks = Reshape (k, two)  vs = Reshape (v, two)
    qh = Transpose <perm=[0,2,1,3]> (qs)  kh = Transpose <perm=[0,2,1,3]> (ks)  vh = Transpose <perm=[0,2,1,3]> (vs)
    k1 = Concat <axis=2> (k0, kh)  v1 = Concat <axis=2> (v0, vh)
    a = Attention (qh, k1, v1)
    t = Transpose <perm=[0,2,1,3]> (a)  f = Reshape (t, flat)  y = qc.Linear (f, wo)
  }
"""


def heads(**roles: str) -> ChannelGroups:
    weights = {n: np.ones(s, np.float32) for n, s in (("wq", (16, 8)), ("wk", (8, 8)), ("wv", (8, 8)), ("wo", (8, 16)))}
    integers = {"four": [0, 0, 4, 4], "two": [0, 0, 2, 4], "flat": [0, 0, 16]}
    weights |= {n: np.array(v, np.int64) for n, v in integers.items()}
    return find_groups(parse(HEADS, weights=weights, roles=roles))


def test_a_cache_is_part_of_the_network_when_its_roles_say_so() -> None:
    found = heads(k0="past_key.0", v0="past_value.0", k1="present_key.0", v1="present_value.0")
    value = next(g for g in found if g.kind == "value")
    assert value.family.state == ("v0",)
    assert value.admits == {"permute", "scale", "sign", "shift", "orthogonal"}
    assert np.unique(value.family.blocks).size == 2


def test_an_output_that_is_no_cache_pins_its_channels() -> None:
    groups = [g for g in heads() if {u.name for u in g.producers} & {"wk", "wv"}]
    assert groups
    assert all(not g.admits for g in groups)


def test_an_expert_stack_is_one_family_with_a_block_per_expert() -> None:
    found = analysed(
        "g (float[3,seq,6] x) => (float[3,seq,5] y) { h = MatMul (x, a) z = Relu (h) y = MatMul (z, b) }",
        {"a": (3, 6, 8), "b": (3, 8, 5)},
    )
    hidden = next(g for g in found if g.producers and g.consumers)
    assert hidden.width == 24
    assert np.unique(hidden.family.blocks).size == 3


def test_a_subgraph_pins_what_it_reads() -> None:
    text = """
      g (float[batch,6] x, bool c) => (float[batch,4] y) {
        h = qc.Linear (x, a)
        z = If (c) <then_branch = t () => (float[batch,8] o) { o = Neg (h) },
                    else_branch = e () => (float[batch,8] o) { o = Abs (h) }>
        y = qc.Linear (z, b)
      }
    """
    found = analysed(text, {"a": (8, 6), "b": (4, 8)})
    group = next(g for g in found if {u.name for u in g.producers} == {"a"})
    assert not group.admits
    assert group.forbids["scale"].operator == "If"


def test_the_analysis_changes_nothing_and_reads_no_weight() -> None:
    def refuse() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    model = parse(GATED, weights={n: np.ones(s, np.float32) for n, s in SHAPES.items()})
    for value in model.graph.initializers.values():
        value.const_value = ir.LazyTensor(
            refuse, dtype=ir.DataType.FLOAT, shape=value.const_value.shape, name=value.name
        )
    before = [(n.op_type, *n.inputs) for n in model.graph]
    assert len(find_groups(model)) == len(find_groups(model))
    assert [(n.op_type, *n.inputs) for n in model.graph] == before


@pytest.mark.parametrize(
    "rounding",
    [
        "z = qc.DynamicQuantize:token_symmetric <bits=8, clip=1.0> (h)",
        "c = QuantizeLinear (h, scale) z = DequantizeLinear (c, scale)",
        "c, s, o = DynamicQuantizeLinear (h) z = DequantizeLinear (c, s, o)",
    ],
)
def test_what_rounds_activations_is_looked_through_when_asked_for(rounding: str) -> None:
    def group(middle: str, **options: bool) -> ChannelGroup:
        text = f"g (float[n,6] x) => (float[n,5] y) {{ h = qc.Linear (x, a) {middle} y = qc.Linear (z, b) }}"
        weights = {"a": np.ones((8, 6), np.float32), "b": np.ones((5, 8), np.float32)}
        weights |= {"scale": np.float32(0.1)} if "scale" in middle else {}
        found = find_groups(parse(text, weights=weights), **options)
        return next(g for g in found if {u.name for u in g.producers} == {"a"})

    assert not group(rounding).admits
    seen = group(rounding, rounded=True)
    assert seen.admits == group("z = Identity (h)").admits
    assert names(seen) == ({"a"}, {"b"}, set())


def test_an_empty_graph_has_no_groups() -> None:
    found = find_groups(parse("g (float[2] x) => (float[2] y) { y = Identity (x) }"))
    assert len(found) == 0
    assert found.coverage()["scalable"] == 1.0
