"""Fixtures of the recognisers' tests: graphs from text, and the promises that every recogniser keeps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir.model import Model
from qc.passes.base import Pass, Result


@pytest.fixture
def build() -> Callable[..., Model]:
    """``build(text, w=array)``: a model from ONNX text; the named graph inputs become initializers."""

    def make(text: str, **weights: np.ndarray) -> Model:
        model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]>' + text)
        for value in tuple(model.graph.inputs):
            if value.name in weights:
                model.graph.inputs.remove(value)
                value.const_value = ir.tensor(weights[value.name])
                value.shape = ir.Shape(weights[value.name].shape)
                value.type = ir.TensorType(value.const_value.dtype)
                model.graph.register_initializer(value)
        return Model.of(model)

    return make


@pytest.fixture
def keeps() -> Callable[..., Result]:
    """``keeps(pass, model, x=array)``: runs a pass and checks numbers, names, metadata and idempotence."""

    def check(rewrite: Pass, model: Model, *, tol: float = 1e-5, **inputs: np.ndarray) -> Result:
        before = _run(model, inputs)
        result = rewrite(model)
        after = _run(model, inputs)
        assert list(before) == list(after)
        for name, expected in before.items():
            np.testing.assert_allclose(after[name], expected, rtol=tol, atol=tol)
        assert result.modified == any(s.outcome.value == "changed" for s in result.sites)
        assert not rewrite(model).modified, "a second run must find nothing to do"
        return result

    return check


def _run(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))
