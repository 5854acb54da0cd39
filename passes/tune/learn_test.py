"""What is learned is exported as integers, starts where it was, and never ends worse."""

from __future__ import annotations

import numpy as np
import pytest

from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.quant import Format, QuantizedTensor, read_weight
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import Context, Outcome
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline
from qc.passes.quantize.assign import assign
from qc.passes.tune._weight import LearnedWeight, learnable
from qc.passes.tune.learn import Tune

torch = pytest.importorskip("torch", reason="learning needs torch")

MLP = """
    g (float[n,64] x) => (float[n,64] y) {
      u = RMSNormalization <axis = -1> (x, gain)
      h = qc.Linear (u, w1)
      a = qc.Swish <alpha = 1.0> (h)
      d = qc.Linear (a, w2)
      y = Add (x, d)
    }
"""
QUANTIZE = "quantize-weights{format=uint2,group=32}"
SPELLINGS = ["uint2:g32", "uint4:g16:f16", "int4", "int2:g32", "uint3:g64", "int8:g24"]


def mlp() -> Model:
    rng = np.random.default_rng(0)
    weights = {
        "gain": 1 + 0.1 * rng.standard_normal(64),
        "w1": rng.standard_normal((96, 64)) / 8,
        "w2": rng.standard_normal((64, 96)) / 10,
    }
    return parse(MLP, weights={k: v.astype(np.float32) for k, v in weights.items()})


