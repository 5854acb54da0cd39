from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends import artifact as artifact_module
from qc.backends import bench as module
from qc.backends.artifact import Artifact, ArtifactWriter
from qc.backends.bench import Protocol, bench, take_turns
from qc.backends.manifest import Manifest
from qc.backends.ort.emit import emit
from qc.backends.ort.runner import open_runner
from qc.backends.reference import ModelRunner
from qc.backends.target import Target
from qc.backends.traffic import streamed_bytes
from qc.ir.errors import InputError
from qc.ir.model import Model, Port, Signature

QUICK = Protocol(rounds=2, prompt=4, tokens=6)
TARGET = Target("ort-cpu", "a test", ("onnxruntime", "1.0"), ())


class Clock:
    """Time that passes only when a runner works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed:
    """A decoder that takes a known time for its prompt and for each token."""

    provenance: Mapping[str, str] = MappingProxyType({"vocab_size": "10"})
    signature = Signature(
        (Port("ids", ir.DataType.INT64, ("b", "s"), "tokens"), Port("k", ir.DataType.FLOAT, ("b",), "past_key", 0)),
        (Port("logits", ir.DataType.FLOAT, ("b", "s", 10), "logits"),),
    )

    def __init__(self, clock: Clock, name: str, log: list, prefill: float, step: float) -> None:
        self.clock, self.name, self.log, self.prefill, self.step = clock, name, log, prefill, step

    def run(self, inputs):
        raise AssertionError

    def generate(self, tokens, max_tokens, stop=()):
        self.log.append((self.name, len(tokens), max_tokens))
        self.clock.now += self.prefill
        for number in range(max_tokens):
            self.clock.now += self.step if number else 0
            yield 0


@pytest.fixture
def turns(monkeypatch):
    clock, log = Clock(), []
    monkeypatch.setattr(module, "time", clock)
    sides = {"a": Timed(clock, "a", log, 0.1, 0.02), "b": Timed(clock, "b", log, 0.3, 0.03)}
    return take_turns(sides, Protocol(rounds=3, prompt=8, tokens=16)), log


def test_ratios_above_one_say_that_a_is_faster(turns):
    found, _ = turns
    assert found["ratio"]["decode"] == pytest.approx(1.5)
    assert found["ratio"]["prefill"] == pytest.approx(3)
    assert found["ratio"]["latency"] is None


def test_figures_are_medians_of_what_passed(turns):
    found, _ = turns
    assert found["a"]["prefill_ms"] == pytest.approx(100)
    assert found["a"]["decode_tok_s"] == pytest.approx(50)
    assert found["b"]["latency_ms"] is None


def test_sides_take_turns_and_neither_is_always_first(turns):
    _, log = turns
    assert [name for name, _, _ in log] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert {call[1:] for call in log} == {(8, 17)}


def test_a_prompt_fits_a_small_context(build):
    runner = ModelRunner(build("appending"), threads=1)
    found = take_turns({"a": runner}, Protocol(rounds=1))
    assert found["a"]["decode_tok_s"] > 0
    assert (found["b"], found["ratio"]["decode"]) == (None, None)


def test_models_that_do_not_decode_have_two_latencies(build):
    runner = ModelRunner(build("encoder"), threads=1)
    found = take_turns({"a": runner, "b": runner}, QUICK)
    assert found["a"]["latency_ms"] > 0
    assert found["a"]["latency_large_ms"] > 0
    assert found["a"]["decode_tok_s"] is None
    assert found["ratio"]["latency"] > 0


def test_an_image_model_is_measured_on_one_image_and_on_several():
    text = """<ir_version: 10, opset_import: ["" : 23]>
    net (float[batch,3,height,width] pixels) => (float[batch,3,height,width] y) { y = Relu(pixels) }"""
    runner = ModelRunner(Model.of(ir.from_onnx_text(text)), threads=1)
    shapes = []
    run = runner.run
    runner.run = lambda inputs: shapes.append(inputs["pixels"].shape) or run(inputs)
    take_turns({"a": runner}, Protocol(rounds=1, tokens=1))
    assert set(shapes) == {(1, 3, 224, 224), (4, 3, 224, 224)}


def test_a_decoder_and_an_encoder_do_not_compare(build):
    runners = {"a": ModelRunner(build("appending"), threads=1), "b": ModelRunner(build("encoder"), threads=1)}
    with pytest.raises(InputError, match="one kind"):
        take_turns(runners, QUICK)


@pytest.fixture
def write(build, tmp_path, monkeypatch):
    """Writes artifacts that the runner of this backend opens."""
    backend = type("Backend", (), {"open": staticmethod(open_runner)})
    monkeypatch.setattr(artifact_module, "backend_for", lambda target: backend)
    monkeypatch.setattr("qc.backends.traffic._COPY_BYTES", 1 << 16)

    def write_artifact(kind: str) -> Artifact:
        model = build(kind)
        with ArtifactWriter(tmp_path / kind) as writer:
            emit(model, writer.directory)
            writer.describe(Manifest.of(model, TARGET))
        return Artifact.open(tmp_path / kind)

    return write_artifact


def test_two_artifacts_are_benched_with_all_keys(write):
    found = bench(write("sharing"), write("appending"), QUICK)
    assert found.keys() == {"a", "b", "ratio", "copy_gb_s", "protocol"}
    assert found["ratio"].keys() == {"decode", "prefill", "latency", "latency_large"}
    side = found["a"]
    assert side["bytes_per_token"] == 4 * (4 * 32 * 32 + 32 * 96)
    assert side["bandwidth_fraction"] == pytest.approx(side["bandwidth_gb_s"] / found["copy_gb_s"])
    assert side["load_ms"] > 0
    assert found["protocol"] == {**dataclasses.asdict(QUICK)}


def test_one_artifact_is_benched_alone(write):
    found = bench(write("encoder"), protocol=QUICK)
    assert found["b"] is None
    assert found["a"]["bandwidth_gb_s"] is None
    assert set(found["ratio"].values()) == {None}


def test_a_table_counts_only_if_it_is_also_read_whole(build):
    model = build("appending")
    tables = 4 * (96 * 32 + 48 * 32)
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert streamed_bytes(model) == total - tables
    # Tie the head to the embedding: the table is now read whole for each token.
    embed = model.graph.initializers["embed"]
    head = model.graph.initializers["head"]
    turned = ir.node("Transpose", [embed], {"perm": [1, 0]})
    (product,) = (n for n, _ in head.uses())
    product.replace_input_with(1, turned.outputs[0])
    model.graph.insert_before(product, turned)
    assert streamed_bytes(model) == total - tables - head.const_value.nbytes + embed.const_value.nbytes
    assert np.prod(head.const_value.shape) == np.prod(embed.const_value.shape)


def test_processor_time_is_counted_where_asked(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "process_time", clock.perf_counter)
    runner = Timed(clock, "a", [], 0.1, 0.02)
    found = take_turns({"a": runner}, Protocol(rounds=1, prompt=8, tokens=16, cpu=True))
    assert found["a"]["decode_tok_s"] == pytest.approx(50)
