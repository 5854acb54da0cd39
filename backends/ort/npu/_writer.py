"""What the passes that write operators out share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.simplify import infer_shapes
from qc.passes.base import Result, Site
from qc.passes.canonicalize._graph import add_constant, drop_unused

__all__ = ["Writer", "finished"]


class Writer:
    """Nodes that replace one node, in order."""

    def __init__(self, graph: ir.Graph, like: ir.Node) -> None:
        self.graph, self.like = graph, like
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: object) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)  # type: ignore[arg-type]
        self.nodes.append(node)
        out = node.outputs[0]
        out.name = f"{self.like.outputs[0].name}.{op_type.lower()}_{len(self.nodes)}"
        out.dtype = dtype or inputs[0].dtype
        return out

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_constant(self.graph, f"{self.like.outputs[0].name}.{name}", ir.tensor(array))

    def integers(self, name: str, *numbers: int) -> ir.Value:
        return self.constant(name, np.array(numbers, np.int64))

    def before(self, node: ir.Node) -> None:
        """Puts what was written so far in front of `node`, not in place of it."""
        for new in self.nodes:
            new.metadata_props.update(self.like.metadata_props)
        self.graph.insert_before(node, self.nodes)
        self.nodes = []


def finished(model: ir.Model, sites: list[Site]) -> Result:
    """The result of a pass that wrote nodes: with what is unused gone, and the shapes of what is new."""
    result = Result.of(model, sites)
    if result.modified:
        drop_unused(model)
        dialect.sync_functions(model)
        infer_shapes(model)
    return result
