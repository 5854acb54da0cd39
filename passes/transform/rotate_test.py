"""Rotations on small graphs, run and verified by the manager, caches included."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.errors import UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import Context, Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline
from qc.passes.transform.actions import Kronecker

DECODER = """
  g (int64[batch,seq] ids, float[batch,2,past,8] k0, float[batch,2,past,8] v0)
    => (float[batch,seq,10] y, float[batch,2,total,8] k1, float[batch,2,total,8] v1) {
    x = Gather (table, ids)
    n = RMSNormalization (x, gain)
    q = qc.Linear (n, wq)  k = qc.Linear (n, wk)  v = qc.Linear:bias (n, wv, bv)
    qs = Reshape (q, four)  ks = Reshape (k, two)  vs = Reshape (v, two)
    qh = Transpose <perm=[0,2,1,3]> (qs)  kh = Transpose <perm=[0,2,1,3]> (ks)  vh = Transpose <perm=[0,2,1,3]> (vs)
    qr = RotaryEmbedding (qh, cos, sin, ids)  kr = RotaryEmbedding (kh, cos, sin, ids)
    k1 = Concat <axis=2> (k0, kr)  v1 = Concat <axis=2> (v0, vh)
    a = Attention (qr, k1, v1)
    t = Transpose <perm=[0,2,1,3]> (a)  f = Reshape (t, joined)  o = qc.Linear (f, wo)
    r = Add (x, o)
    m = RMSNormalization (r, gain2)
    s = qc.Linear (m, gate)  u = qc.Linear (m, up)  c = qc.Swish <alpha=1.0> (s)  p = Mul (c, u)
    d = qc.Linear (p, down)
    e = Add (r, d)
    l = RMSNormalization (e, last)
    y = qc.Linear (l, table)
  }
