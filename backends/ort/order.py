"""Weights whose columns are stored in another order: the input is put in that order instead."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import Order, QuantizedTensor, Weight, emit, read_weight, require_opset
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import add_constant, drop_unused

__all__ = ["OrderInputs"]


@dataclasses.dataclass(frozen=True)
class OrderInputs(Pass):
    """Gathers the channels of an input in the order in which the weight's columns are stored.

    ``y = sum_k x_k D[:, order_k] = sum_j x_place_j D[:, j]`` with ``place`` the inverse of ``order``: kernels then read
    D as it is. Exact up to the order of summation. Layers that read one value in one order share a Gather. Look-ups
    keep the order.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        sites: list[Site] = []
        turned: dict[tuple[ir.Value, bytes], ir.Value] = {}
        for node in tuple(model.graph):
            weight = read_weight(node.inputs[1]) if dialect.is_op(node, "Linear") else None
            if weight is None or weight.format is None or not isinstance(weight.format.remainder, Order):
                continue
            _turn(model, node, weight, context, turned)
            sites.append(Site(site_name(node), Outcome.CHANGED, details={"format": str(weight.format)}))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _turn(
    model: ir.Model, node: ir.Node, weight: Weight, context: Context, turned: dict[tuple[ir.Value, bytes], ir.Value]
) -> None:
    tensor = weight.quantized()
    params = dict(tensor.params)
    place = np.argsort(params.pop("order")).astype(np.int64)
    dense = QuantizedTensor(dataclasses.replace(tensor.format, remainder=None), tensor.codes, params)
    decode = emit(dense, ir.Value(name=f"{weight.name}.ordered"), context.store)
    for value in decode.inputs:
        if value is not None:
            model.graph.register_initializer(value)
    require_opset(model, dense.format)
    x = node.inputs[0]
    assert x is not None
    key = (x, place.tobytes())
    if key not in turned:
        name = f"{weight.name}.place"
        gather = ir.node("Gather", [x, add_constant(model.graph, name, ir.tensor(place, name=name))], {"axis": -1})
        out = gather.outputs[0]
        out.name, out.type, out.shape = f"{x.name}.ordered.{len(turned)}", x.type, x.shape
        model.graph.insert_before(node, gather)
        turned[key] = out
    model.graph.insert_before(node, decode)
    node.replace_input_with(0, turned[key])
    node.replace_input_with(1, decode.outputs[0])
