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

_TOWARDS_ATTENTION = ("Reshape", "Transpose", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Concat")


@dataclasses.dataclass(frozen=True)
class PackProjections(Pass):
    """Replaces 2 to 4 linear layers that read the same value by one, followed by a Split.

    ``(x W1' + b1, x W2' + b2) = Split(x [W1; W2]' + [b1; b2], axis=-1)``. Exact up to the order of summation in the
    runtime's kernels: rows are concatenated, and no row of a product depends on another; quantized weights keep their
    codes, scales and zero points. Where some of the layers have a bias, the others get one of zeros.

    Only layers whose weights are stored alike go together, float of one type or quantized in one format, and none whose
    weight something else reads: it would be stored twice. One large product makes better use of a core than several
    small ones, and dynamically quantized activations are quantized once.

    Attributes:
        everywhere: Whether layers with quantized weights on float activations are packed also where no attention reads
            the parts. Kernels that decode weights as they go gain nothing from it, and pay for the Split.
    """

    contract: ClassVar[Contract] = Exact()

    everywhere: bool = True

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        store = (Context() if context is None else context).store
        sites = []
        for x, layers in _readers(model.graph):
            groups: dict[str, list[ir.Node]] = {}
            for layer in layers:
                reason = _obstacle(layer)
                if not reason and not self.everywhere and _decodes(layer) and not _feeds_attention(layer):
                    reason = "its kernel decodes weights, and no attention reads the product packed"
                if reason:
                    sites.append(Site(site_name(layer), Outcome.SKIPPED, reason, {"value": x.name}))
                else:
                    groups.setdefault(_storage(layer), []).append(layer)
            for storage, group in groups.items():
                sites += _pack_group(model.graph, x, group, storage, store)
        return Result.of(model, sites)


def _readers(graph: ir.Graph) -> list[tuple[ir.Value, list[ir.Node]]]:
    """Values that at least two linear layers of the graph read, with these layers in graph order."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if dialect.is_op(node, "Linear") and node.inputs[0] is not None:
            found.setdefault(node.inputs[0], []).append(node)
    return [(x, layers) for x, layers in found.items() if len(layers) > 1]


def _obstacle(layer: ir.Node) -> str:
    """Why a layer cannot be part of a larger one; empty if it can."""
    weight = read_weight(layer.inputs[1])
    if weight is None:
        return "its weight is computed"
    if weight.format is not None and not all(s.by_row for s in weight.format.streams(weight.shape)):
        return f"its rows are not stored on their own in {weight.format}"
    if len(weight.value.uses()) > 1 or len(weight.data.uses()) > 1:
        return "its weight is used elsewhere too, and would be stored twice"
    if len(layer.inputs) > 2 and read_weight(layer.inputs[2]) is None:
        return "its bias is computed"
    return ""


def _decodes(layer: ir.Node) -> bool:
    """Whether the weights are quantized and the activations are not."""
    weight, maker = read_weight(layer.inputs[1]), layer.inputs[0].producer()
    quantized = maker is not None and (maker.op_type == "DequantizeLinear" or dialect.is_op(maker, "DynamicQuantize"))
    return weight is not None and weight.format is not None and not quantized


def _feeds_attention(layer: ir.Node) -> bool:
    """Whether an attention reads the product, perhaps turned, normalized and rotated."""
    readers = [use.node for use in layer.outputs[0].uses()]
    while readers:
        node = readers.pop()
        if node.op_type == "Attention":
            return True
        if node.op_type in _TOWARDS_ATTENTION:
            readers += [use.node for use in node.outputs[0].uses()]
    return False


def _storage(layer: ir.Node) -> str:
    weight = read_weight(layer.inputs[1])
    assert weight is not None
    return str(weight.format or weight.dtype.name)


def _pack_group(graph: ir.Graph, x: ir.Value, layers: Sequence[ir.Node], storage: str, store: Store) -> list[Site]:
    reason = ""
    if len(layers) == 1:
        reason = f"no other layer that reads this value has a weight in {storage}"
    elif len(layers) > _MOST:
        reason = f"{len(layers)} layers with weights in {storage} read this value, more than {_MOST}"
    details = {"value": x.name, "layers": len(layers), "weights": storage}
    names = [site_name(layer) for layer in layers]
    if not reason:
        _pack(graph, x, layers, store)
    return [Site(name, Outcome.SKIPPED if reason else Outcome.CHANGED, reason, details) for name in names]


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
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
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
