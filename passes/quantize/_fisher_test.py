"""The Fisher information against finite differences and closed forms, and what it is for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.model import Model, set_role
from qc.ir.quant import Format, read_weight
from qc.ir.runtime import Session
from qc.passes.manager import PassManager
from qc.passes.quantize import _fisher
from qc.passes.quantize._fisher import fisher
from qc.passes.quantize._sites import weight_uses
from qc.passes.quantize.assign import assign
from qc.passes.quantize.weights import QuantizeWeights

pytest.importorskip("torch", reason="gradients need torch")

VOCABULARY, WIDTH = 128, 64


def model(*, role: str = "logits") -> Model:
    """A table of token vectors, a square product, and one with the vocabulary."""
    rng = np.random.default_rng(0)

    def weight(name: str, rows: int) -> ir.Value:
        tensor = ir.tensor(rng.standard_normal((rows, WIDTH)).astype(np.float32) / 8, name=name)
        return ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))

    table, square, head = weight("table", VOCABULARY), weight("square", WIDTH), weight("head", VOCABULARY)
    tokens = ir.Value(name="tokens", shape=ir.Shape(["batch", "seq"]), type=ir.TensorType(ir.DataType.INT64))
    look_up = ir.node("Gather", [table, tokens])
    inner = ir.Node(dialect.DOMAIN, "Linear", [look_up.outputs[0], square])
    tanh = ir.node("Tanh", inner.outputs)
    last = ir.Node(dialect.DOMAIN, "Linear", [tanh.outputs[0], head])
    for value, width in ((look_up.outputs[0], WIDTH), (inner.outputs[0], WIDTH), (tanh.outputs[0], WIDTH),
                         (last.outputs[0], VOCABULARY)):  # fmt: skip
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["batch", "seq", width])
    last.outputs[0].name = "out"
    nodes = [look_up, inner, tanh, last]
    graph = ir.Graph([tokens], last.outputs, nodes=nodes, initializers=[table, square, head], opset_imports={"": 23})
    graph.name = "g"
    set_role(tokens, "tokens")
    set_role(last.outputs[0], role)
    made = Model.of(ir.Model(graph, ir_version=10))
    dialect.sync_functions(made)
    return made


def tokens(count: int, length: int = 12) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"tokens": rng.integers(0, VOCABULARY, (1, length))} for _ in range(count)]


def loss(of: Model, batch: dict[str, np.ndarray]) -> float:
    """The sum over positions of the negative log likelihood of the next token."""
    logits = Session(of).run(batch)["out"][0, :-1].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -float(logs[np.arange(len(logs)), batch["tokens"][0, 1:]].sum())


def test_it_is_the_mean_square_of_the_derivative_of_the_loss() -> None:
    network, batches, step = model(), tokens(2), 1e-2
    weights = [u.weight for u in weight_uses(network) if u.weight is not None]
    found = {w.name: fisher(network, [w], batches, 0, 1)[w.value].numpy() for w in weights}
    together = fisher(network, weights, batches, 0, 1)
    assert all(np.array_equal(together[w.value].numpy(), found[w.name]) for w in weights)
    for name, (row, column) in {
        "square": (3, 5),
        "head": (7, 11),
        "table": (int(batches[0]["tokens"][0, 2]), 9),
    }.items():
        expected = 0.0
        for batch in batches:
            sides = []
            for sign in (1, -1):
                moved = model()
                array = np.array(moved.graph.initializers[name].const_value.numpy())
                array[row, column] += sign * step
                moved.graph.initializers[name].const_value = ir.tensor(array, name=name)
                sides.append(loss(moved, batch))
            expected += ((sides[0] - sides[1]) / (2 * step)) ** 2
        assert found[name][row, column] == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_outputs_without_labels_count_by_their_derivatives() -> None:
    network, batches = model(role="other"), tokens(400, 2)
    head = next(u.weight for u in weight_uses(network) if u.weight is not None and u.weight.name == "head")
    found = fisher(network, [head], batches, 0, 1)[head.value].numpy() / len(batches)
    rows = [Session(part).run(batch)["tanh"] for part in [_with_hidden(network)] for batch in batches]
    expected = np.mean([np.square(r[0]).sum(axis=0) for r in rows], axis=0)  # of every output channel alike
    assert found.mean(axis=0) == pytest.approx(expected, rel=0.1)


def _with_hidden(network: Model) -> Model:
    copy = network.clone()
    tanh = next(n for n in copy.graph if n.op_type == "Tanh").outputs[0]
    tanh.name = "tanh"
    copy.graph.outputs.append(tanh)
    return copy


def test_large_networks_are_measured_a_group_of_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batches = model(), tokens(2)
    weights = [u.weight for u in weight_uses(network) if u.weight is not None]
    whole = fisher(network, weights, batches, 0, 1)
    monkeypatch.setattr(_fisher, "_MOST", 5000)
    parts = fisher(network, weights, batches, 0, 1)
    assert len(_fisher._groups(weights)) == 3
    assert all(np.allclose(parts[w.value].numpy(), whole[w.value].numpy(), rtol=1e-5) for w in weights)


def test_a_pass_with_this_metric_weighs_each_element() -> None:
    action = QuantizeWeights(format="lut2+sparse1", metric="fisher", embedding="float")
    batches = tokens(4)
    done, (report,) = PassManager([action], verify=False).run(model(), calibration=batches)
    assert report.modified
    network = model()
    weight = next(u.weight for u in weight_uses(network) if u.weight is not None and u.weight.name == "square")
    information = fisher(network, [weight], batches, 0, 1)[weight.value].numpy()
    expected = assign(weight.numpy(), Format.parse("lut2+sparse1"), information)
    node = next(n for n in done.graph if n.op_type == "Decode" and "square" in (n.inputs[0].name or ""))
    found = read_weight(node.outputs[0])
    assert found is not None
    assert np.array_equal(found.quantized().codes, expected.codes)
    assert np.array_equal(found.numpy(), expected.decode())


def test_it_works_on_made_up_inputs_and_beside_passes_that_go_part_by_part() -> None:
    steps = [QuantizeWeights(format="lut3", metric="fisher", exclude=("head",)), QuantizeWeights(assign="gptq")]
    _, reports = PassManager(steps, verify=False).run(model())
    assert [r.modified for r in reports] == [True, True]


def test_it_does_not_go_together_with_feedback() -> None:
    with pytest.raises(InputError, match="fisher"):
        QuantizeWeights(metric="fisher", assign="gptq")
