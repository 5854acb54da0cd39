"""The order of a graph, where the memory of running it depends on that."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["constants_first"]

_WITH_SUBGRAPHS = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def constants_first(graph: ir.Graph) -> None:
    """Moves the nodes that compute constants, such as decoded weights, to the front; the others keep their order.

    ONNX Runtime runs a graph in the postorder of a depth-first search from its outputs, which enters the inputs of a
    node from the last in the file to the first (``Graph::ReverseDFSFrom`` with ``NodeCompare``). So what stands in
    front is computed right before it is needed, and one decoded weight is alive at a time. If decode nodes stood right
    before their consumers, all of them would run before the first activation.
    """
    constant: set[ir.Value] = set()
    first, rest = [], []
    for node in graph:
        if _is_decode(node, constant):
            constant.update(node.outputs)
            first.append(node)
        else:
            rest.append(node)
    graph.remove(first + rest)
    graph.extend(first + rest)


def _is_decode(node: ir.Node, constant: set[ir.Value]) -> bool:
    if any(attribute.type in _WITH_SUBGRAPHS for attribute in node.attributes.values()):
        return False  # they read values that are not inputs of the node
    return all(v is None or v in constant or (v.is_initializer() and not v.is_graph_input()) for v in node.inputs)
