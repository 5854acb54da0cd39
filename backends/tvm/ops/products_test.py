"""A linear layer on float activations, and rows of a table: every format yields what its definition does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.tvm.backend import TvmCpu
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.quant import Format, emit
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.passes.quantize.assign import assign

pytest.importorskip("tvm", reason="kernels are compiled by TVM")


@pytest.mark.parametrize(
    "format",
    ["mxfp4", "nvfp4", "ternary:g64", "bitmod3:g32", "mid4:g32", "int8:tensor", "nf4:g32", "lut3c4", "lut5"],
)
def test_a_format_is_multiplied_as_it_is_defined(linear, format: str, tmp_path: Path) -> None:
    (model, x), backend = linear(f"quantize-weights{{format={format}}}"), TvmCpu(exact=True)
    backend.emit(model, tmp_path)
    found = backend.open(tmp_path, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(found, Session(model).run({"x": x})["y"], rtol=2e-5, atol=2e-5)
    off = [node["reason"] for node in backend.coverage(model).nodes if not node["on_target"]]
    assert bool(off) == (format == "lut5"), "more values than a kernel looks up: stored in float"


@pytest.mark.parametrize(("format", "exact"), [("nf4:g32", False), ("lut4:g32", True)])
def test_rows_of_a_weight_in_tables_are_read_as_they_are_defined(format: str, exact: bool, tmp_path: Path) -> None:
    weight, store = np.random.default_rng(0).standard_normal((37, 80), np.float32), Store(tmp_path / "store")
    like = ir.Value(name="w", shape=ir.Shape(weight.shape), type=ir.TensorType(ir.DataType.FLOAT))
    decode = emit(assign(weight, Format.parse(format)), like, store)
    tokens = ir.Value(name="tokens", shape=ir.Shape(["rows"]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [decode.outputs[0], tokens])
    gather.outputs[0].name, gather.outputs[0].dtype = "y", ir.DataType.FLOAT
    held = [value for value in decode.inputs if value is not None]
    graph = ir.Graph(
        [tokens], gather.outputs, nodes=[decode, gather], initializers=held, opset_imports={"": 23}, name="g"
    )
    model = Model.of(ir.Model(graph, ir_version=10))
    dialect.sync_functions(model)
    backend, feed = TvmCpu(exact=exact), {"tokens": np.array([0, 36, -1, 18])}
    (tmp_path / "library").mkdir()
    backend.emit(model, tmp_path / "library")
    found = backend.open(tmp_path / "library", threads=1).run(feed)["y"]
    expected = Session(model).run(feed)["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=np.abs(expected).max() * (0 if exact else 2.0**-15.9))
