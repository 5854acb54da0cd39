"""Recurrent layers with every attribute against ONNX Runtime, on rows of any number and length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.backend import TvmCpu
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.recurrent import GATES
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.canonicalize.recurrent import RecogniseRecurrent
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

RNG = np.random.default_rng(0)
HIDDEN, INPUTS = 19, 7
BOTH = 'direction = "bidirectional", '


def values(*shape: int) -> np.ndarray:
    return (0.3 * RNG.standard_normal(shape)).astype(np.float32)


def layer(op: str, attributes: str, rest: str, outputs: str, number: int = 0) -> tuple[str, dict[str, np.ndarray]]:
    """A node, and its weights, whose names `rest` gives behind those of matrices."""
    count = 2 if "bidirectional" in attributes else 1
    gates = GATES[op] * HIDDEN
    shapes = {"W": (gates, INPUTS), "R": (gates, HIDDEN), "B": (2 * gates,), "P": (3 * HIDDEN,)}
    held = {f"{name}{number}": values(count, *shape) for name, shape in shapes.items() if name in f"WR{rest}"}
    rest = rest.replace("B", f"B{number}").replace("P", f"P{number}")
    return f"{outputs} = {op} <hidden_size = {HIDDEN}, {attributes}> (x, W{number}, R{number}, {rest})", held


def canonical(text: str, weights: dict[str, np.ndarray]) -> Model:
    model = parse(text, weights=weights)
    RecogniseRecurrent()(model)
    return Model.of(model)


LAYERS = [
    ("LSTM", BOTH, "B, n, h2, c2, P", "a0, a1, a2"),
    (
        "LSTM",
        """direction = "reverse", clip = 0.4, input_forget = 1, activations = ["HardSigmoid", "Softsign", "ScaledTanh"],
        activation_alpha = [0.3, 0.7], activation_beta = [0.4, 0.6]""",
        "B,, h1, c1, P",
        "unread, m1, m2",
    ),
    ("GRU", f"{BOTH} clip = 0.4", "B, n, h2", "d0, d1"),
    ("GRU", 'linear_before_reset = 1, activations = ["Sigmoid", "Elu"], activation_alpha = [0.3]', "B, n", "e0"),
    ("RNN", f'{BOTH} activations = ["Relu", "LeakyRelu"]', "B,, h2", "g0, g1"),
]


def test_layers_are_those_of_onnx_runtime(tmp_path: Path) -> None:
    lines, weights = [], {}
    for number, (op, attributes, rest, outputs) in enumerate(LAYERS):
        line, held = layer(op, attributes.rstrip(", "), rest, outputs, number)
        lines.append(line)
        weights |= held
    names = [name for *_, outputs in LAYERS for name in outputs.replace(" ", "").split(",") if name[-1:].isdigit()]
    ranks = {name: "t,d,b,k" if name.endswith("0") else "d,b,k" for name in names}
    outputs = ", ".join(f"float[{r.replace('d', f'd{n}')}] {n}" for n, r in ranks.items())
    states = ", ".join(f"float[{d},b,{HIDDEN}] {n}{d}" for d in (1, 2) for n in "hc")
    text = f"f (float[t,b,{INPUTS}] x, int32[b] n, {states}) => ({outputs}) {{ {'  '.join(lines)} }}"
    session, model = Session(parse(text, weights=weights)), canonical(text, weights)
    backend = TvmCpu()
    backend.emit(model, tmp_path)
    runner = backend.open(tmp_path, threads=1)
    for time, batch in ((1, 1), (5, 3)):
        feed = {"x": values(time, batch, INPUTS), "n": np.arange(batch, dtype=np.int32) * 2 + 1}
        feed |= {f"{n}{d}": values(d, batch, HIDDEN) for d in (1, 2) for n in "hc"}
        found = runner.run(feed)
        for name, expected in session.run(feed).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_lengths_of_another_batch_are_refused_in_a_run(tmp_path: Path) -> None:
    line, weights = layer("RNN", 'direction = "reverse"', ", n", "y, last")
    text = f"f (float[t,b,{INPUTS}] x, int32[rows] n) => (float[t,1,b,k] y, float[1,b,k] last) {{ {line} }}"
    backend, session = TvmCpu(), Session(parse(text, weights=weights))
    backend.emit(canonical(text, weights), tmp_path)
    runner, feed = backend.open(tmp_path, threads=2), {"x": values(5, 3, INPUTS), "n": np.array([5, 1, 4], np.int32)}
    found = runner.run(feed)
    for name, expected in session.run(feed).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="do not fit together"):
        runner.run(feed | {"n": feed["n"][:2]})


def test_quantized_weights_are_multiplied_as_they_are_stored(tmp_path: Path) -> None:
    weights = {n: values(2, *shape) for n, shape in {"w": (96, 48), "r": (96, 32), "b": (192,)}.items()}
    line = f"y = GRU <hidden_size = 32, {BOTH} linear_before_reset = 1> (x, w, r, b)"
    model = canonical(f"f (float[t,b,48] x) => (float[t,2,b,32] y) {{ {line} }}", weights)
    quantized, _ = PassManager(parse_pipeline("quantize-weights{format=uint4,group=16}")).run(model)
    backend = TvmCpu(exact=True)
    backend.emit(Model.of(quantized), tmp_path)
    feed = {"x": values(5, 2, 48)}
    found, expected = backend.open(tmp_path, threads=1).run(feed)["y"], Session(quantized).run(feed)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert all(node["on_target"] for node in backend.coverage(quantized).nodes)
    assert (tmp_path / "model.weights").stat().st_size < sum(w.nbytes for w in weights.values()) / 2


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ('activations = ["Softplus"]', "its activation is Softplus"),
        ('activations = ["Affine"]', "its activation Affine has no parameters"),
        ('activations = ["Relu", "Relu"]', "it has 2 activations"),
    ],
)
def test_an_activation_without_a_kernel_is_refused(attributes: str, reason: str, tmp_path: Path) -> None:
    line, weights = layer("RNN", attributes, "", "y")
    with pytest.raises(UnsupportedError, match=f"no kernel for RNN at .*: {reason}"):
        TvmCpu().emit(canonical(f"f (float[t,b,{INPUTS}] x) => (float[t,1,b,k] y) {{ {line} }}", weights), tmp_path)
