"""A model of one linear layer, quantized."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.model import Model
from qc.passes.base import Context
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

ROWS, COLUMNS = 40, 64
X = np.random.default_rng(4).standard_normal((3, COLUMNS), np.float32) * np.array([[1], [20], [0]], np.float32)


@pytest.fixture
def linear() -> Callable[[str], tuple[Model, np.ndarray]]:
    """``linear(pipeline)`` yields the model, and an input that it is calibrated on."""

    def make(pipeline: str) -> tuple[Model, np.ndarray]:
        rng = np.random.default_rng(0)
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", COLUMNS]))
        held = {"w": rng.standard_normal((ROWS, COLUMNS)), "b": np.arange(ROWS)}
        w, b = (
            ir.Value(name=n, const_value=ir.tensor(a.astype(np.float32), name=n), shape=ir.Shape(a.shape))
            for n, a in held.items()
        )
        for value in (w, b):
            value.dtype = ir.DataType.FLOAT
        node = dialect.linear(x, w, b)
        node.outputs[0].name = "y"
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w, b], opset_imports={"": 23}, name="g")
        context = Context(calibration=[{"x": X}])
        model, _ = PassManager(parse_pipeline(pipeline)).run(Model.of(ir.Model(graph, ir_version=10)), context=context)
        model.meta["store"] = context.store  # the model's weights live in it
        return Model.of(model), X

    return make
