"""Real models on the simulator of an NPU: every node runs there, and computes what the float model does."""

from __future__ import annotations

from pathlib import Path

import pytest

import qc
from qc.ir.model import Model

pytest.importorskip("onnxruntime_qnn", reason="the simulator comes with the extra npu, on Linux and Windows")

pytestmark = pytest.mark.slow


def test_a_sentence_encoder_keeps_its_embeddings(encoder: Model, root: Path, tmp_path: Path) -> None:
    sentences = root.parent / "shared" / "data" / "sentences.txt"
    if not sentences.is_file():
        pytest.skip("the sentences lie beside the checkout")
    target = "ort-npu:qnn,length=20"
    done = qc.compile(encoder, tmp_path / "out", target=target, calib=sentences, samples=16, verify=False)
    assert done.report["coverage"]["off_target"] == 0
    assert done.report["accuracy"]["cosine"] >= 0.999


def test_a_decoder_keeps_its_perplexity_and_generates_text(tmp_path: Path) -> None:
    target, passes = "ort-npu:qnn,prefill=32,cache=96", "quantize-weights{format=int4,group=0,embedding=float}"
    done = qc.compile("builtin:tiny-llama", tmp_path / "out", target=target, passes=passes, samples=2, verify=False)
    assert done.report["coverage"]["off_target"] == 0
    accuracy = done.report["accuracy"]
    assert abs(accuracy["ppl"] / accuracy["ppl_reference"] - 1) <= 0.03
    assert done.artifact is not None
    prompt = list(range(100, 140))  # longer than one prefill
    assert len(list(done.artifact.runner().generate(prompt, 2))) == 2


@pytest.mark.filterwarnings("ignore")  # the warnings of torch are not ours
@pytest.mark.parametrize("name", ["gemma3", "resnet"])
def test_whole_architectures_run(name: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="models are made with torch")
    from architectures import canonical

    passes = "quantize-weights{format=int8,group=0,embedding=float}"
    done = qc.compile(
        canonical(name, models), tmp_path / "out", target="ort-npu:qnn,prefill=32,cache=64", passes=passes
    )
    accuracy = done.report["accuracy"]
    if "ppl" in accuracy:
        assert accuracy["kl"] < 0.01
    else:
        assert accuracy["cosine"] > 0.9995
