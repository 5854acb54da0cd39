"""The verifying runtime reads weights where they lie and leaves the model as it was."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import InternalError
from qc.ir.model import Model, set_role
from qc.ir.probe import index_bound, probe_inputs
from qc.ir.runtime import Session, serialize
from qc.ir.store import Store
from qc.ir.text import parse


def _embedder(tensor: ir.TensorProtocol) -> Model:
    """A table of rows, projected."""
    ids = ir.val("ids", ir.DataType.INT64, ["batch", "seq"])
    table = ir.Value(name="t", const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
    rows = ir.node("Gather", [table, ids])
    weight = ir.tensor(np.eye(int(tensor.shape[1]), dtype=np.float32)[:2], name="w")
    w = ir.Value(name="w", const_value=weight, shape=ir.Shape(weight.shape), type=ir.TensorType(ir.DataType.FLOAT))
    out = dialect.linear(rows.outputs[0], w)
    out.outputs[0].name, out.outputs[0].dtype = "y", ir.DataType.FLOAT
    out.outputs[0].shape = ir.Shape(["batch", "seq", 2])
    graph = ir.Graph(
        [ids], [out.outputs[0]], nodes=[rows, out], initializers=[table, w], opset_imports={"": 23}, name="g"
    )
    model = Model.of(ir.Model(graph, ir_version=10))
    dialect.sync_functions(model)
    return model


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)


def test_weights_in_memory_on_disk_and_lazy_give_the_same(table):
    store = Store()
    tensors = [
        ir.tensor(table, name="t"),
        store.put("t", table),
        ir.LazyTensor(lambda: ir.tensor(table), ir.DataType.FLOAT, ir.Shape(table.shape), name="t"),
    ]
    ids = np.array([[3, 49, 0]])
    for tensor in tensors:
        outputs = Session(_embedder(tensor)).run({"ids": ids, "unknown": ids})
        np.testing.assert_array_equal(outputs["y"], table[ids][..., :2])


def test_a_weight_on_disk_is_referred_to_and_not_copied(table):
    store, spill = Store(), Store()
    model = _embedder(store.put("t", table))
    proto = serialize(model, spill)
    assert len(proto) < 3000
    assert not list(spill.directory.glob("*")) or (spill.directory / "weights.bin").stat().st_size == 0
    assert isinstance(model.graph.initializers["t"].const_value, ir.ExternalTensor)


def test_a_model_that_the_runtime_refuses_is_a_defect_of_ours(table):
    model = _embedder(ir.tensor(table, name="t"))
    model.graph[0].op_type = "Gthr"
    with pytest.raises(InternalError, match="refuses"):
        Session(model)


def test_probe_ids_stay_below_the_table_that_they_index(table):
    model = _embedder(ir.tensor(table, name="t"))
    assert index_bound(model, "ids") == 50
    (batch,) = probe_inputs(model, seed=1)
    assert batch["ids"].shape == (2, 7)
    assert 0 <= batch["ids"].min() <= batch["ids"].max() < 50


def test_probes_depend_on_the_seed_alone(table):
    model = _embedder(ir.tensor(table, name="t"))
    first, again, other = (probe_inputs(model, seed)[0]["ids"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_encoder_is_probed_with_padding():
    mask = ir.val("mask", ir.DataType.INT64, ["batch", "seq"])
    set_role(mask, "mask")
    graph = ir.Graph([mask], [mask], nodes=[], opset_imports={"": 23}, name="g")
    (batch,) = probe_inputs(Model.of(ir.Model(graph, ir_version=10)))
    assert batch["mask"].tolist() == [[1] * 7, [1] * 5 + [0, 0]]


def test_folded_weights_give_the_same_and_nodes_that_lead_nowhere_do_not_run(table: np.ndarray) -> None:
    text = """g (float[n,16] x) => (float[n,50] y) {
      w = DequantizeLinear <axis = 1, block_size = 8> (codes, scales)
      unused = Reshape (x, shape)
      y = qc.Linear (x, w)
    }"""
    codes = np.random.default_rng(0).integers(-8, 8, table.shape).astype(np.int8)
    weights = {"codes": codes, "scales": np.abs(table[:, :2]), "shape": np.array([7, 11, 13])}
    model = parse(text, weights=weights)
    found = [Session(model, fold=fold).run({"x": table[:5]})["y"] for fold in (False, True)]
    expected = table[:5] @ (codes * np.repeat(np.abs(table[:, :2]), 8, axis=1)).T
    for y in found:
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_an_attention_whose_cache_nobody_reads_still_appends_to_it():
    text = """<ir_version: 10, opset_import: ["" : 23]>
    net (float[1,s,8] x, float[1,2,p,4] k, float[1,2,p,4] v) => (float[1,s,8] y) {
        y, a, b = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x, , k, v) }"""
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 3, 8), "k": (1, 2, 5, 4), "v": (1, 2, 5, 4)}
    inputs = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    assert Session(ir.from_onnx_text(text)).run(inputs)["y"].shape == (1, 3, 8)
