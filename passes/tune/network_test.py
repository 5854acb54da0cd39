"""A whole network is brought closer to its float original, judged by its outputs, and never ends worse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from scipy.special import log_softmax

from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model, set_role
from qc.ir.quant import read_weight
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import Context, Contract, Lossy, Outcome, Pass, Result
from qc.passes.journal import Journal
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import parse_pipeline

torch = pytest.importorskip("torch", reason="learning needs torch")

_BLOCK = """
      u{i} = RMSNormalization <axis = -1> (x{i}, gain{i})
      h{i} = qc.Linear (u{i}, up{i})
      a{i} = qc.Swish <alpha = 1.0> (h{i})
      d{i} = qc.Linear (a{i}, down{i})
      x{j} = Add (x{i}, d{i})
"""
DEPTH = 3
QUANTIZE = "quantize-weights{format=uint2,group=32,head=float}"
TUNE = "tune-network{steps=30,batch=2,rate=0.02,range-rate=0.02"


def network(role: str = "logits") -> Model:
    """Blocks behind one another, then a wide product."""
    rng = np.random.default_rng(0)
    weights = {"head": rng.standard_normal((96, 32)) / 3}
    for i in range(DEPTH):
        weights |= {
            f"gain{i}": 1 + 0.1 * rng.standard_normal(32),
            f"up{i}": rng.standard_normal((64, 32)) / 6,
            f"down{i}": rng.standard_normal((32, 64)) / 6,
        }
    body = "".join(_BLOCK.format(i=i, j=i + 1) for i in range(DEPTH))
    text = f"g (float[n,32] x0) => (float[n,96] y) {{{body}      y = qc.Linear (x{DEPTH}, head)\n}}"
    model = parse(text, weights={k: v.astype(np.float32) for k, v in weights.items()})
    set_role(model.graph.outputs[0], role)
    return model


def inputs(count: int = 9, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x0": rng.standard_normal((48, 32)).astype(np.float32)} for _ in range(count)]


def run(spec: str, role: str = "logits", calibration: list | None = None) -> tuple[Model, list[PassReport]]:
    """One thread: the network is too small for two."""
    manager = PassManager(parse_pipeline(spec), verify=False)
    return manager.run(network(role), calibration=calibration or inputs(), context=Context(threads=1))


def divergence(model: Model, seed: int = 2) -> float:
    """KL to the float network on inputs that nobody has seen, by SciPy."""
    before, after = Session(network()), Session(model)
    total = 0.0
    for batch in inputs(6, seed):
        p, q = (log_softmax(s.run(batch)["y"].astype(np.float64), -1) for s in (before, after))
        total += float((np.exp(p) * (p - q)).sum(-1).mean()) / 6
    return total


def codes(model: Model) -> list[np.ndarray]:
    weights = (read_weight(v) for n in model.graph for v in n.inputs)
    return [w.quantized().codes for w in weights if w is not None and w.format is not None and w.value.producer()]


@pytest.mark.parametrize(("learn", "share"), [("scale,norms", 0.8), ("weights,range,norms", 0.7), ("rounding", 0.9)])
def test_its_outputs_come_closer_on_data_that_it_has_not_seen(learn: str, share: float) -> None:
    untuned, _ = run(QUANTIZE)
    model, reports = run(f"{QUANTIZE},{TUNE},learn=[{learn}]}}")
    assert reports[-1].count(Outcome.CHANGED) == 2 * DEPTH
    assert divergence(model) < share * divergence(untuned)


def test_what_the_report_calls_the_loss_is_the_divergence_of_the_artifact() -> None:
    _, reports = run(f"{QUANTIZE},{TUNE}}}", calibration=inputs(6, seed=2)[:1])
    model, _ = run(QUANTIZE, calibration=inputs(6, seed=2)[:1])
    before, after = Session(network()), Session(model)
    p, q = (log_softmax(s.run(inputs(6, seed=2)[0])["y"].astype(np.float64), -1) for s in (before, after))
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    assert reports[-1].sites[-1].details["before"] == pytest.approx(expected, rel=1e-4)


def test_outputs_that_are_no_logits_are_compared_by_their_squares() -> None:
    untuned, _ = run(QUANTIZE, role="hidden")
    model, reports = run(f"{QUANTIZE},{TUNE}}}", role="hidden")
    reference = Session(network())
    squares = []
    for found in (untuned, model):
        session = Session(found)
        squares.append(sum(np.square(session.run(b)["y"] - reference.run(b)["y"]).sum() for b in inputs(6, seed=2)))
    assert squares[1] < 0.9 * squares[0]
    assert 0 < reports[-1].sites[-1].details["after"] < 1


def test_scales_alone_leave_every_code_as_it_is() -> None:
    untuned, _ = run(f"{QUANTIZE}")
    model, _ = run(f"{QUANTIZE},{TUNE},learn=[scale]}}")
    for old, new in zip(codes(untuned), codes(model), strict=True):
        np.testing.assert_array_equal(old, new)
    assert divergence(model) != divergence(untuned)


def test_it_goes_on_behind_a_sweep_and_knows_of_rounded_activations() -> None:
    pipeline = f"{QUANTIZE[:-1]},assign=gptq}},quantize-activations{{bits=4,granularity=token}}"
    untuned, _ = run(pipeline)
    model, reports = run(f"{pipeline},{TUNE},learn=[weights,range,norms]}}")
    assert reports[-1].count(Outcome.CHANGED) == 2 * DEPTH
    assert divergence(model) < 0.9 * divergence(untuned)


def test_ranges_of_activations_are_learned_and_weights_stay_as_they_are() -> None:
    weights = "quantize-weights{format=uint8,group=32,head=float}"
    pipeline = f"{weights},quantize-activations{{mode=static,bits=4,range=minmax}}"
    untuned, _ = run(pipeline)
    model, _ = run(f"{pipeline},{TUNE},learn=[activations]}}")
    for old, new in zip(codes(untuned), codes(model), strict=True):
        np.testing.assert_array_equal(old, new)
    assert divergence(model) < 0.95 * divergence(untuned)


def test_a_rate_that_only_spoils_leaves_everything_bit_identical() -> None:
    plain, _ = run(QUANTIZE)
    model, reports = run(f"{QUANTIZE},tune-network{{learn=[weights],rate=1000,steps=5}}")
    assert reports[-1].count(Outcome.MATCHED) == 2 * DEPTH
    initializers = [m.graph.initializers for m in (plain, model)]
    assert [v.const_value.tobytes() for v in initializers[0].values()] == [
        v.const_value.tobytes() for v in initializers[1].values()
    ]


def test_the_same_seed_gives_the_same_bytes() -> None:
    found = [run(f"{QUANTIZE},{TUNE}}}")[0].graph.initializers for _ in range(2)]
    assert [v.const_value.tobytes() for v in found[0].values()] == [v.const_value.tobytes() for v in found[1].values()]


def test_where_nothing_was_quantized_or_nothing_is_there_to_learn_from_it_says_so() -> None:
    with pytest.raises(UnsupportedError, match="its weight is float"):
        run("tune-network")
    manager = PassManager(parse_pipeline(f"{QUANTIZE},tune-network{{optional=true}}"), verify=False)
    _, reports = manager.run(network())
    assert {s.reason for s in reports[-1].sites if "head" not in s.name} >= {
        "there is no calibration data to learn from"
    }
    quantized, _ = run(QUANTIZE)
    manager = PassManager(parse_pipeline("tune-network{optional=true}"), verify=False)
    _, reports = manager.run(quantized, calibration=inputs())
    assert "nothing was quantized in this run" in {s.reason for s in reports[-1].sites}


@dataclasses.dataclass(frozen=True)
class _Compare(Pass):
    """Remembers how far weights are from those of the network to come close to."""

    contract: ClassVar[Contract] = Lossy()
    errors: ClassVar[list[float]] = []

    @property
    def wants_reference(self) -> bool:
        return True

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        made = {v.name: n for n in context.reference.graph for v in n.outputs}
        for node in (n for n in model.graph if n.op_type == "Linear"):
            now, then = (read_weight(n.inputs[1]).numpy() for n in (node, made[node.outputs[0].name]))
            self.errors.append(float(np.abs(now - then).max() / np.abs(then).max()))
        return Result(model, False)


def test_what_it_comes_close_to_is_the_network_with_its_transforms() -> None:
    steps = [*parse_pipeline("smooth{alpha=1.0},quantize-weights{format=uint8,group=32,assign=gptq}"), _Compare()]
    _Compare.errors.clear()
    PassManager(steps, verify=False).run(network(), calibration=inputs(), context=Context(threads=1))
    assert len(_Compare.errors) == 2 * DEPTH + 1
    assert max(_Compare.errors) < 0.01


class _Killed(BaseException):
    pass


def learn(directory: Path, facts: dict[str, str], *, kill: int = 0, calibration: list | None = None) -> Model:
    """Learns with a journal in `directory`, until step `kill` if there is one."""

    def tick(done: int, total: int, site: str) -> None:
        if kill and site == f"step {kill}":
            raise _Killed

    context = Context(threads=1, journal=Journal(directory, facts, resume=True), tick=tick)
    manager = PassManager(parse_pipeline(f"{QUANTIZE},{TUNE.replace('30', '8')}}}"), verify=False)
    return manager.run(network(), calibration=calibration or inputs(), context=context)[0]


def numbers(model: Model) -> list[bytes]:
    return [v.const_value.tobytes() for v in model.graph.initializers.values()]


def test_kills_do_not_change_a_byte_and_no_step_that_is_in_the_journal_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qc.passes.tune import _checkpoint

    monkeypatch.setattr(_checkpoint, "_SECONDS", 0.0)
    monkeypatch.setattr(_checkpoint, "_SHARE", 0)
    expected = numbers(learn(tmp_path / "whole", {}))
    for kill in (1, 2, 5, 6, 8):  # a step that was done before would not be reached again
        with pytest.raises(_Killed):
            learn(tmp_path / "killed", {}, kill=kill)
    assert numbers(learn(tmp_path / "killed", {})) == expected
    assert numbers(learn(tmp_path / "killed", {}, kill=8)) == expected, "the last step is in the journal too"


def test_a_journal_of_other_data_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    learn(tmp_path, {"version": "1"})
    with pytest.raises(InputError, match="its version is 1, that of this compile 2"):
        learn(tmp_path, {"version": "2"})
    with pytest.raises(InputError, match="its calibration data is"):
        learn(tmp_path, {"version": "1"}, calibration=inputs(seed=3))
    (state,) = tmp_path.glob("*.state")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="not readable"):
        learn(tmp_path, {"version": "1"})
