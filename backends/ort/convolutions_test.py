"""Convolutions with quantized weights, in the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qc.backends.ort.convolutions import LowerFloatConvolution
from qc.backends.ort.coverage import coverage
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import Outcome
from qc.passes.quantize.weights import QuantizeWeights

FLOAT = "g (float[n,3,8,8] x) => (float[n,8,6,6] y) { y = Conv (x, w, b) }"
INTEGER = """
  g (float[n,3,8,8] x) => (float[n,8,6,6] y) {
    q = QuantizeLinear (x, step, zero)  d = DequantizeLinear (q, step, zero)
    h = Conv (d, w, b)
    r = QuantizeLinear (h, step, zero)  y = DequantizeLinear (r, step, zero)
  }
"""
QUANTIZER = {"step": np.float32(0.03), "zero": np.uint8(128)}


def quantized(text: str, spelling: str = "int8", **more: np.ndarray) -> Model:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 3, 3, 3)), "b": rng.standard_normal(8)}
    model = parse(text, weights={n: a.astype(np.float32) for n, a in weights.items()} | more)
    assert QuantizeWeights(convolution=spelling)(model).modified
    return model


def operators_in_runtime(model: Model, tmp_path: Path) -> list[str]:
    """What the runtime makes of a model when it loads it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # more depends on the machine
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(tmp_path / "loaded.onnx").graph.node]


@pytest.mark.parametrize("spelling", ["int8", "uint8", "int8:tensor"])
def test_on_float_inputs_the_weight_is_decoded_once_when_the_model_is_loaded(spelling: str, tmp_path: Path) -> None:
    model = quantized(FLOAT, spelling)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    expected = Session(model).run(feeds)["y"]
    assert LowerFloatConvolution()(model).modified
    np.testing.assert_array_equal(Session(model).run(feeds)["y"], expected)
    assert operators_in_runtime(model, tmp_path) == ["Conv"]  # neither Cast nor Mul
    assert any("once the model is loaded" in n["reason"] for n in coverage(model).nodes)


def test_on_quantized_inputs_the_runtime_multiplies_integers(tmp_path: Path) -> None:
    model = quantized(INTEGER, **QUANTIZER)
    result = LowerFloatConvolution()(model)
    assert not result.modified
    assert [s.outcome for s in result.sites] == [Outcome.SKIPPED]
    assert "QLinearConv" in operators_in_runtime(model, tmp_path)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    expected, found = (Session(model, optimize=fused).run(feeds)["y"] for fused in (False, True))
    assert np.abs(found - expected).max() <= 1.001 * QUANTIZER["step"]  # one step of the output where sums round apart
