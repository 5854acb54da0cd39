"""Learned factors of channel groups leave the float network as it is, and make what is rounded easier to round."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir.model import Model
from qc.ir.quant import Format, read_weight
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import BlockPass, Context, Contract, Lossy, Outcome, Result
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step, parse_pipeline
from qc.passes.quantize.assign import assign
from qc.passes.tune._groups import transformable

torch = pytest.importorskip("torch", reason="learning needs torch")

GATED = """
    g (float[n,32] x) => (float[n,32] y) {
      u = RMSNormalization <axis = -1> (x, gain)
      h = qc.Linear (u, gate)
      a = qc.Swish <alpha = 1.0> (h)
      t = qc.Linear (u, up)
      p = Mul (a, t)
      d = qc.Linear (p, down)
      y = Add (x, d)
    }
"""
ATTENTION = """
    g (float[batch,seq,16] x) => (float[batch,seq,16] y) {
      u = LayerNormalization <axis = -1> (x, gain, bias)
      q = qc.Linear:bias (u, wq, bq)  k = qc.Linear:bias (u, wk, bk)  v = qc.Linear:bias (u, wv, bv)
      qs = Reshape (q, four)  ks = Reshape (k, two)  vs = Reshape (v, two)
      qt = Transpose <perm=[0,2,1,3]> (qs)  kt = Transpose <perm=[0,2,1,3]> (ks)  vt = Transpose <perm=[0,2,1,3]> (vs)
      qr = RotaryEmbedding (qt, cos, sin)  kr = RotaryEmbedding (kt, cos, sin)
      kq = ROUND (kr)
      a = Attention (qr, kq, vt)
      at = Transpose <perm=[0,2,1,3]> (a)  f = Reshape (at, flat)
      y = qc.Linear (f, wo)
    }
