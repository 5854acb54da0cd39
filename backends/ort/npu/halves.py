"""Half precision, in which the accelerators of Apple's phones compute."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.backends.ort.npu.outside import outside_nodes
from qc.passes.base import Context, Contract, Lossy, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import stored

__all__ = ["ComputeInHalf"]

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

_AS_THEY_ARE = {"Resize": 1, "LayerNormalization": 3}
"""Operators of which inputs from that on are of float, whatever the first one is; one past the last if none is."""

_FIRST_ONLY = frozenset({"LayerNormalization"})
"""Operators whose further results are of float, whatever the first one is."""


@dataclasses.dataclass(frozen=True)
class ComputeInHalf(Pass):
    """Computes activations in float16: ``Cast`` where floats come in, and where they go out.

    Weights are converted behind their decoding, by a ``Cast`` that a runtime folds when it loads the model; so are
    rows that are looked up, and what is computed beside the graph. Each result is rounded to 11 bits of mantissa;
    larger numbers than 65504 overflow. Left alone: integers, and everything that depends on constants alone.
    """

    contract: ClassVar[Contract] = Lossy()

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        halves = _Halves(model.graph)
        sites = [Site(site_name(n), Outcome.CHANGED) for n in tuple(model.graph) if halves.convert(n)]
        halves.widen_outputs()
        return Result.of(model, sites)


class _Halves:
    """Converts nodes in graph order."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._beside = outside_nodes(graph)
        self._live = {
            v for v in graph.inputs if v.dtype == _FLOAT
        }  # floats, or halves by now, that differ between runs
        self._cast: dict[ir.Value, ir.Value] = {}

    def convert(self, node: ir.Node) -> bool:
        """Converts a node whose operands are activations; notes what another one makes of integers or rows."""
        if node in self._beside:
            self._live.update(v for v in node.outputs if v.dtype == _FLOAT)
            return False
        if not any(v in self._live for v in node.inputs):
            if any(v is not None and stored(v) is None and not _constant(v) for v in node.inputs):
                self._live.update(v for v in node.outputs if v.dtype == _FLOAT)
            return False
        for slot, value in enumerate(node.inputs[: _AS_THEY_ARE.get(node.op_type)]):
            if value is not None and value.dtype == _FLOAT:
                node.replace_input_with(slot, self._half(value))
        for out in node.outputs[: 1 if node.op_type in _FIRST_ONLY else None]:
            if out.dtype == _FLOAT:
                out.type = ir.TensorType(_HALF)
                self._live.add(out)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
        return True

    def _half(self, value: ir.Value) -> ir.Value:
        if value not in self._cast:
            node = ir.node("Cast", [value], {"to": int(_HALF)})
            out = node.outputs[0]
            out.name, out.type, out.shape = f"{value.name}.half", ir.TensorType(_HALF), value.shape
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._cast[value] = out
        return self._cast[value]

    def widen_outputs(self) -> None:
        """Gives the outputs of the graph their type back."""
        outputs = self._graph.outputs
        for place, value in enumerate(list(outputs)):
            producer = value.producer()
            if value.dtype != _HALF or producer is None:
                continue
            node = ir.node("Cast", [value], {"to": int(_FLOAT)})
            out = node.outputs[0]
            out.type, out.shape = ir.TensorType(_FLOAT), value.shape
            out.name, value.name = value.name, f"{value.name}.half"
            out.metadata_props.update(value.metadata_props)
            value.metadata_props.clear()
            self._graph.append(node)
            outputs[place] = out


def _constant(value: ir.Value) -> bool:
    """Whether nodes make a value of constants alone."""
    node = value.producer()
    return node is not None and all(v is None or stored(v) is not None or _constant(v) for v in node.inputs)
