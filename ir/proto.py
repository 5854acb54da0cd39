"""A model as a protobuf message that holds none of its large weights: all that ONNX's own checks need."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from qc.ir.store import SMALL

__all__ = ["without_weights"]


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """Returns the model as a message in which large weights are inputs; none of their bytes is read.

    Weights of subgraphs become inputs of the main graph too, which subgraphs may read.
    """
    held = {value: value.const_value for graph in model.graphs() for value in graph.initializers.values()}
    try:
        for value, tensor in held.items():
            if tensor is not None and (tensor.nbytes > SMALL or isinstance(tensor, ir.ExternalTensor)):
                value.const_value = ir.ExternalTensor(
                    "weights", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name or ""
                )
        proto = ir.to_proto(model)
    finally:
        for value, tensor in held.items():
            value.const_value = tensor
    inputs = {i.name for i in proto.graph.input}
    for graph in _graphs(proto.graph):
        kept = [t for t in graph.initializer if t.data_location != t.EXTERNAL]
        for tensor in graph.initializer:
            if tensor.data_location != tensor.EXTERNAL or tensor.name in inputs:
                continue
            inputs.add(tensor.name)
            info = proto.graph.input.add(name=tensor.name)
            info.type.tensor_type.elem_type = tensor.data_type
            info.type.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=d) for d in tensor.dims)
        del graph.initializer[:]
        graph.initializer.extend(kept)
    return proto


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)