"""
SHAPES = {
    "table": (10, 16), "gain": (16,), "gain2": (16,), "last": (16,), "wq": (32, 16), "wk": (16, 16), "wv": (16, 16),
    "bv": (16,), "wo": (16, 32), "gate": (24, 16), "up": (24, 16), "down": (16, 24), "cos": (64, 4), "sin": (64, 4),
}  # fmt: skip
INTEGERS = {"four": [0, 0, 4, 8], "two": [0, 0, 2, 8], "joined": [0, 0, 32]}
ROLES = {
    "ids": "tokens",
    "k0": "past_key.0",
    "v0": "past_value.0",
    "k1": "present_key.0",
    "v1": "present_value.0",
    "y": "logits",
}


def decoder() -> Model:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s) / np.sqrt(s[-1]) for n, s in SHAPES.items()}
    for name in ("gain", "gain2", "last"):
        weights[name] = 1 + 0.3 * np.abs(weights[name])
    weights["gain"][3] = 30  # a channel that stands out
    single = {n: w.astype(np.float32) for n, w in weights.items()}
    return parse(DECODER, weights=single | {n: np.array(v) for n, v in INTEGERS.items()}, roles=ROLES)


def rotated(spec: str = "rotate", model: Model | None = None, seed: int = 0) -> tuple[Model, PassReport]:
    model, (report,) = PassManager(parse_pipeline(spec)).run(model or decoder(), context=Context(seed=seed))
    return model, report


def sites(report: PassReport, outcome: Outcome = Outcome.CHANGED) -> list[str]:
    return [s.name for s in report.sites if s.outcome is outcome]


def operators(model: Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in model.graph:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def peak(model: Model, name: str) -> float:
    """The largest element of an activation over its root mean square."""
    probe = model.clone()
    probe.graph.outputs.append(next(v for n in probe.graph for v in n.outputs if v.name == name))
    past = np.zeros((1, 2, 0, 8), np.float32)
    found = Session(probe).run({"ids": np.arange(10)[None], "k0": past, "v0": past})[name]
    return float(np.abs(found).max() / np.sqrt(np.mean(found**2)))


def test_the_stream_and_the_values_rotate_in_their_weights_and_no_channel_stands_out() -> None:
    before = decoder()
    model, report = rotated()
    assert sites(report) == ["wq", "wo"]
    assert operators(model) == operators(before)
    assert peak(before, "n") > 2 * peak(model, "n")
    for name in ("gain", "gain2", "last"):
        assert np.array_equal(model.graph.initializers[name].const_value.numpy(), np.ones(16))


def test_what_cannot_rotate_says_why_and_stays() -> None:
    model, report = rotated()
    (skipped,) = [s for s in report.sites if s.outcome is Outcome.SKIPPED]
    assert skipped.name == "down"
    assert "Swish" in skipped.reason
    assert model.graph.initializers["gate"].const_value.numpy().shape == (24, 16)


def test_a_table_that_is_also_the_head_is_stored_twice_and_the_report_says_so() -> None:
    _, report = rotated()
    assert [n for n in report.notes if n.startswith("table is stored 2 times") and "640 bytes more" in n]


@pytest.mark.parametrize(
    ("option", "added", "multiplications"),
    [
        # 24 channels as 12 x 2, by both factors; heads of 8 channels are not mixed within; heads of queries and keys.
        ("online-hidden", {"Reshape": 2, "MatMul": 2}, 24 * (12 + 2)),
        ("online-heads", {"Reshape": 2, "MatMul": 1}, 32 * 4),
        ("online-keys", {"MatMul": 2}, 2 * 8 * 8),
    ],
)
def test_rotations_at_run_time_are_small_products_whose_cost_is_reported(
    option: str, added: dict[str, int], multiplications: int
) -> None:
    before = operators(decoder())
    model, report = rotated(f"rotate{{{option}=true}}")
    after = operators(model)
    assert {k: after[k] - before.get(k, 0) for k in after if after[k] != before.get(k, 0)} == added
    (site,) = [s for s in report.sites if "added" in s.details]
    assert site.details["multiplications"] == multiplications


def test_all_rotations_together_keep_the_function_with_a_cache() -> None:
    _, report = rotated("rotate{online-hidden=true,online-heads=true,online-keys=true}")
    assert {d.output for d in report.differences} == {"y"}  # the manager compared a prefill and a step


def test_layers_of_one_width_share_what_is_stored_for_the_run_time() -> None:
    text = (
        "g (float[n,8] x) => (float[n,8] y) { a = qc.Linear (x, w1) b = Gelu (a) c = qc.Linear (b, w2) d = Gelu (c)"
        " y = qc.Linear (d, w3) }"
    )
    weights = {f"w{i}": np.random.default_rng(i).standard_normal((8, 8)).astype(np.float32) for i in (1, 2, 3)}
    model, report = rotated("rotate{online-hidden=true}", parse(text, weights=weights))
    assert sites(report) == ["w2", "w3"]
    assert len([n for n in model.graph.initializers if n.startswith("rotation")]) == 1


def test_a_layer_normalization_is_centred_first() -> None:
    text = """
      g (int64[batch,seq] ids) => (float[batch,seq,5] y) {
        x = Gather (table, ids)  n = LayerNormalization (x, gain, bias)  y = qc.Linear (n, w)
      }
    """
    rng = np.random.default_rng(0)
    shapes = {"table": (10, 12), "gain": (12,), "bias": (12,), "w": (5, 12)}
    weights = {n: 1 + rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    model, report = rotated(model=parse(text, weights=weights, roles={"ids": "tokens"}))
    assert sites(report) == ["w"]
    assert "RMSNormalization" in operators(model)


def test_one_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    def head(seed: int) -> bytes:
        return rotated(seed=seed)[0].graph.initializers["wo"].const_value.numpy().tobytes()

    assert head(1) == head(1)
    assert head(1) != head(2)


def test_a_width_without_a_hadamard_matrix_gets_a_random_rotation_and_a_remark() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { h = qc.Linear (x, w1) y = qc.Linear (h, w2) }"
    weights = {"w1": np.ones((30, 4), np.float32), "w2": np.ones((4, 30), np.float32)}
    _, report = rotated(model=parse(text, weights=weights))
    assert sites(report) == ["w2"]
    assert "factor 15" in report.notes[0]


@pytest.mark.parametrize("spec", ["rotate{exclude=[wq,wo]}", "rotate{online-hidden=true,exclude=[.]}"])
def test_what_is_excluded_stays_bit_identical(spec: str) -> None:
    model = decoder()
    tensors = {n: v.const_value for n, v in model.graph.initializers.items()}
    with pytest.raises(UnsupportedError, match="excluded by"):
        rotated(spec, model)
    assert {n: v.const_value for n, v in model.graph.initializers.items()} == tensors


def test_quantized_weights_are_left_alone_with_the_reason() -> None:
    model, _ = PassManager(parse_pipeline("quantize-weights{format=int8,group=0}")).run(decoder())
    with pytest.raises(UnsupportedError, match="is quantized"):
        rotated("rotate{online-hidden=true}", model)


def test_a_product_with_the_factors_is_the_matrix_and_stays_within_blocks() -> None:
    rng = np.random.default_rng(0)
    blocks, signs = np.array([0, 1] * 12), rng.choice([-1.0, 1.0], 24)
    factors = tuple(np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (3, 4))
    expected = np.zeros((24, 24))
    for block in (0, 1):
        inside = np.flatnonzero(blocks == block)
        expected[np.ix_(inside, inside)] = signs[inside, None] * np.kron(*factors)
    rows = rng.standard_normal((24, 5))
    np.testing.assert_allclose(Kronecker(signs, factors, blocks).turn(rows), expected.T @ rows, atol=1e-12)