def inputs(count: int = 9, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((64, 64))
    return [{"x": (rng.standard_normal((64, 64)) @ mix / 8).astype(np.float32)} for _ in range(count)]


def run(spec: str) -> tuple[Model, list[PassReport]]:
    """One thread: the network is too small for two."""
    manager = PassManager(parse_pipeline(spec), verify=False)
    return manager.run(mlp(), calibration=inputs(), context=Context(threads=1))


def tuned(spec: str) -> tuple[Model, PassReport]:
    model, reports = run(f"{QUANTIZE},{spec}")
    return model, reports[-1]


def error(model: Model) -> float:
    """Squared error of the outputs on inputs that nobody has seen."""
    before, after = Session(mlp()), Session(model)
    return sum(float(np.square(before.run(b)["y"] - after.run(b)["y"]).sum()) for b in inputs(8, seed=2))


def tensor(spelling: str, seed: int = 0) -> tuple[np.ndarray, QuantizedTensor]:
    weight = np.random.default_rng(seed).standard_normal((12, 72)).astype(np.float32)
    return weight, assign(weight, Format.parse(spelling))


@pytest.mark.parametrize("learn", [("rounding", "range"), ("weights",), ("scale",), ("low-rank", "range")])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_before_anything_is_learned_it_is_the_tensor_that_it_started_as(spelling: str, learn: tuple[str, ...]) -> None:
    weight, start = tensor(spelling)
    learned = LearnedWeight(weight, start, learn)
    exported = learned.export()
    np.testing.assert_array_equal(exported.codes, start.codes)
    for name, array in start.params.items():
        np.testing.assert_array_equal(exported.params[name], array)
    np.testing.assert_allclose(learned().detach().numpy(), start.decode(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_codes_chosen_with_feedback_are_kept_too(spelling: str) -> None:
    weight, start = tensor(spelling)
    moved = np.clip(start.codes.astype(int) + np.random.default_rng(1).integers(-2, 3, start.codes.shape),
                    start.format.values.low, start.format.values.high)  # fmt: skip
    other = QuantizedTensor(start.format, moved.astype(start.codes.dtype), start.params)
    np.testing.assert_array_equal(LearnedWeight(weight, other, ("rounding", "range")).export().codes, moved)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_trained_is_what_is_exported(spelling: str) -> None:
    weight, start = tensor(spelling)
    learned = LearnedWeight(weight, start, ("rounding", "range", "low-rank"))
    with torch.no_grad():
        for parameter in learned.parameters.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    learned.bound()
    np.testing.assert_allclose(learned().detach().numpy(), learned.export().decode(), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(learned.export().codes, start.codes)


def test_rounding_chooses_between_the_two_nearest_codes() -> None:
    weight, start = tensor("uint4:g24")
    learned = LearnedWeight(weight, start, ("rounding",))
    with torch.no_grad():
        learned.parameters["offset"] += 10
    learned.bound()
    difference = learned.export().codes.astype(int) - start.codes
    assert set(np.unique(difference)) == {0, 1}


def test_the_gradient_of_the_scales_is_that_of_frozen_codes() -> None:
    weight, start = tensor("int4:g24")
    learned = LearnedWeight(weight, start, ("scale",))
    x = torch.randn(5, 72, generator=torch.Generator().manual_seed(0))
    (x @ learned().T).square().sum().backward()
    decoded = start.decode()
    outer = 2 * (x.numpy() @ decoded.T).T @ x.numpy()
    expected = (outer * decoded).reshape(12, 3, 24).sum(-1, keepdims=True)
    np.testing.assert_allclose(learned.parameters["factor"].grad.numpy(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ("rate=0.02,range-rate=0.02", 0.9),
        ("rate=0.02,range-rate=0.02,loss=both", 0.9),
        ("learn=[weights,range],optimizer=adam,rate=0.02", 0.9),
        ("learn=[low-rank],optimizer=adam,rate=0.02", 1.0),
        ("learn=[range],optimizer=adam", 1.02),
        ("learn=[scale],optimizer=adam", 1.02),
        ("learn=[norms],optimizer=adam,range-rate=0.05", 1.02),
    ],
)
def test_learning_comes_closer_to_the_float_block_on_data_that_it_has_not_seen(options: str, share: float) -> None:
    untuned, _ = run(QUANTIZE)
    model, report = tuned(f"tune{{steps=40,batch=2,{options}}}")
    assert report.count(Outcome.CHANGED) == 2
    assert report.sites[0].details["after_db"] > report.sites[0].details["before_db"]
    assert error(model) < share * error(untuned)


def test_a_rate_that_only_spoils_leaves_everything_bit_identical() -> None:
    plain, _ = run(f"{QUANTIZE},tune{{steps=1,learn=[scale],range-rate=1e-12}}")
    model, report = tuned("tune{learn=[weights],optimizer=adam,rate=1000,steps=5}")
    assert {s.outcome for s in report.sites} == {Outcome.MATCHED}
    for found in zip(*map(codes, (plain, model)), strict=True):
        np.testing.assert_array_equal(*found)


def codes(model: Model) -> list[np.ndarray]:
    weights = (read_weight(v) for n in model.graph for v in n.inputs)
    return [w.quantized().codes for w in weights if w is not None and w.format is not None and w.value.producer()]


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_threads_of_torch_alone() -> None:
    threads = torch.get_num_threads()
    found = [tuned("tune{steps=10}")[0].graph.initializers for _ in range(2)]
    assert torch.get_num_threads() == threads
    assert [v.const_value.tobytes() for v in found[0].values()] == [v.const_value.tobytes() for v in found[1].values()]


def test_layers_that_cannot_be_learned_say_why() -> None:
    spec = "quantize-weights{format=nf4,group=32,exclude=[w1]},tune{steps=2,optional=true}"
    _, reports = run(spec)
    assert [s.reason for s in reports[1].sites] == [
        "its weight is float: quantize weights first",
        "the values of nf4 are not on a grid with integer zero points",
    ]
    assert learnable(Format.parse("uint4:g32")) == ""


def test_options_that_make_no_sense_are_refused() -> None:
    for options in ({"learn": ("everything",)}, {"learn": ()}, {"optimizer": "lion"}, {"steps": 0}, {"loss": "kl"}):
        with pytest.raises(InputError, match=r"of tune|tune to learn"):
            Tune(**options)
    with pytest.raises(InputError, match="PassManager"):
        Tune()(mlp())