"""
ROUND = "qc.DynamicQuantize:token_asymmetric <bits=8, clip=1.0>"
QUANTIZE = "quantize-weights{format=int4,group=0,metric=none},quantize-activations{bits=4,granularity=token}"


def gated(outlier: float = 1.0) -> Model:
    """A gated layer; two channels behind the norm, and two behind the gate, are `outlier` times as large as others."""
    rng = np.random.default_rng(0)
    weights = {
        "gain": 1 + 0.1 * rng.standard_normal(32),
        "gate": rng.standard_normal((48, 32)) / 6,
        "up": rng.standard_normal((48, 32)) / 6,
        "down": rng.standard_normal((32, 48)) / 4,
    }
    weights["gain"][[3, 20]] *= outlier
    weights["gate"][:, [3, 20]] /= outlier
    weights["up"][:, [3, 20]] /= outlier
    weights["up"][[5, 30]] *= outlier
    weights["down"][:, [5, 30]] /= outlier
    return parse(GATED, weights={k: v.astype(np.float32) for k, v in weights.items()})


def attention(operator: str) -> Model:
    """Four query heads on two key-value heads, with rotary positions; `operator` stands behind the keys."""
    rng = np.random.default_rng(0)
    shapes = {"gain": (16,), "bias": (16,), "wq": (16, 16), "bq": (16,), "wk": (8, 16), "bk": (8,), "wv": (8, 16)}
    shapes |= {"bv": (8,), "wo": (16, 16)}
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    angles = rng.standard_normal((2, 5, 2)).astype(np.float32)
    weights |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    integers = {"four": [0, 0, 4, 4], "two": [0, 0, 2, 4], "flat": [0, 0, 16]}
    weights |= {n: np.array(v, np.int64) for n, v in integers.items()}
    return parse(ATTENTION.replace("ROUND", operator), weights=weights)


def products(model: Model) -> set[ir.Value]:
    return {n.inputs[1] for n in model.graph if n.op_type == "Linear"}


def inputs(count: int = 9, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((64, 32)).astype(np.float32)} for _ in range(count)]


def run(spec: str, outlier: float = 1.0, quantize: str = QUANTIZE) -> tuple[Model, list[PassReport]]:
    """One thread: the network is too small for two."""
    manager = PassManager(parse_pipeline(f"{quantize},{spec}"), verify=False)
    return manager.run(gated(outlier), calibration=inputs(), context=Context(threads=1))


def error(model: Model, outlier: float) -> float:
    """Squared error of the outputs on inputs that nobody has seen."""
    before, after = Session(gated(outlier)), Session(model)
    return sum(float(np.square(before.run(b)["y"] - after.run(b)["y"]).sum()) for b in inputs(8, seed=2))


def moved(factors: list, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for held in factors:
        with torch.no_grad():
            held.parameters["logarithm"].uniform_(-1, 1, generator=generator)


@pytest.mark.parametrize(
    ("found", "run", "feeds", "kinds"),
    [
        (gated(), gated(), {"x": (7, 32)}, ["normalized", "hidden"]),
        (attention(ROUND), attention("Identity"), {"x": (2, 5, 16)}, ["normalized", "key", "value"]),
    ],
    ids=["gated", "grouped-query attention with rotary positions"],
)
def test_any_factors_leave_the_float_network_as_it_is(
    found: Model, run: Model, feeds: dict[str, tuple[int, ...]], kinds: list[str]
) -> None:
    from qc.passes.tune._factors import LearnedVector, scalings

    groups, skipped = transformable(found, Context(), products(found))
    assert sorted(i.group.kind for i in groups) == sorted(kinds)
    assert not skipped
    factors, scaled = scalings([i.group for i in groups], "cpu")
    moved(factors)
    batch = {n: np.random.default_rng(3).standard_normal(s).astype(np.float32) for n, s in feeds.items()}
    expected = Session(run).run(batch)["y"]
    for value, scaling in scaled.items():
        held = run.graph.initializers[str(value.name)]
        before = held.const_value.numpy()
        held.const_value = ir.tensor(LearnedVector(before, False, scaling, "cpu").stored().numpy())
        assert np.abs(np.log(held.const_value.numpy() / before)).max() > 0.5
    np.testing.assert_allclose(Session(run).run(batch)["y"], expected, atol=2e-5 * np.abs(expected).max())


def test_keys_that_nothing_rounds_have_no_factors_to_learn() -> None:
    model = attention("Identity")
    groups, _ = transformable(model, Context(), products(model))
    assert sorted(i.group.kind for i in groups) == ["normalized", "value"]


@pytest.mark.parametrize("spelling", ["uint2:g32", "uint4:g24:f16", "int4", "uint3:g64", "int8:g24"])
def test_a_weight_starts_where_it_was_and_is_trained_as_it_is_exported(spelling: str) -> None:
    from qc.passes.tune._factors import scalings
    from qc.passes.tune._weight import LearnedWeight

    model = gated()
    up = model.graph.initializers["up"]
    groups, _ = transformable(model, Context(), products(model))
    factors, scaled = scalings([i.group for i in groups], "cpu")
    weight = up.const_value.numpy()
    start = assign(weight, Format.parse(spelling))
    learned = LearnedWeight(weight, start, ("range", "transforms"), scaling=scaled[up])
    exported = learned.export()
    np.testing.assert_array_equal(exported.codes, start.codes)
    for name, array in start.params.items():
        np.testing.assert_array_equal(exported.params[name], array)
    moved(factors)
    np.testing.assert_allclose(learned().detach().numpy(), learned.export().decode(), rtol=1e-5, atol=1e-6)
    folded = scaled[up].folded(torch.from_numpy(np.array(weight))).numpy()
    again = assign(folded, Format.parse(spelling))
    errors = [np.square(t.decode() - folded).mean() for t in (learned.export(), again)]
    assert errors[0] < 1.5 * errors[1], "its ranges fit the numbers that they are for"


@pytest.mark.parametrize("action", ["tune", "tune-network"])
def test_factors_help_where_channels_are_large_and_ranges_alone_do_not(action: str) -> None:
    found = {}
    for learn in ("range", "range,transforms"):
        spec = f"{action}{{steps=80,batch=2,optimizer=adam,range-rate=0.03,learn=[{learn}]}}"
        model, reports = run(spec, outlier=8.0)
        found[learn] = error(model, 8.0)
        sites = [s for s in reports[-1].sites if "kind" in s.details]
        assert {s.outcome for s in sites} <= {Outcome.CHANGED}
        assert [s.details["kind"] for s in sites] == (["normalized", "hidden"] if "transforms" in learn else [])
        assert all(s.details["largest"] > 1.5 * s.details["smallest"] for s in sites)
    assert found["range,transforms"] < 0.5 * found["range"]


def test_a_rate_that_only_spoils_leaves_everything_bit_identical() -> None:
    plain, _ = run("tune{steps=1,learn=[scale],range-rate=1e-12}")
    model, reports = run("tune{learn=[transforms],optimizer=adam,range-rate=100,steps=5}")
    assert {s.outcome for s in reports[-1].sites} == {Outcome.MATCHED}
    for old, new in zip(plain.graph.initializers.values(), model.graph.initializers.values(), strict=True):
        assert old.const_value.tobytes() == new.const_value.tobytes()


def test_groups_with_a_weight_that_stays_as_it_is_say_so() -> None:
    _, reports = run("tune{steps=2,learn=[transforms]}", quantize=QUANTIZE.replace("none", "none,exclude=[up]"))
    sites = {s.details["kind"]: s for s in reports[-1].sites if "kind" in s.details}
    assert {s.reason for s in sites.values()} == {"up is not learned"}
    assert set(sites) == {"normalized", "hidden"}


@dataclasses.dataclass(frozen=True)
class _Note(BlockPass):
    """Remembers how far float weights are from what stands in their place."""

    contract: ClassVar[Contract] = Lossy()
    found: ClassVar[list[float]] = []

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        for value, held in context.block.originals.items():
            now, original = read_weight(value).numpy(), held.numpy()
            self.found.append(float(np.square(now - original).mean() / np.square(original).mean()))
        return Result(model, False)


def test_passes_behind_learn_from_the_float_weights_with_the_factors_in_them() -> None:
    steps = [*parse_pipeline(f"{QUANTIZE},tune{{steps=40,batch=2,optimizer=adam,range-rate=0.03,learn=[transforms]}}")]
    steps = [*steps[:2], Step(_Note(), optional=True), steps[2], Step(_Note(), optional=True)]
    _Note.found.clear()
    PassManager(steps, verify=False).run(gated(8.0), calibration=inputs(), context=Context(threads=1))
    before, after = np.reshape(_Note.found, (2, 3))
    assert np.all(after < 2 * before)
