"""The facts about a graph that the block finder needs, by position of the node in the graph."""

from __future__ import annotations

import math

import onnx_ir as ir

__all__ = ["MATRIX", "VECTOR", "GraphIndex", "captured"]

VECTOR, MATRIX = 1, 2
"""Rank class of the weight that a node consumes: one axis, or more."""

_INDEX_TYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING})
"""Constants of these types are shapes, axes, indices and masks. Codes of quantized weights are at most 16 bits wide."""

_SHAPE_OPS = frozenset({"Shape", "Size"})

_TRANSPARENT = frozenset({"Cast", "Identity", "QuantizeLinear", "DequantizeLinear"})


class GraphIndex:
    """Per-node facts, each a list in graph order; building it is linear in the graph and reads no large tensor.

    Attributes:
        nodes: The nodes of the main graph, in its (topological) order.
        inputs: Input values of each node, None where omitted, then the outer values that its subgraphs capture.
        preds: Positions of the nodes that produce those inputs.
        data_preds: The same without producers of constants, and none for a node that reads only a shape: a path along
            these edges carries activations.
        reads_shape: Whether the node reads only the shape of its input.
        const: Whether the node computes from initializers and constants alone: a decode node, a constant.
        anchor: 0, or `VECTOR` or `MATRIX` if the node is no constant and consumes a weight of that rank.
        transparent: Whether the node only changes how its first input is represented.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.inputs: list[list[ir.Value | None]] = []
        self.preds: list[list[int]] = []
        self.data_preds: list[list[int]] = []
        self.reads_shape: list[bool] = []
        self.const: list[bool] = []
        self.anchor: list[int] = []
        self.transparent: list[bool] = []
        self._initializers = set(graph.initializers.values())
        self._weights: dict[ir.Value, tuple[int, ...] | None] = {}
        self._terms: dict[object, int] = {}
        for node in self.nodes:
            self._add(node)

    def _add(self, node: ir.Node) -> None:
        inputs = [*node.inputs, *captured(node)]
        preds = [self.position[p] for v in inputs if v is not None and (p := v.producer()) in self.position]
        const = all(v is None or self.is_const(v) for v in inputs)
        ranks = [len(w) for v in inputs if v is not None and (w := self.weight(v)) is not None]
        default_domain = node.domain in ("", "ai.onnx")
        reads_shape = default_domain and node.op_type in _SHAPE_OPS
        self.inputs.append(inputs)
        self.preds.append(preds)
        self.reads_shape.append(reads_shape)
        self.data_preds.append([] if const or reads_shape else [p for p in preds if not self.const[p]])
        self.const.append(const)
        self.anchor.append(0 if const or not ranks else MATRIX if max(ranks) > 1 else VECTOR)
        self.transparent.append(default_domain and not const and node.op_type in _TRANSPARENT)

    def is_const(self, value: ir.Value) -> bool:
        """Whether the value is computed from initializers and constants alone."""
        producer = value.producer()
        return value in self._initializers or (producer in self.position and self.const[self.position[producer]])

    def weight(self, value: ir.Value) -> tuple[int, ...] | None:
        """Shape of the largest stored tensor behind a constant value, or None if there is none of a weight's kind.

        Decode nodes are looked through, so the answer is the same for a float weight and its quantized codes.
        """
        if value in self._weights:
            return self._weights[value]
        producer = value.producer()
        if value in self._initializers:
            shape = _weight_shape(value.const_value) if value.const_value is not None else _weight_shape(value)
        elif producer not in self.position or not self.is_const(value):
            shape = None
        elif producer.op_type == "Constant":
            shape = _weight_shape(ir.convenience.get_const_tensor(value))
        else:
            behind = [w for v in producer.inputs if v is not None and (w := self.weight(v)) is not None]
            shape = max(behind, key=math.prod, default=None)
        self._weights[value] = shape
        return shape

    def intern(self, key: object) -> int:
        """Returns the same number for equal keys: exact hash-consing of terms."""
        return self._terms.setdefault(key, len(self._terms))


def captured(node: ir.Node) -> list[ir.Value]:
    """Returns the values from outside that the subgraphs of `node` use, in order of first use."""
    graphs = [g for a in node.attributes.values() if not a.is_ref() for g in _subgraphs(a)]
    if not graphs:
        return []
    used: dict[ir.Value, None] = {}
    inside: set[ir.Value] = set()
    for graph in graphs:
        _walk(graph, used, inside)
    return [v for v in used if v not in inside]


def _walk(graph: ir.Graph, used: dict[ir.Value, None], inside: set[ir.Value]) -> None:
    inside.update(graph.inputs)
    inside.update(graph.initializers.values())
    for node in graph:
        used.update((v, None) for v in node.inputs if v is not None)
        inside.update(node.outputs)
        for attribute in node.attributes.values():
            if not attribute.is_ref():
                for inner in _subgraphs(attribute):
                    _walk(inner, used, inside)
    used.update((v, None) for v in graph.outputs)


def _subgraphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    if attribute.type == ir.AttributeType.GRAPHS:
        return tuple(attribute.as_graphs())
    return ()


def _weight_shape(tensor: ir.TensorProtocol | ir.Value | None) -> tuple[int, ...] | None:
    if tensor is None or tensor.shape is None or tensor.dtype in _INDEX_TYPES:
        return None
    dims = tuple(d for d in tensor.shape if isinstance(d, int))
    return dims if math.prod(dims) > 1 else None
