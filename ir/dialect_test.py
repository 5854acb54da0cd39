"""The operators of the dialect run anywhere, because their bodies travel with the model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qc.ir import dialect


def _value(name: str, shape: list) -> ir.Value:
    return ir.val(name, ir.DataType.FLOAT, shape)


def _model(opset: int = 23) -> ir.Model:
    x, w, b = _value("x", ["n", 3]), _value("w", [2, 3]), _value("b", [2])
    plain, biased = dialect.linear(x, w), dialect.linear(x, w, b)
    act = dialect.swish(biased.outputs[0], 1.702)
    graph = ir.Graph(
        [x, w, b],
        [plain.outputs[0], act.outputs[0]],
        nodes=[plain, biased, act],
        opset_imports={"": opset},
        name="g",
    )
    model = ir.Model(graph, ir_version=10)
    dialect.sync_functions(model)
    return model


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_bodies_mean_what_the_table_says(opset):
    rng = np.random.default_rng(0)
    inputs = {k: rng.standard_normal(s).astype(np.float32) for k, s in (("x", (4, 3)), ("w", (2, 3)), ("b", (2,)))}
    proto = ir.to_proto(_model(opset))
    onnx.checker.check_model(proto)
    # not onnx.reference, which does not know overloads
    plain, act = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, inputs)
    biased = inputs["x"] @ inputs["w"].T + inputs["b"]
    np.testing.assert_allclose(plain, inputs["x"] @ inputs["w"].T, atol=1e-6)
    np.testing.assert_allclose(act, biased / (1 + np.exp(-1.702 * biased)), atol=1e-6)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_quantization_means_what_the_table_says(token: bool, symmetric: bool):
    x = _value("x", ["n", 8])
    node = dialect.dynamic_quantize(x, bits=4, token=token, symmetric=symmetric, clip=0.75)
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}, name="g"), ir_version=10)
    node.outputs[0].name = "y"
    dialect.sync_functions(model)
    given = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32) * np.float32([[1], [9], [0], [2], [3]])
    (found,) = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": given})
    axis = 1 if token else None
    low = 0.75 * np.minimum(given.min(axis, keepdims=True), 0)
    high = 0.75 * np.maximum(given.max(axis, keepdims=True), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if symmetric:
            scale = np.maximum(-low, high) / 7
            expected = scale * np.clip(np.rint(given / scale), -8, 7)
        else:
            scale = (high - low) / 15
            zero = np.rint(-low / scale)
            expected = scale * (np.clip(np.rint(given / scale) + zero, 0, 15) - zero)
    np.testing.assert_allclose(found, np.nan_to_num(expected), atol=1e-5)


def test_a_linear_knows_its_shape():
    node = dialect.linear(_value("x", ["batch", "seq", 3]), _value("w", [2, 3]))
    assert [str(d) for d in node.outputs[0].shape] == ["batch", "seq", "2"]


def test_sync_gives_exactly_the_bodies_that_are_used():
    model = _model()
    assert {(k[1], k[2]) for k in model.functions} == {("Linear", ""), ("Linear", "bias"), ("Swish", "")}
    for node in list(model.graph):
        if node.overload == "bias" or node.op_type == "Swish":
            for output in node.outputs:
                output.replace_all_uses_with(model.graph.inputs[0], replace_graph_outputs=True)
            model.graph.remove(node)
    dialect.sync_functions(model)
    assert {(k[1], k[2]) for k in model.functions} == {("Linear", "")}


def test_sync_follows_the_opset_of_the_model():
    model = _model()
    model.graph.opset_imports[""] = 25
    dialect.sync_functions(model)
    assert {f.opset_imports[""] for f in model.functions.values()} == {25}


def test_the_domain_goes_when_nothing_uses_it():
    x = _value("x", [1])
    model = ir.Model(ir.Graph([x], [x], nodes=[], opset_imports={"": 23, "qc": 1}, name="g"), ir_version=10)
    dialect.sync_functions(model)
    assert dialect.DOMAIN not in model.opset_imports
