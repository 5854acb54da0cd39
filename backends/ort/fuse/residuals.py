"""Residual sums in front of norms: which kernel computes them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qc.ir.model import Model
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    Decline,
    attribute,
    copy_props,
    made_by,
    main_nodes,
    replace,
    rewritten,
    same_dim,
    stored,
)

__all__ = ["FuseResiduals", "KeepResiduals"]


@dataclasses.dataclass(frozen=True)
class KeepResiduals(Pass):
    """Spells the ``Add`` in front of a LayerNormalization as ``Sum``: the same number, bit for bit.

    The runtime's optimizer fuses ``Add`` + ``LayerNormalization`` to ``SkipLayerNormalization`` at load, whose CPU
    kernel takes two and a half to seven times as long as the two nodes together; it does not look for ``Sum``.
    benchmarks/ort_kernels.py has the times.

    Exact. Left alone: the Add of a constant, such as a bias.
    """

    contract: ClassVar[Contract] = Exact(0.0)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for norm in main_nodes(model, "LayerNormalization"):
            add = made_by(norm.inputs[0], "Add")
            if add is None:
                continue
            if any(v is None or (v.producer() is None and v.const_value is not None) for v in add.inputs):
                sites.append(Site(site_name(norm), Outcome.SKIPPED, "it normalises a sum with a constant"))
                continue
            replace(add.outputs[0], [ir.node("Sum", list(add.inputs))], like=add)
            sites.append(Site(site_name(norm), Outcome.CHANGED))
        return Result.of(model, sites)


@dataclasses.dataclass(frozen=True)
class FuseResiduals(Pass):
    """Fuses ``Add`` + ``RMSNormalization`` of a decoder to ``SkipSimplifiedLayerNormalization``, which yields both.

    For one token, which is what a decoder computes most of the time, it saves a node at each norm. For many it takes
    twice as long as the two nodes, a few thousandths of the whole: a model without a cache, which never computes one
    token, keeps them. benchmarks/ort_kernels.py has the times.

    Exact up to rounding. Left alone: sums that broadcast, norms of several axes, and types other than float32.
    """

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        if not Model.of(model).signature.caches:
            return Result.of(model, [])
        norms = [n for n in main_nodes(model, "RMSNormalization") if made_by(n.inputs[0], "Add") is not None]
        result = Result.of(model, rewritten(norms, _fuse))
        if result.modified:
            model.opset_imports.setdefault("com.microsoft", 1)
            model.graph.sort()  # a gain stored in 16 bits is cast behind the sum
        return result


def _fuse(norm: ir.Node) -> dict[str, object]:
    total, gain = norm.inputs[0], norm.inputs[1]
    add = made_by(total, "Add")
    assert add is not None
    assert total is not None
    shape = total.shape
    if total.dtype != ir.DataType.FLOAT:
        raise Decline("it does not compute in float32")
    if shape is None or len(shape) not in (2, 3) or attribute(norm, "axis", -1) not in (-1, len(shape) - 1):
        raise Decline("the kernel takes matrices or batches of them, and norms of their last axis")
    if any(v is None or v.shape is None or len(v.shape) != len(shape) for v in add.inputs) or not all(
        same_dim(a, b) for v in add.inputs for a, b in zip(v.shape, shape, strict=True)
    ):
        raise Decline("its sum broadcasts")
    cast = made_by(gain, "Cast")
    if stored(gain if cast is None else cast.inputs[0]) is None:
        raise Decline("its gain is computed")
    epsilon = {"epsilon": attribute(norm, "epsilon", 1e-5)}
    fused = ir.node(
        "SkipSimplifiedLayerNormalization", [*add.inputs, gain], epsilon, domain="com.microsoft", num_outputs=4
    )
    copy_props(norm, [fused])
    add.graph.insert_before(add, fused)
    for old, new in ((norm.outputs[0], fused.outputs[0]), (total, fused.outputs[3])):
        new.type, new.shape, new.name = old.type, old.shape, old.name
        new.metadata_props.update(old.metadata_props)
    norm.outputs[0].replace_all_uses_with(fused.outputs[0], replace_graph_outputs=True)
    norm.graph.remove(norm, safe=True)
    total.replace_all_uses_with(fused.outputs[3], replace_graph_outputs=True)
    add.graph.remove(add, safe=True)
    return {"kernel": "SkipSimplifiedLayerNormalization"}
