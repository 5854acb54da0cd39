"""ONNX files: lazily loaded, raised where that changes nothing, refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qc.frontend import load
from qc.ir.errors import InputError
from qc.ir.runtime import Session


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    opset: int = 17,
    weights: dict[str, np.ndarray] | None = None,
    *,
    extra_domains: tuple[str, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
    external: bool = False,
) -> Path:
    """Writes a model from x [batch, 4] to y."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, name) for name, w in (weights or {}).items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in extra_domains)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location="w.bin", size_threshold=0)
    return path


def matmul(path: Path, **options: object) -> Path:
    weight = np.arange(64, dtype=np.float32).reshape(4, 16)
    return write(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], weights={"w": weight}, **options)  # type: ignore[arg-type]


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("opset", [7, 11, 13, 17, 18, 21, 23, 24])
def test_a_model_of_any_opset_computes_what_it_computed(tmp_path: Path, opset: int) -> None:
    model = load(matmul(tmp_path / "m.onnx", opset=opset))
    assert model.opset_imports[""] == max(opset, 23), model.provenance
    expected = X @ np.arange(64, dtype=np.float32).reshape(4, 16)
    np.testing.assert_allclose(Session(model).run({"x": X})["y"], expected, rtol=1e-6)


def test_old_softmax_keeps_its_flattening(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["u"], axes=[2]),
        helper.make_node("Softmax", ["u"], ["y"], axis=1),
    ]
    model = load(write(tmp_path / "m.onnx", nodes, opset=11))
    expected = np.exp(X) / np.exp(X).sum(1, keepdims=True)
    np.testing.assert_allclose(Session(model).run({"x": X})["y"][..., 0], expected, rtol=1e-5)


def test_recurrent_layers_whose_batch_comes_first_are_turned(tmp_path: Path) -> None:
    """ONNX Runtime has no kernel for them; the evaluator of ONNX has, of one direction."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        f (float[b,t,8] x, float[b,1,4] h, float[b,1,4] c) => (float[b,t,1,4] y, float[b,1,4] z) {
            y, last, cell = LSTM <hidden_size = 4, layout = 1> (x, W, R, , , h, c)  z = Sub (last, cell) }"""
    )
    for name, shape in {"W": (1, 16, 8), "R": (1, 16, 4)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    onnx.save(model, tmp_path / "model.onnx")
    shapes = {"x": (3, 5, 8), "h": (3, 1, 4), "c": (3, 1, 4)}
    feed = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    expected = ReferenceEvaluator(model).run(None, feed)
    found = Session(load(tmp_path / "model.onnx")).run(feed)
    assert list(found) == ["y", "z"]
    for a, b in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_unconvertible_model_keeps_its_opset_and_says_why(tmp_path: Path) -> None:
    body = helper.make_function(
        "custom", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    path = write(
        tmp_path / "m.onnx", [helper.make_node("Twice", ["x"], ["y"], domain="custom")],
        extra_domains=("custom",), functions=(body,),
    )  # fmt: skip
    model = load(path)
    assert model.opset_imports[""] == 17
    assert "functions" in model.provenance["opset_kept"]
    assert len(model.functions) == 1
    np.testing.assert_array_equal(Session(model).run({"x": X})["y"], X + X)


def test_axes_without_a_name_get_one_of_their_own(tmp_path: Path) -> None:
    path = matmul(tmp_path / "m.onnx")
    proto = onnx.load(path)
    proto.graph.input.append(helper.make_tensor_value_info("z/", TensorProto.FLOAT, [None, "z__0", 3]))
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    onnx.save(proto, path)
    signature = load(path).signature
    assert [p.shape for p in signature.inputs] == [("x_0", 4), ("z__0_", "z__0", 3)]
    assert [p.shape for p in signature.outputs] == [("x_0", 16)]


def test_foreign_nodes_are_kept(tmp_path: Path) -> None:
    model = load(write(tmp_path / "m.onnx", [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")],
                       opset=20, extra_domains=("com.microsoft",)))  # fmt: skip
    assert [n.domain for n in model.graph] == ["com.microsoft"]


@pytest.mark.parametrize("opset", [16, 20])
def test_subgraphs_are_kept(tmp_path: Path, opset: int) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["x"], [name])], name, [], [out])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("a", "Neg"), else_branch=branch("b", "Abs")),
    ]
    model = load(write(tmp_path / "m.onnx", nodes, opset=opset, weights={"zero": np.float32(0).reshape(())}))
    session = Session(model)
    np.testing.assert_array_equal(session.run({"x": X + 1})["y"], -(X + 1))
    np.testing.assert_array_equal(session.run({"x": X - 1})["y"], np.abs(X - 1))


