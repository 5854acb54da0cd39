"""A batch normalization behind a convolution becomes part of its weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.store import Store
from qc.passes.base import Context, Contract, Exact, Pass, Result
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    attribute,
    drop_unused,
    made_by,
    main_nodes,
    rewritten,
    sole_consumer,
    stored,
)

__all__ = ["FoldBatchNormalization"]


@dataclasses.dataclass(frozen=True)
class FoldBatchNormalization(Pass):
    """Rewrites ``BatchNormalization(Conv(x, W, c), gain, bias, mean, variance)`` to ``Conv(x, W', c')``.

    With ``f = gain / sqrt(variance + epsilon)``, one number for each output channel,

        ``W' = f W`` and ``c' = f (c - mean) + bias``

    in float64, rounded once. Left alone: one whose statistics are computed or that trains, one that reads anything but
    a convolution that nothing else reads, and convolutions in other types than FLOAT.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        nodes = main_nodes(model, "BatchNormalization")
        result = Result.of(model, rewritten(nodes, lambda node: _fold(node, context.store)))
        if result.modified:
            drop_unused(model)
        return result


def _fold(node: ir.Node, store: Store) -> None:
    conv = made_by(node.inputs[0], "Conv")
    if conv is None or sole_consumer(conv.outputs[0]) is not node:
        raise Decline("it does not read a convolution that nothing else reads")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]) or attribute(node, "training_mode", 0):
        raise Decline("it trains")
    held = [stored(v) for v in (conv.inputs[1], *node.inputs[1:], *conv.inputs[2:])]
    if any(t is None or t.dtype != ir.DataType.FLOAT for t in held):
        raise Decline("its weights are not all stored as FLOAT")
    weight, gain, bias, mean, variance, *own = (t.numpy().astype(np.float64) for t in held if t is not None)
    factor = gain / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    shifted = factor * ((own[0] if own else 0.0) - mean) + bias
    scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    name = conv.inputs[1].name
    conv.resize_inputs(3)
    _read_instead(conv, 1, str(name), scaled, store)
    _read_instead(conv, 2, f"{str(name).removesuffix('.weight')}.bias", shifted, store)
    out, new = node.outputs[0], conv.outputs[0]
    new.type, new.shape, name = out.type, out.shape, out.name
    new.metadata_props.update(out.metadata_props)
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    new.name = name


def _read_instead(node: ir.Node, slot: int, name: str, array: np.ndarray, store: Store) -> None:
    """In place of the weight if nothing else reads it, so that it keeps its name."""
    held = node.inputs[slot]
    tensor = store.put(name, array.astype(np.float32))
    if held is not None and held.is_initializer() and len(held.uses()) == 1 and not held.is_graph_output():
        held.const_value = tensor
    else:
        node.replace_input_with(slot, add_constant(node.graph, name, tensor))
