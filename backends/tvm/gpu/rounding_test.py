"""Activations that are quantized on an OpenCL device: the codes that a processor makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qc.backends.target import backend_for
from qc.backends.tvm.backend import TvmCpu
from qc.ir.model import Model
from qc.ir.text import parse

Run = Callable[[Model, Path, dict[str, np.ndarray]], dict[str, np.ndarray]]

W8 = "quantize-weights{format=int8,group=0}"
ROUNDED = """
f (float[batch,rows,37] x) => (float[a,b,c] token, float[d,e,g] tensor, float[h,i,j] clipped, float[k,l,m] linear,
                               float[n,o,p] fixed) {
  token = qc.DynamicQuantize:token_asymmetric <bits = 8, clip = 1.0> (x)
  tensor = qc.DynamicQuantize:tensor_symmetric <bits = 8, clip = 1.0> (x)
  clipped = qc.DynamicQuantize:token_symmetric <bits = 4, clip = 0.75> (x)
  codes, scale, zero = DynamicQuantizeLinear (x)
  linear = DequantizeLinear (codes, scale, zero)
  q = QuantizeLinear (x, step, start)
  fixed = DequantizeLinear (q, step, start)
}
"""


def test_activations_are_rounded_to_what_a_processor_rounds_them_to(on_device: Run, tmp_path: Path) -> None:
    model = parse(ROUNDED, weights={"step": np.float32(0.03), "start": np.int8(5)})
    x = np.random.default_rng(0).standard_normal((2, 70, 37), np.float32) * np.float32([[[3]], [[0.5]]])
    x[1, 3] = 0
    (tmp_path / "here").mkdir()
    TvmCpu(level="x86-64").emit(model, tmp_path / "here")
    expected = TvmCpu(level="x86-64").open(tmp_path / "here", threads=1).run({"x": x})
    found = on_device(model, tmp_path, {"x": x})
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "pipeline",
    [
        f"{W8},quantize-activations",
        "quantize-weights{format=uint8,group=0},quantize-activations{granularity=token,bits=6,clip=0.9}",
    ],
)
def test_a_product_of_rounded_activations_is_that_of_integers(
    linear: Callable[[str], tuple[Model, np.ndarray]], on_device: Run, tmp_path: Path, pipeline: str
) -> None:
    model, x = linear(pipeline)
    (tmp_path / "here").mkdir()
    TvmCpu().emit(model, tmp_path / "here")
    assert "qck_bytes" in (tmp_path / "here/model.c").read_text()
    expected = TvmCpu().open(tmp_path / "here", threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(on_device(model, tmp_path, {"x": x})["y"], expected, rtol=2e-5, atol=1e-4)
    reasons = [n["reason"] for n in backend_for("tvm-opencl").coverage(model).nodes]
    assert any("rounded in float" in reason for reason in reasons)
