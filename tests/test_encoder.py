"""A real sentence encoder, calibrated and measured on sentences: what static 8 bits and 4-bit weights cost it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import qc
from qc.ir.model import Model


@pytest.fixture(scope="module")
def sentences(root: Path) -> Path:
    text = root.parent / "shared" / "data" / "sentences.txt"
    if not text.is_file():
        pytest.skip("the sentences lie beside the checkout")
    return text


@pytest.mark.slow
def test_static_8_bits_keep_embeddings_and_run_on_integers(encoder: Model, sentences: Path, tmp_path: Path) -> None:
    done = qc.compile(encoder, tmp_path / "out", recipe="w8a8", calib=sentences)
    assert done.report["accuracy"]["cosine"] >= 0.992
    assert done.report["coverage"]["off_target"] == 0
    ops = Counter(node.op_type for node in Model.load(tmp_path / "out").graph)
    assert ops["MatMulIntegerToFloat"] == 25, "four products a layer and the pooler; query, key and value are one"
    assert ops["QuantizeLinear"] == 25
    assert not {"MatMul", "FusedMatMul", "DequantizeLinear", "DynamicQuantizeLinear"} & set(ops)


@pytest.mark.slow
def test_4_bits_with_feedback_keep_embeddings_in_15_mib(encoder: Model, sentences: Path, tmp_path: Path) -> None:
    done = qc.compile(encoder, tmp_path / "out", recipe="gptq-w4", calib=sentences)
    assert done.report["accuracy"]["cosine"] >= 0.987
    assert done.report["coverage"]["off_target"] == 0
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("model.onnx*")) <= 15 << 20
