"""Computes several projections of one value as one product."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import QuantizedTensor, Weight, emit, read_weight
from qc.ir.store import Store
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name

__all__ = ["PackProjections"]

_MOST = 4
"""Query, key and value are three, gate and up two; more readers of one value are rather unrelated heads."""


@dataclasses.dataclass(frozen=True)
class PackProjections(Pass):
    """Replaces 2 to 4 linear layers that read the same value by one, followed by a Split.

    ``(x W1' + b1, x W2' + b2) = Split(x [W1; W2]' + [b1; b2], axis=-1)``. Exact up to the order of summation in the
    runtime's kernels: rows are concatenated, and no row of a product depends on another; quantized weights keep their
    codes, scales and zero points. Where some of the layers have a bias, the others get one of zeros.

    The layers must have weights stored alike, float of one type or quantized in one format, that nothing else reads
    (else they would be stored twice). One large product makes better use of a core than several small ones, and
    dynamically quantized activations are quantized once.
    """

    contract: ClassVar[Contract] = Exact()

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        store = (Context() if context is None else context).store
        sites = []
        for x, layers in _readers(model.graph):
            reason = _obstacle(layers)
            details = {"value": x.name, "layers": len(layers)}
            if not reason:
                _pack(model.graph, x, layers, store)
            outcome = Outcome.SKIPPED if reason else Outcome.CHANGED
            sites += [Site(site_name(layer), outcome, reason, details) for layer in layers]
        return Result.of(model, sites)


def _readers(graph: ir.Graph) -> list[tuple[ir.Value, list[ir.Node]]]:
    """Values that at least two linear layers of the graph read, with these layers in graph order."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if dialect.is_op(node, "Linear") and node.inputs[0] is not None:
            found.setdefault(node.inputs[0], []).append(node)
    return [(x, layers) for x, layers in found.items() if len(layers) > 1]


def _obstacle(layers: Sequence[ir.Node]) -> str:
    """Why layers that read one value cannot become one; empty if they can."""
    if len(layers) > _MOST:
        return f"{len(layers)} layers read this value, more than {_MOST}"
    weights = [read_weight(layer.inputs[1]) for layer in layers]
    if any(w is None for w in weights):
        return "a layer that reads this value has a computed weight"
    kinds = {str(w.format or w.dtype.name) for w in weights if w is not None}
    if len(kinds) > 1:
        return f"the layers that read this value have weights in {', '.join(sorted(kinds))}"
    if any(len(w.value.uses()) > 1 or len(w.data.uses()) > 1 for w in weights if w is not None):
        return "a weight of these layers is used elsewhere too, and would be stored twice"
    biases = [read_weight(layer.inputs[2]) for layer in layers if len(layer.inputs) > 2]
    if any(b is None for b in biases):
        return "a layer that reads this value has a computed bias"
    return ""


def _pack(graph: ir.Graph, x: ir.Value, layers: Sequence[ir.Node], store: Store) -> None:
    weights = [w for layer in layers if (w := read_weight(layer.inputs[1])) is not None]
    sizes = [w.shape[0] for w in weights]
    name = "+".join(w.name for w in weights)
    nodes: list[ir.Node] = []
    weight = _concatenated(weights, name, store, nodes)
    inputs = [weight, *_bias(layers, sizes, name, store)]
    linear = dialect.linear(x, *inputs, name="+".join(layer.name or "" for layer in layers))
    linear.outputs[0].name = f"{name}.packed"
    lengths = _constant(ir.tensor(np.array(sizes, np.int64), name=f"{name}.sizes"))
    split = ir.node("Split", [linear.outputs[0], lengths], {"axis": -1}, num_outputs=len(layers))
    nodes += [linear, split]
    scopes = [scope for layer in layers if (scope := layer.metadata_props.get("qc.scope"))]
    if scopes:
        for node in nodes:
            node.metadata_props["qc.scope"] = "+".join(scopes)
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.producer() is None:
                graph.register_initializer(value)
    graph.insert_before(layers[0], nodes)
    for layer, new in zip(layers, split.outputs, strict=True):
        _replace(graph, layer, new)


def _concatenated(weights: Sequence[Weight], name: str, store: Store, nodes: list[ir.Node]) -> ir.Value:
    """The rows of all weights as one; adds the node that decodes them, if any, to `nodes`."""
    first = weights[0]
    if first.format is not None:
        parts = [w.quantized() for w in weights]
        params = {k: np.concatenate([p.params[k] for p in parts]) for k in parts[0].params}
        tensor = QuantizedTensor(first.format, np.concatenate([p.codes for p in parts]), params)
        nodes.append(emit(tensor, ir.Value(name=name), store))
        return nodes[-1].outputs[0]
    value = _constant(store.stack(name, [w.tensor for w in weights]))
    if first.value is first.data:
        return value
    nodes.append(ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}))
    out = nodes[-1].outputs[0]
    out.name, out.dtype, out.shape = f"{name}.float", ir.DataType.FLOAT, value.shape
    return out


def _bias(layers: Sequence[ir.Node], sizes: Sequence[int], name: str, store: Store) -> list[ir.Value]:
    held = [read_weight(layer.inputs[2]) if len(layer.inputs) > 2 else None for layer in layers]
    if all(b is None for b in held):
        return []
    parts = [np.zeros(size, np.float32) if b is None else b.numpy() for b, size in zip(held, sizes, strict=True)]
    return [_constant(store.put(f"{name}.bias", np.concatenate(parts)))]


def _constant(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
    )


def _replace(graph: ir.Graph, layer: ir.Node, new: ir.Value) -> None:
    """Moves all readers of a layer to `new`, and removes the layer with what it alone read."""
    old = layer.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    operands = [v for v in layer.inputs[1:] if v is not None]
    graph.remove(layer, safe=True)
    while operands:
        value = operands.pop()
        node = value.producer()
        if value.uses() or value.is_graph_output():
            continue
        if node is not None:
            operands += [v for v in node.inputs if v is not None]
            graph.remove(node, safe=True)
        elif value.name is not None:
            graph.initializers.pop(value.name, None)
