"""Binding of traced weights to checkpoint bytes."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from qc.frontend.safetensors_file import read_header
from qc.frontend.weights import bind
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.runtime import Session


def two_products(shape: tuple[int, int] = (4, 4)) -> Model:
    """Y = (x @ a) @ b, with placeholders of zeros for a and b."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = []
    for name in ("a", "b"):
        w = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        w.const_value = ir.tensor(np.zeros(shape, np.float32), name=name)
        weights.append(w)
    first = ir.node("MatMul", [x, weights[0]])
    second = ir.node("MatMul", [first.outputs[0], weights[1]])
    y = second.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 4])
    graph = ir.Graph([x], [y], nodes=[first, second], initializers=weights, opset_imports={"": 23}, name="g")
    return Model.of(ir.Model(graph, ir_version=10))


def write_safetensors(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file by hand, as the numpy writer of the safetensors package knows no bfloat16."""
    names = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}
    header, position = {}, 0
    for name, array in arrays.items():
        span = [position, position := position + array.nbytes]
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": span}
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(a.tobytes() for a in arrays.values()))


X = np.eye(4, dtype=np.float32)


def numbers(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_a_weight_keeps_its_stored_type_and_computes_in_float32(tmp_path: Path, dtype: type) -> None:
    a, b = numbers(0).astype(dtype), numbers(1).astype(dtype)
    write_safetensors(tmp_path / "w", {"a": a, "b": b})
    model = two_products()
    bind(model.graph, read_header(tmp_path / "w"))
    stored = model.graph.initializers["a"]
    assert stored.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    assert isinstance(stored.const_value, ir.ExternalTensor)
    assert sum(n.op_type == "Cast" for n in model.graph) == (0 if dtype is np.float32 else 2)
    expected = a.astype(np.float32) @ b.astype(np.float32)
    np.testing.assert_allclose(Session(model).run({"x": X})["y"], expected, atol=1e-5)


def test_tied_weights_become_one_initializer(tmp_path: Path) -> None:
    save_file({"a": numbers(0).astype(np.float16)}, tmp_path / "w")
    entry = read_header(tmp_path / "w")["a"]
    model = two_products()
    bind(model.graph, {"a": entry, "b": entry})
    assert list(model.graph.initializers) == ["a"]
    assert [n.op_type for n in model.graph] == ["Cast", "MatMul", "MatMul"]
    a = numbers(0).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(Session(model).run({"x": X})["y"], a @ a, atol=1e-5)


def test_a_weight_of_another_shape_or_kind_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros((4, 8), np.float32), "b": np.zeros((4, 4), np.int8)}, tmp_path / "w")
    entries = read_header(tmp_path / "w")
    with pytest.raises(InputError, match=r"\[4, 8\].*\[4, 4\]"):
        bind(two_products().graph, {"a": entries["a"]})
    with pytest.raises(InputError, match="quantized"):
        bind(two_products().graph, {"b": entries["b"]})


def test_a_weight_takes_the_name_it_has_in_the_checkpoint(tmp_path: Path) -> None:
    save_file({"a": numbers(0), "b": numbers(1)}, tmp_path / "w")
    entries = read_header(tmp_path / "w")
    model = two_products()
    bind(model.graph, {"a": entries["b"], "b": entries["a"]})
    assert [node.inputs[1].name for node in model.graph] == ["b", "a"]  # type: ignore[union-attr]
    np.testing.assert_allclose(Session(model).run({"x": X})["y"], numbers(1) @ numbers(0), atol=1e-5)
