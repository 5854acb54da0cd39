"""Running a piece of a graph on chosen inputs: how a recogniser learns what it computes, whatever its spelling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.passes.canonicalize._graph import Decline

__all__ = ["Piece"]

_LARGEST = 1 << 24  # elements; position and mask subgraphs hold tables at most, never a weight matrix


class Piece:
    """The part of a graph between `cut` (plus the graph inputs that it needs) and `outputs`, ready to run.

    Graph inputs of which only the shape matters are fed with zeros; the caller gives the sizes of their symbolic
    dimensions.

    Attributes:
        reads: The graph inputs whose *values* the outputs depend on.
        shapes: The graph inputs of which only the shape is used.
        graph_inputs: Both.
    """

    def __init__(self, graph: ir.Graph, outputs: Sequence[ir.Value], cut: Sequence[ir.Value] = ()) -> None:
        """Cuts the piece out; the graph is unchanged.

        Raises:
            Decline: If the piece holds a large weight or a subgraph.
        """
        self._outputs = list(outputs)
        self._cut = [v for v in cut if not v.is_graph_input()]
        nodes, sources = _closure(outputs, cut)
        for value in sources:
            if value.const_value is not None and value.const_value.size > _LARGEST:
                raise Decline(f"it depends on the large tensor {value.name}")
        held = {a.type for n in nodes for a in n.attributes.values()}
        if held & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            raise Decline("it is computed in a subgraph")
        inputs = [v for v in sources if v.is_graph_input()]
        inside = {id(n) for n in nodes}
        by_shape = [
            v for v in inputs if all(u.node.op_type in ("Shape", "Size") for u in v.uses() if id(u.node) in inside)
        ]
        ends = {id(v) for v in (*outputs, *cut)}
        self.shapes = [v for v in by_shape if id(v) not in ends]
        self.reads = [v for v in inputs if all(v is not s for s in self.shapes)]
        self.graph_inputs = inputs
        self._inputs = [*inputs, *self._cut]
        self._graph = graph
        self._session: Any = None

    def run(self, feeds: Mapping[ir.Value, np.ndarray], sizes: Mapping[str, int]) -> list[np.ndarray]:
        """Runs the piece.

        Args:
            feeds: Arrays by value: the cut, and graph inputs in `reads`.
            sizes: Sizes of the symbolic dimensions of inputs in `shapes`.

        Raises:
            Decline: If an input has neither an array nor known sizes, or the runtime cannot run the piece.
        """
        import onnxruntime as ort

        given = {v.name: feeds[v] if v in feeds else self._zeros(v, sizes) for v in self._inputs}
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            if self._session is None:
                self._session = ort.InferenceSession(self._serialize(), options, ["CPUExecutionProvider"])
            return self._session.run([v.name for v in self._outputs], given)
        except Exception as error:
            raise Decline(f"it could not be evaluated ({str(error).splitlines()[0][:120]})") from error

    def _zeros(self, value: ir.Value, sizes: Mapping[str, int]) -> np.ndarray:
        if not any(value is s for s in self.shapes):
            raise Decline(f"it depends on the values of {value.name}")
        dims = [d if isinstance(d, int) else sizes.get(str(d.value)) for d in value.shape or ()]
        known = [d for d in dims if d is not None]
        if value.shape is None or len(known) != len(dims):
            raise Decline(f"the shape of {value.name}, on which it depends, is unknown")
        return np.zeros(known, (value.dtype or ir.DataType.FLOAT).numpy())

    def _serialize(self) -> bytes:
        cut = ir.convenience.extract(self._graph, self._inputs, self._outputs)
        for value in (*cut.inputs, *cut.outputs, *(v for n in cut for v in n.outputs)):
            value.shape = None
        model = ir.Model(cut, ir_version=10)
        dialect.sync_functions(model)
        return ir.to_proto(model).SerializeToString()


def _closure(outputs: Sequence[ir.Value], cut: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes between `cut` and `outputs`, and the graph inputs and initializers that they read."""
    stop = {id(v) for v in cut}
    nodes: dict[int, ir.Node] = {}
    sources: dict[int, ir.Value] = {}
    pending = list(outputs)
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            sources[id(value)] = value
        elif id(value) not in stop and id(node) not in nodes:
            nodes[id(node)] = node
            pending.extend(v for v in node.inputs if v is not None)
    return list(nodes.values()), list(sources.values())
