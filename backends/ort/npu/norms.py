"""Normalizations in terms of operators that accelerators of phones have."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer, finished
from qc.passes.base import Contract, Exact, Pass, Result
from qc.passes.canonicalize._graph import Decline, attribute, main_nodes, replace, rewritten

__all__ = ["CenterByHalves", "WriteOutNormalizations"]


@dataclasses.dataclass(frozen=True)
class CenterByHalves(Pass):
    """Replaces ``RMSNormalization(x, g)`` by the first half of ``LayerNormalization([x, -x], 1)``, times ``g``.

    ``[x, -x]`` has mean 0 and the mean square of x. Exact; squares stay inside of the operator, so that half precision
    does not overflow. Left alone: axes before the last, channels whose number is not known.
    """

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        nodes = main_nodes(model, "RMSNormalization")
        return finished(model, rewritten(nodes, lambda node: _by_halves(model.graph, node)))


@dataclasses.dataclass(frozen=True)
class WriteOutNormalizations(Pass):
    """Writes out normalizations over the last axis.

    * ``LayerNormalization(x, g, b)``: ``d = x - mean(x)``, ``d / sqrt(mean(d * d) + epsilon) * g + b``;
    * ``RMSNormalization(x, g)``: the same with ``d = x``.

    Exact. Left alone: axes before the last, means and deviations that are read.
    """

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        nodes = main_nodes(model, "LayerNormalization", "RMSNormalization")
        return finished(model, rewritten(nodes, lambda node: _written_out(model.graph, node)))


def _width(node: ir.Node) -> int:
    """The number of channels that are normalized together."""
    x = node.inputs[0]
    last = x.shape[-1] if x.shape is not None and x.shape.rank() else None
    if attribute(node, "axis", -1) not in (-1, x.shape.rank() - 1 if x.shape is not None else -1):
        raise Decline("it normalizes more than the last axis")
    if not isinstance(last, int):
        raise Decline("the number of its channels is not known")
    return last


def _by_halves(graph: ir.Graph, node: ir.Node) -> None:
    (x, gain), width = node.inputs, _width(node)
    write = Writer(graph, node)
    both = write.add("Concat", x, write.add("Mul", x, write.constant("minus", np.array(-1, np.float32))), axis=-1)
    ones = write.constant("ones", np.ones(2 * width, np.float32))
    normal = write.add("LayerNormalization", both, ones, axis=-1, epsilon=attribute(node, "epsilon", 1e-5))
    ends = (write.integers(name, number) for name, number in (("from", 0), ("to", width), ("axes", -1)))
    write.add("Mul", write.add("Slice", normal, *ends), gain)
    replace(node.outputs[0], write.nodes, like=node)


def _written_out(graph: ir.Graph, node: ir.Node) -> None:
    x, gain, bias = (*node.inputs, None)[:3]
    _width(node)
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise Decline("its mean or deviation is read")
    write = Writer(graph, node)
    last = write.integers("axes", -1)
    if node.op_type == "LayerNormalization":
        x = write.add("Sub", x, write.add("ReduceMean", x, last))
    square = write.add("ReduceMean", write.add("Mul", x, x), last)
    epsilon = write.constant("epsilon", np.array(attribute(node, "epsilon", 1e-5), np.float32))
    out = write.add("Mul", write.add("Div", x, write.add("Sqrt", write.add("Add", square, epsilon))), gain)
    if bias is not None:
        write.add("Add", out, bias)
    replace(node.outputs[0], write.nodes, like=node)
