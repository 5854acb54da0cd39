"""A linear layer whose input is rounded: the library multiplies the same codes as ONNX Runtime, or rounds in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.tvm.backend import TvmCpu
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.passes.base import Context
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

ROWS, COLUMNS = 40, 64
W8 = "quantize-weights{format=int8,group=0}"
X = np.random.default_rng(4).standard_normal((3, COLUMNS), np.float32) * np.array([[1], [20], [0]], np.float32)


def linear(pipeline: str) -> Model:
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
    return Model.of(model)


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
        ("quantize-weights{format=nf4:g32},quantize-activations{float_weights=true}", False),
    ],
)
def test_a_product_of_what_was_rounded(pipeline: str, as_bytes: bool, tmp_path: Path) -> None:
    model, backend = linear(pipeline), TvmCpu()
    backend.emit(model, tmp_path)
    found = backend.open(tmp_path, threads=1).run({"x": X})["y"]
    np.testing.assert_allclose(found, Session(model).run({"x": X})["y"], rtol=2e-5, atol=2e-5)
    assert ("qck_bytes" in (tmp_path / "model.c").read_text()) == as_bytes
    coverage = backend.coverage(model)
    assert any("rounded in float" in n["reason"] for n in coverage.nodes) != as_bytes


def test_kernels_that_round_finer_by_themselves_do_without_the_rounding(tmp_path: Path) -> None:
    model, backend = linear("quantize-weights{format=int4,group=32},quantize-activations{granularity=token}"), TvmCpu()
    backend.emit(model, tmp_path)
    found = backend.open(tmp_path, threads=1).run({"x": X})["y"]
    expected = Session(model).run({"x": X})["y"]
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
    assert backend.coverage(model).off_target == 0
