"""A model keeps what qc knows about it through foreign passes, copies and files."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from qc.ir.errors import InputError
from qc.ir.model import Model, Port, set_role


def _model() -> Model:
    x = ir.val("ids", ir.DataType.INT64, ["batch", "seq"])
    table = ir.tensor(np.arange(4096, dtype=np.float32).reshape(1024, 4), name="table")
    w = ir.Value(name="table", const_value=table, shape=ir.Shape(table.shape), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Gather", [w, x])
    node.outputs[0].name, node.outputs[0].dtype = "h", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["batch", "seq", 4])
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    model = Model.of(ir.Model(graph, ir_version=10))
    set_role(x, "tokens")
    set_role([node.outputs[0]], "present_key")
    model.record(vocab_size=1024)
    return model


def test_the_signature_is_read_from_the_graph():
    signature = _model().signature
    assert signature.input("tokens") == Port("ids", ir.DataType.INT64, ("batch", "seq"), "tokens")
    assert signature.output("present_key") == Port("h", ir.DataType.FLOAT, ("batch", "seq", 4), "present_key", 0)
    assert signature.input("mask") is None
    assert not signature.is_decoder


def test_roles_and_provenance_survive_save_and_load(tmp_path):
    model = _model()
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert loaded.signature == model.signature
    assert loaded.provenance == {"vocab_size": "1024"}
    tensor = loaded.graph.initializers["table"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), np.arange(4096, dtype=np.float32).reshape(1024, 4))


def test_assets_travel_byte_for_byte(tmp_path):
    source = tmp_path / "source"
    _model().save(source)
    (source / "tokenizer.json").write_bytes(b'{"a": 1}\r\n')
    (source / "notes.txt").write_text("not an asset")
    Model.load(source).save(tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == b'{"a": 1}\r\n'
    assert not (tmp_path / "copy/notes.txt").exists()


def test_a_clone_shares_weights_and_nothing_else():
    model = _model()
    model.assets["config.json"] = "somewhere"
    copy = model.clone()
    copy.graph.outputs[0].name = "renamed"
    assert model.signature.outputs[0].name == "h"
    assert copy.assets == model.assets
    assert copy.graph.initializers["table"].const_value is model.graph.initializers["table"].const_value


def test_a_foreign_pass_keeps_the_model():
    model = _model()
    result = common.RemoveUnusedNodesPass()(model)
    assert result.model is model


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="found 'token'"):
        set_role(_model().graph.inputs[0], "token")


def test_a_missing_or_broken_file_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Model.load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07garbage\xff\xff")
    with pytest.raises(InputError, match="not a readable ONNX model"):
        Model.load(tmp_path)
