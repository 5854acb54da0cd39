"""PyTorch modules and exported programs."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qc.frontend import from_exported_program, from_module, load
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.runtime import Session

torch = pytest.importorskip("torch", reason="these models are torch modules")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours


def network() -> Any:
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4)
    return torch.nn.Sequential(*layers)


X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)


class Layers(torch.nn.Module):
    """Recurrent layers of each kind, in both layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(8, 6, bidirectional=True, batch_first=True)
        self.lstm = torch.nn.LSTM(12, 5, num_layers=2)
        self.rnn = torch.nn.RNN(5, 4, nonlinearity="relu", bias=False)

    def forward(self, x: Any) -> tuple[Any, ...]:
        y, (h, c) = self.lstm(self.gru(x)[0].transpose(0, 1))
        return self.rnn(y)[0], h, c


def test_recurrent_layers_stay_operators_on_sequences_of_any_length() -> None:
    torch.manual_seed(0)
    net, x = Layers(), torch.randn(2, 9, 8)
    model = from_module(net, (torch.ones(3, 7, 8),), dynamic_shapes=({0: "batch", 1: "time"},))
    counts = collections.Counter(node.op_type for node in model.graph)
    assert (counts["GRU"], counts["LSTM"], counts["RNN"]) == (1, 2, 1)
    with torch.no_grad():
        wanted = [value.numpy() for value in net.eval()(x)]
    for found, value in zip(Session(model).run({"x": x.numpy()}).values(), wanted, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)


def test_projected_states_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="proj_size"):
        from_module(torch.nn.LSTM(8, 6, proj_size=3), (torch.ones(3, 7, 8),))


def expected(net: Any) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(torch.from_numpy(X)).numpy()


def test_a_module_is_imported_with_names_scopes_and_a_dynamic_batch() -> None:
    net = network().train()
    model = from_module(
        net, (torch.ones(3, 8),), dynamic_shapes=({0: "batch"},), input_names=["x"], output_names=["logits"],
        roles={"x": "hidden"},
    )  # fmt: skip
    assert net.training
    assert [(p.name, p.role) for p in model.signature.inputs] == [("x", "hidden")]
    assert [(p.name, p.role, p.shape) for p in model.signature.outputs] == [("logits", "logits", ("batch", 4))]
    assert {"0.weight", "3.bias"} <= set(model.graph.initializers)
    assert {"0", "3"} <= {n.metadata_props.get("qc.scope") for n in model.graph}
    np.testing.assert_allclose(Session(model).run({"x": X})["logits"], expected(net), atol=1e-5)


def test_an_exported_program_is_read_from_memory_and_from_a_file(tmp_path: Path) -> None:
    net = network().eval()
    program = torch.export.export(net, (torch.from_numpy(X),))
    torch.export.save(program, tmp_path / "net.pt2")
    for model in (from_exported_program(program), load(tmp_path / "net.pt2")):
        (given,) = model.signature.inputs
        (result,) = Session(model).run({given.name: X}).values()
        np.testing.assert_allclose(result, expected(net), atol=1e-5)


def test_a_file_that_is_no_program_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"not a zip archive")
    with pytest.raises(InputError, match=r"net\.pt2"):
        load(tmp_path / "net.pt2")


def test_what_cannot_be_exported_is_unsupported() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(UnsupportedError, match="cannot be exported"):
        from_module(Branching(), (torch.ones(3, 8),))
