"""Weights that the runtime decodes once, when it loads the model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import DECODES, Weight, read_weight
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import add_constant, drop_unused, made_by

__all__ = ["DecodeWhenLoaded", "decoded"]


@dataclasses.dataclass(frozen=True)
class DecodeWhenLoaded(Pass):
    """Rewrites the ``DequantizeLinear`` of a Linear's weight to operators that the runtime folds at load.

    ``(Cast(codes) - Cast(zero_point)) * scale``, in groups where the scales are. The runtime computes this once, and
    leaves a ``DequantizeLinear`` to each call. WebAssembly then multiplies one token with a 4-bit weight 9 times
    faster than ``MatMulNBits`` does. The file stays small, memory holds floats. A look-up in the same table reads the
    floats too. Exact.

    Weights whose last group is cut short are left alone.
    """

    contract: ClassVar[Contract] = Exact(0.0)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in [n for n in model.graph if dialect.is_op(n, "Linear")]:
            weight = read_weight(node.inputs[1])
            if weight is None or weight.format is None or made_by(weight.value, "DequantizeLinear") is None:
                continue
            if weight.value.dtype not in (None, ir.DataType.FLOAT):
                sites.append(Site(site_name(node), Outcome.SKIPPED, "it is decoded to half precision"))
                continue
            if _pieces(weight) is None:
                sites.append(Site(site_name(node), Outcome.SKIPPED, "its last group is cut short"))
                continue
            weight.value.replace_all_uses_with(decoded(weight))
            sites.append(Site(site_name(node), Outcome.CHANGED, details={"format": str(weight.format)}))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def decoded(weight: Weight) -> ir.Value:
    """The numbers of a weight behind ``DequantizeLinear``, by nodes in front of it that the runtime folds."""
    decode, pieces = weight.value.producer(), _pieces(weight)
    assert decode is not None
    assert decode.graph is not None
    assert pieces is not None
    build = _Builder(decode.graph, weight)
    codes = build.node("Cast", [weight.data], weight.shape, to=int(ir.DataType.FLOAT))
    if pieces != weight.shape:
        codes = build.reshaped(codes, pieces)
    for operator, name in (("Sub", "zero_point"), ("Mul", "scale")):
        if name in weight.params:
            codes = build.node(operator, [codes, build.parameter(weight.params[name], pieces)], pieces)
    if pieces != weight.shape:
        codes = build.reshaped(codes, weight.shape)
    decode.graph.insert_before(decode, build.nodes)
    return codes


def _pieces(weight: Weight) -> tuple[int, ...] | None:
    """The shape of the weight with its groups on an axis of their own; None if they do not divide it."""
    format = weight.format
    if format is None or format.group is None:
        return weight.shape
    axis = 0 if format.axis == "out" else 1
    length = weight.shape[axis]
    if length % format.group:
        return None
    return (*weight.shape[:axis], length // format.group, format.group, *weight.shape[axis + 1 :])


class _Builder:
    """Collects nodes that decode one weight."""

    def __init__(self, graph: ir.Graph, weight: Weight) -> None:
        self._graph, self._weight = graph, weight
        self.nodes: list[ir.Node] = []

    def node(self, op: str, inputs: list[ir.Value], shape: tuple[int, ...], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        node.metadata_props[DECODES] = str(self._weight.format)
        self.nodes.append(node)
        return node.outputs[0]

    def reshaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        name = f"{self._weight.name}.{len(self.nodes)}.shape"
        constant = add_constant(self._graph, name, ir.tensor(np.array(shape, np.int64), name=name))
        return self.node("Reshape", [value, constant], shape)

    def parameter(self, value: ir.Value, pieces: tuple[int, ...]) -> ir.Value:
        """A scale or zero point as floats, shaped such that each number meets its group."""
        held = tuple(d for d in value.const_value.shape if isinstance(d, int))
        weight = self._weight
        if value.dtype != ir.DataType.FLOAT:
            value = self.node("Cast", [value], held, to=int(ir.DataType.FLOAT))
        if not held or held == (1,):
            return value
        grouped = weight.format is not None and weight.format.axis == "out"
        if len(held) > 1:
            axis = 1 if grouped else 2
            shape = tuple(1 if i == axis else d for i, d in enumerate(pieces))
        else:
            axis = len(pieces) - 1 if grouped else 0
            shape = tuple(d if i == axis else 1 for i, d in enumerate(pieces))
        return self.reshaped(value, shape)
