"""Recurrent layers of PyTorch in exported graphs: an ``LSTM``, ``GRU`` or ``RNN`` each, on sequences of any length.

Left to itself, `torch.export` runs the loop of a layer as often as its example has steps: ``nn.RNN`` becomes as many
products, and no axis of time stays dynamic. So, while a module is traced, its layers call operators of ours that
nothing looks into, which are then written as ONNX defines them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qc.ir.errors import UnsupportedError

__all__ = ["kept_layers", "translations"]

_LAYERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}
"""Functions of PyTorch: the operator, which gate of theirs is each of ONNX's, and attributes."""

_BIASED, _PLAIN = 4, 2
"""Parameters of a direction: weights of inputs and states, and perhaps a bias of each."""


@contextlib.contextmanager
def kept_layers() -> Iterator[None]:
    """Lets recurrent layers call our operators while a module is traced; but not those on packed sequences.

    Raises:
        UnsupportedError: While it is traced, if a layer projects its states: no operator of ONNX does.
    """
    import torch

    own = _operators()
    functions: Any = torch._VF  # where `torch.nn` looks them up

    def chosen(name: str, theirs: Callable[..., Any], *arguments: Any) -> Any:
        states, packed = arguments[1], not isinstance(arguments[3], bool)
        if packed:
            return theirs(*arguments)
        if name == "lstm" and states[0].shape[2] != states[1].shape[2]:
            raise UnsupportedError("LSTM with projected states (proj_size), which ONNX does not have.")
        return own[name](*arguments)

    for name in _LAYERS:
        setattr(functions, name, functools.partial(chosen, name, getattr(functions, name)))
    try:
        yield
    finally:
        for name in _LAYERS:
            delattr(functions, name)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What writes each of our operators in ONNX, as the exporter of PyTorch takes it."""
    return {op.default: _writer(name) for name, op in _operators().items()}


def _operators() -> dict[str, Any]:
    """Our operators by the name of PyTorch's function."""
    import torch

    _library()
    return {name: getattr(torch.ops.qc_layers, name) for name in _LAYERS}


@functools.cache
def _library() -> Any:
    """Defines them: PyTorch's functions compute them. They last as long as this object."""
    import torch

    held = torch.library.Library("qc_layers", "DEF")
    for name in _LAYERS:
        states, results = ("Tensor[]", 3) if name == "lstm" else ("Tensor", 2)
        held.define(
            f"{name}(Tensor input, {states} hx, Tensor[] params, bool has_biases, int num_layers, float dropout, "
            f"bool train, bool bidirectional, bool batch_first) -> ({', '.join(['Tensor'] * results)})"
        )
        held.impl(name, getattr(torch._C._VariableFunctions, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"qc_layers::{name}", _shapes, lib=held)
    return held


def _shapes(input: Any, hx: Any, *arguments: Any) -> tuple[Any, ...]:  # noqa: A002 - as PyTorch calls it
    """Results without numbers: all states of the last layer, and the last state of each layer."""
    import torch

    states = [hx] if isinstance(hx, torch.Tensor) else hx
    directions = 1 + arguments[-2]
    every = input.new_empty((*input.shape[:2], states[0].shape[2] * directions))
    return every, *(torch.empty_like(s) for s in states)


def _writer(name: str) -> Callable[..., Any]:
    """A function that writes the layers of a call, one behind the other."""
    from onnxscript import opset18 as op

    kind, order, attributes = _LAYERS[name]

    def stack(parts: Sequence[Any]) -> Any:
        """A parameter of each direction, gates in ONNX's order."""
        size = parts[0].shape[0] // len(order)
        turned = [[op.Slice(p, [gate * size], [(gate + 1) * size], [0]) for gate in order] for p in parts]
        return join([op.Unsqueeze(join(gates), [0]) for gates in turned])

    def join(parts: Sequence[Any], axis: int = 0) -> Any:
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)

    def write(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # noqa: A002
        count, each = 1 + bidirectional, _BIASED if has_biases else _PLAIN
        states = list(hx) if kind == "LSTM" else [hx]
        fixed = {"direction": "bidirectional" if bidirectional else "forward", "hidden_size": params[1].shape[1]}
        fixed |= {n: value * count if isinstance(value, list) else value for n, value in attributes.items()}
        x, ends = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input, []
        for layer in range(num_layers):
            first = layer * count
            w, r, *biases = (
                stack([params[(first + direction) * each + i] for direction in range(count)]) for i in range(each)
            )
            begins = [op.Slice(s, [first], [first + count], [0]) for s in states]
            y, *last = getattr(op, kind)(x, w, r, join(biases, 1) if biases else None, None, *begins, **fixed)
            x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
            ends.append(last)
        x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        return x, *(join(each_layer) for each_layer in zip(*ends, strict=True))

    return write