def test_a_truncated_file_is_an_input_error(tmp_path: Path) -> None:
    path = matmul(tmp_path / "m.onnx")
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"m\.onnx"):
            load(path)


def test_missing_external_data_is_an_input_error(tmp_path: Path) -> None:
    path = matmul(tmp_path / "m.onnx", external=True)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"w\.bin"):
        load(path)


def test_short_external_data_is_an_input_error(tmp_path: Path) -> None:
    path = matmul(tmp_path / "m.onnx", external=True)
    os.truncate(tmp_path / "w.bin", 100)
    with pytest.raises(InputError, match="too short"):
        load(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin"])
def test_external_data_outside_the_directory_are_refused(tmp_path: Path, location: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = matmul(inner / "m.onnx", external=True)
    proto = onnx.load(path, load_external_data=False)
    next(e for e in proto.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "w.bin").write_bytes(bytes(256))
    with pytest.raises(InputError, match="outside"):
        load(path)


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = matmul(inner / "m.onnx", external=True)
    (inner / "w.bin").rename(tmp_path / "w.bin")
    (inner / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(InputError, match="link"):
        load(path)


def test_a_cache_of_linked_blobs_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    matmul(blobs / "m.onnx", external=True)
    for name, blob in (("m.onnx", "111"), ("w.bin", "222")):
        (blobs / name).rename(blobs / blob)
        (snapshot / name).symlink_to(blobs / blob)
    model = load(snapshot / "m.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy()[0], np.arange(16))  # type: ignore[union-attr]


def test_a_hard_link_is_refused(tmp_path: Path) -> None:
    path = matmul(tmp_path / "m.onnx", external=True)
    os.link(tmp_path / "w.bin", tmp_path / "other")
    with pytest.raises(InputError, match="hard links"):
        load(path)


def test_roles_are_guessed_from_standard_names_and_types(tmp_path: Path) -> None:
    def port(name: str, kind: int, *shape: object) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    i, f = TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        port("input_ids", i, "b", "s"), port("attention_mask", i, "b", "t"), port("pixel_values", i, "b", 3, 8, 8),
        port("past_key_values.7.key", f, "b", 2, "p", 8), port("mystery", f, 2),
    ]  # fmt: skip
    outputs = [port("logits", f, "b", "s"), port("odd", f, 2)]
    nodes = [helper.make_node("Cast", ["input_ids"], ["logits"], to=f), helper.make_node("Neg", ["mystery"], ["odd"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "m.onnx")
    signature = load(tmp_path / "m.onnx").signature
    assert [(p.role, p.index) for p in signature.inputs] == [
        ("tokens", None), ("mask", None), ("other", None), ("past_key", 7), ("other", None),
    ]  # fmt: skip
    assert [p.role for p in signature.outputs] == ["logits", "other"]


def test_a_saved_model_comes_back_unchanged(tmp_path: Path) -> None:
    model = load(matmul(tmp_path / "m.onnx"))
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.provenance == model.provenance
    assert [n.name for n in again.graph] == [n.name for n in model.graph]


@pytest.mark.parametrize("source", ["nowhere", "nowhere.onnx"])
def test_a_missing_path_is_an_input_error(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match="nothing there"):
        load(tmp_path / source)


def test_an_unknown_kind_of_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(InputError, match="gguf"):
        load(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"config\.json or model\.onnx"):
        load(tmp_path)


def test_an_unknown_builtin_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="tiny-llama"):
        load("builtin:huge-llama")
