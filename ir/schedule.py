"""The order of a graph, where the memory of running it depends on that."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["order_for_memory"]

_WITH_SUBGRAPHS = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def order_for_memory(graph: ir.Graph) -> None:
    """Orders the nodes such that ONNX Runtime computes each value right before it is needed.

    The runtime runs a graph in the postorder of a depth-first search from the nodes that nothing reads, which enters
    these, and the inputs of each node, from the last in the file to the first (``Graph::ReverseDFSFrom`` with
    ``NodeCompare``). So:

    * nodes that compute constants, such as decoded weights, stand first. One decoded weight is then alive at a time; if
      each stood right before its consumer, all would be decoded before the first activation;
    * nodes that nothing reads stand last, from the deepest to the shallowest. What observes an inner value then runs
      as soon as there is one, and no inner value waits until the model has run.

    The runtime was seen to decode the largest weight early now and then, on equal graphs: who plans memory counts it
    twice.
    """
    constant: set[ir.Value] = set()
    position: dict[ir.Value, int] = {}
    first, inner, last = [], [], []
    for place, node in enumerate(graph):
        position |= dict.fromkeys(node.outputs, place)
        if _is_decode(node, constant):
            constant.update(node.outputs)
            first.append(node)
        elif any(v.uses() for v in node.outputs):
            inner.append(node)
        else:
            last.append(node)
    last.sort(key=lambda n: max((position.get(v, -1) for v in n.inputs if v is not None), default=-1), reverse=True)
    graph.remove(first + inner + last)
    graph.extend(first + inner + last)


def _is_decode(node: ir.Node, constant: set[ir.Value]) -> bool:
    if any(attribute.type in _WITH_SUBGRAPHS for attribute in node.attributes.values()):
        return False  # they read values that are not inputs of the node
    return all(v is None or v in constant or (v.is_initializer() and not v.is_graph_input()) for v in node.inputs)
