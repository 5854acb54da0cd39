from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.reference import ModelRunner
from qc.backends.target import backend_for
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

_SIZES = np.array([200, 30, *[1] * 22], np.float32)
"""How large the output channels of the model below are."""


def _model() -> Model:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    net (float[batch,seq,16] x, float[16,24] w, float[24] b) => (float[batch,seq,24] y) {
        p = MatMul (x, w)
        y = Add (p, b) }"""
    model = Model.of(ir.from_onnx_text(text))
    rng = np.random.default_rng(0)
    held = (rng.standard_normal((16, 24), np.float32) * _SIZES, rng.standard_normal(24, np.float32) * _SIZES * 5)
    for value, array in zip(list(model.graph.inputs)[1:], held, strict=True):
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


def _lowered(model: Model, recipe: str, batches: list[dict[str, np.ndarray]]) -> tuple[Model, Model]:
    """The model with quantized weights, and what it is lowered to."""
    quantized, _ = PassManager([*canonicalize_passes(), *parse_pipeline(recipe)]).run(model, calibration=batches)
    lowering = backend_for("ort-npu:nnapi").lowering()
    lowered, _ = PassManager(lowering, stage="lowering").run(quantized.clone(), calibration=batches)
    return Model.of(quantized), Model.of(lowered)


_WEIGHTS = "quantize-weights{format=int8,group=0}"


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 40, 16), np.float32)} for _ in range(2)]


def test_a_few_large_channels_do_not_make_the_grid_of_an_integer_product_coarse(batches):
    quantized, lowered = _lowered(_model(), _WEIGHTS, batches)
    exact, found = (ModelRunner(m).run(batches[0])["y"] for m in (quantized, lowered))
    noise, signal = ((a**2).mean((0, 1)) for a in (found - exact, exact))
    assert (10 * np.log10(signal / noise)).min() > 30


def test_what_a_recipe_puts_on_a_grid_is_rounded_once(batches):
    _, lowered = _lowered(_model(), f"{_WEIGHTS},quantize-activations{{mode=static}}", batches)
    (product,) = [n for n in lowered.graph if n.op_type == "Conv"]
    decode = product.inputs[0].producer()
    assert decode.op_type == "DequantizeLinear"
    rounded = [n for n in lowered.graph if n.op_type == "QuantizeLinear"]
    assert [n is decode.inputs[0].producer() for n in rounded] == [True, False], "one in front, one behind"
    found = backend_for("ort-npu:nnapi,seq=40").coverage(lowered)
    assert found.off_target == 0, found.nodes


@pytest.mark.parametrize("calibrated", [True, False])
def test_only_products_that_were_observed_are_divided(batches, calibrated):
    lowered = _lowered(_model(), _WEIGHTS, batches if calibrated else [])[1]
    assert ("Mul" in {n.op_type for n in lowered.graph}) == calibrated
