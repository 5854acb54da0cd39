"""The codes of copied channels add up to the code that the channel would have alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline
from qc.passes.quantize._copies import copy_offsets

WIDTH, COPIES = 8, 4
INDEX = [0, 1, 2, 3, 4, 5, 6, 7, 2, 2, 2, 5]  # four copies of channel 2, two of channel 5
STATIC = "quantize-activations{mode=static,float_weights=true,range=minmax,symmetric=true}"


def network(*, alike: bool = True, tail: bool = False) -> Model:
    """``Linear(Gather(x))`` whose columns are equal for copies, perhaps with another part behind the gathered one."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["rows", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))

    def stored(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        return ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))

    index = stored("index", np.array(INDEX, np.int64))
    nodes = [ir.node("Gather", [x, index], {"axis": -1})]
    nodes[0].outputs[0].shape = ir.Shape(["rows", len(INDEX)])
    read, sources = nodes[0].outputs[0], list(INDEX)
    if tail:
        nodes.append(ir.node("Concat", [read, x], {"axis": -1}))
        nodes[-1].outputs[0].shape = ir.Shape(["rows", len(INDEX) + WIDTH])
        read, sources = nodes[-1].outputs[0], [*sources, *range(100, 100 + WIDTH)]
    columns = {s: rng.standard_normal(3) for s in sources}
    weight = np.stack([columns[s] for s in sources], 1).astype(np.float32)
    if not alike:
        weight[0, -1 if not tail else len(INDEX) - 1] += 1e-3
    w = stored("w", weight)
    nodes.append(dialect.linear(read, w, name="layer"))
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"v{number}", ir.DataType.FLOAT
    graph = ir.Graph(
        [x], [nodes[-1].outputs[0]], nodes=nodes, initializers=[index, w], opset_imports={"": 23}, name="g"
    )
    return Model.of(ir.Model(graph, ir_version=10))


@pytest.mark.parametrize("tail", [False, True])
def test_codes_of_copies_add_up_to_the_code_of_the_channel(tail: bool) -> None:
    rng = np.random.default_rng(1)
    batch = {"x": rng.uniform(-1, 1, (400, WIDTH)).astype(np.float32)}
    model, (report,) = PassManager(parse_pipeline(STATIC)).run(network(tail=tail), calibration=[batch])
    assert report.sites[0].details["split_codes"] == COPIES + 2
    layer = next(n for n in model.graph if n.op_type == "Linear")
    decoded = layer.inputs[0]
    model.graph.outputs.append(decoded)
    rounded, step = Session(model).run(batch)[decoded.name], report.sites[0].details["scale"]
    for channel, copies in ((2, 4), (5, 2)):
        places = np.flatnonzero(np.array(INDEX) == channel)
        total = rounded[:, places].sum(1) / step
        alone = batch["x"][:, channel] * copies / step  # each copy holds the channel, so the sum is `copies` times it
        inside = np.abs(alone) < 127 * copies - copies
        np.testing.assert_allclose(total, np.rint(total), atol=1e-3)
        assert np.abs(total - alone)[inside].max() <= 0.5 + 1e-3
        plain = np.rint(batch["x"][:, channel] / step) * copies
        assert np.abs(plain - alone)[inside].max() > 0.9, "without offsets the copies err alike"


def test_offsets_cancel_over_the_copies_of_a_channel() -> None:
    model = network()
    offsets = copy_offsets(next(n for n in model.graph if n.op_type == "Linear").inputs[0])
    for channel in set(INDEX):
        assert offsets[np.array(INDEX) == channel].sum() == pytest.approx(0)
    np.testing.assert_allclose(np.sort(offsets[np.array(INDEX) == 2]), [-0.375, -0.125, 0.125, 0.375])


def test_copies_that_are_read_with_different_weights_keep_their_codes() -> None:
    model = network(alike=False)
    offsets = copy_offsets(next(n for n in model.graph if n.op_type == "Linear").inputs[0])
    assert not offsets[np.array(INDEX) == 5].any(), "their columns differ in one number"
    assert offsets[np.array(INDEX) == 2].all()


GATED = """g (float[n,6] x) => (float[n,3] y) {
  p = qc.Linear (x, gate)  s = Sigmoid (p)  u = qc.Linear:bias (x, up, bias)  z = Mul (s, u)
  y = qc.Linear (z, down)
}"""


@pytest.mark.parametrize("differs", [None, "gate", "up", "bias", "down"])
def test_copies_that_weights_make_are_found_by_equal_rows_of_all_of_them(differs: str | None) -> None:
    rng = np.random.default_rng(0)
    held = {"gate": (9, 6), "up": (9, 6), "bias": (9,), "down": (3, 9)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in held.items()}
    for name, array in arrays.items():
        axis = 1 if name == "down" else 0
        view = np.moveaxis(array, axis, 0)
        view[7] = view[8] = view[2]  # three copies of channel 2
        view[6] = view[4]  # and two of channel 4
        if name == differs:
            view[6] += 1e-3
    offsets = copy_offsets(parse(GATED, weights=arrays).graph.outputs[0].producer().inputs[0])
    expected = np.zeros(9)
    expected[[2, 7, 8]] = [-1 / 3, 0, 1 / 3]
    if differs is None:
        expected[[4, 6]] = [-0.25, 0.25]
    np.testing.assert_allclose(offsets, expected)
