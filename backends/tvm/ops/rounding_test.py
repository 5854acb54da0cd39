"""A linear layer whose input is rounded: the library multiplies the same codes as ONNX Runtime, or rounds in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.backend import TvmCpu
from qc.ir.runtime import Session
from qc.ir.text import parse

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

W8 = "quantize-weights{format=int8,group=0}"


@pytest.mark.parametrize(
    ("pipeline", "as_bytes"),
    [
        (f"{W8},quantize-activations", True),
        (f"{W8},quantize-activations{{granularity=token,symmetric=true}}", True),
        ("quantize-weights{format=uint8,group=0},quantize-activations{granularity=token,bits=6,clip=0.9}", True),
        (f"{W8},quantize-activations{{mode=static}}", True),
        (f"{W8},quantize-activations{{mode=static,symmetric=true,bits=4}}", True),
        (f"{W8},quantize-activations{{mode=static,granularity=channel}}", False),
        (f"{W8},quantize-activations{{bits=16,granularity=token}}", False),
        ("quantize-weights{format=int4,group=32},quantize-activations{bits=4,granularity=token}", False),
        ("quantize-weights{format=lut5},quantize-activations{float_weights=true}", False),
    ],
)
def test_a_product_of_what_was_rounded(linear, pipeline: str, as_bytes: bool, tmp_path: Path) -> None:
    (model, x), backend = linear(pipeline), TvmCpu()
    backend.emit(model, tmp_path)
    found = backend.open(tmp_path, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(found, Session(model).run({"x": x})["y"], rtol=2e-5, atol=2e-5)
    assert ("qck_bytes" in (tmp_path / "model.c").read_text()) == as_bytes
    coverage = backend.coverage(model)
    assert any("rounded in float" in n["reason"] for n in coverage.nodes) != as_bytes


def test_kernels_that_round_finer_by_themselves_do_without_the_rounding(linear, tmp_path: Path) -> None:
    (model, x), backend = (
        linear("quantize-weights{format=int4,group=32},quantize-activations{granularity=token}"),
        TvmCpu(),
    )
    backend.emit(model, tmp_path)
    found = backend.open(tmp_path, threads=1).run({"x": x})["y"]
    expected = Session(model).run({"x": x})["y"]
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
    assert backend.coverage(model).off_target == 0


QDQ = """
f (float[batch,3,9,9] x) => (float[batch,8,7,7] y) {
  q = QuantizeLinear (x, step, start)
  d = DequantizeLinear (q, step, start)
  w = DequantizeLinear <axis = 0> (codes, scales)
  b = DequantizeLinear <axis = 0> (sums, steps)
  y = Conv (d, w, b)
}
"""


def test_a_network_that_another_tool_quantized_runs(tmp_path: Path) -> None:
    """Its bias is a constant of int32 times scales."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.001, 0.002, 8).astype(np.float32)
    model = parse(
        QDQ,
        weights={
            "step": np.float32(0.02), "start": np.uint8(121), "codes": rng.integers(-127, 127, (8, 3, 3, 3), np.int8),
            "scales": scales, "sums": rng.integers(-9999, 9999, 8, np.int32), "steps": scales * np.float32(0.02),
        },
    )  # fmt: skip
    TvmCpu(level="x86-64").emit(model, tmp_path)
    assert [n["reason"] for n in TvmCpu().coverage(model).nodes if "stored" in n["reason"]] == [
        "stored in float: convolutions multiply floats"
    ]
    x = rng.standard_normal((2, 3, 9, 9), np.float32)
    found = TvmCpu(level="x86-64").open(tmp_path, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(found, Session(model).run({"x": x})["y"], rtol=2e-5, atol=2e-5)
