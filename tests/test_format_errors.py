"""Comparison of formats on a model of two weights."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import onnx_ir as ir
import pytest

from qc import format_errors
from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.model import Model


def model(*shapes: tuple[int, int]) -> Model:
    rng, nodes, inputs = np.random.default_rng(0), [], []
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="test")
    for i, (rows, columns) in enumerate(shapes):
        tensor = ir.tensor(rng.standard_normal((rows, columns), np.float32), name=f"w{i}")
        weight = ir.Value(name=f"w{i}", const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        graph.register_initializer(weight)
        x = ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", columns]))
        inputs.append(x)
        nodes.append(dialect.linear(x, weight, name=f"layer{i}"))
        nodes[-1].outputs[0].name = f"y{i}"
    graph.inputs.extend(inputs)
    graph.extend(nodes)
    graph.outputs.extend(n.outputs[0] for n in nodes)
    return Model.of(ir.Model(graph, ir_version=10))


@pytest.fixture(scope="module")
def data() -> dict:
    return format_errors.formats(model((64, 256), (32, 192)))


def test_every_weight_has_its_error_in_every_format_at_its_bits(data: dict) -> None:
    assert [w["shape"] for w in data["weights"]] == [[64, 256], [32, 192]]
    assert {e["format"] for e in data["weights"][0]["errors"]} == set(format_errors.COMPARED)
    found = {e["format"]: e for e in data["weights"][0]["errors"]}
    assert found["int8"]["bits_per_weight"] == 8 + 32 / 256
    assert found["nf4:g64:q8x256"]["error"] == pytest.approx(0.0074, rel=0.05)


def test_means_count_every_element_alike_and_rise_in_bits(data: dict) -> None:
    bits = [e["bits_per_weight"] for e in data["compared"]]
    assert bits == sorted(bits)
    first, second = ({e["format"]: e["error"] for e in w["errors"]} for w in data["weights"])
    mean = next(e["error"] for e in data["compared"] if e["format"] == "lut3")
    assert mean == pytest.approx((64 * 256 * first["lut3"] + 32 * 192 * second["lut3"]) / (64 * 256 + 32 * 192))


def test_the_plot_shows_every_format(data: dict) -> None:
    texts = [t.text for t in ET.fromstring(format_errors.plot(data)).iter() if t.tag.endswith("text")]
    assert {e["format"] for e in data["compared"]} <= set(texts)


def test_a_model_without_float_weights_has_no_plot() -> None:
    data = format_errors.formats(model())
    assert data == {"compared": [], "weights": []}
    with pytest.raises(InputError, match="found none"):
        format_errors.plot(data)
