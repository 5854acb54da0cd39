"""Operators without a kernel become the simpler ones that ONNX defines them by."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import ClassVar

import onnx
import onnx_ir as ir

from qc.backends.tvm.bodies import own_body
from qc.backends.tvm.lower import is_constant, supported
from qc.backends.tvm.program import C_TYPES
from qc.ir import dialect
from qc.ir.simplify import infer_shapes
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name

__all__ = ["ExpandFunctions"]

_LEVELS = 8  # bodies within bodies; those of ONNX have two, an Einsum one for each operand
_DOMAIN = "qc.expanded"


@dataclasses.dataclass(frozen=True)
class ExpandFunctions(Pass):
    """Replaces operators without a kernel by functions of those with one.

    ``LogSoftmax``, ``GroupNormalization``, ``Mish``, ... are functions of simpler operators in the schemas of ONNX
    (https://onnx.ai/onnx/repo-docs/IR.html#functions); some bodies depend on the types of inputs. ``Einsum`` and others
    have a body of ours. What a body calls is replaced in turn.

    Functions that the model brings along are taken apart first.

    Exact up to rounding, in the main graph. Left alone, for the lowering to refuse by name: operators of which
    something without a kernel remains, those whose body needs a type that is unknown, and those with subgraphs.
    """

    contract: ClassVar[Contract] = Exact()

    def call(self, model: ir.Model, context: object = None) -> Result:
        from onnx_ir.passes import common

        kernels, sites = frozenset(supported()), []
        own = {k for k in model.functions if k[0] != dialect.DOMAIN and k[:2] not in kernels}
        sites += [Site(site_name(n), Outcome.CHANGED) for n in model.graph if n.op_identifier() in own]
        if sites:
            common.InlinePass(lambda function: function.identifier() in own)(model)
            infer_shapes(model)
        for number, node in enumerate(_missing(model, kernels)):
            name, body = site_name(node), _body(node, model, kernels)
            if body is None:
                reason = f"nothing that has kernels is known to compute {node.op_type}"
                sites.append(Site(name, Outcome.SKIPPED, reason))
                continue
            sites.append(Site(name, Outcome.CHANGED, details={"op": node.op_type}))
            node.domain, node.op_type = _DOMAIN, f"{node.op_type}_{number}"
            model.functions[node.op_identifier()] = ir.Function(_DOMAIN, node.op_type, graph=body, attributes=[])
        result = Result.of(model, sites)
        if result.modified:
            common.InlinePass(lambda function: function.domain == _DOMAIN)(model)
        return result


def _missing(model: ir.Model, kernels: Collection[tuple[str, str]]) -> list[ir.Node]:
    """The nodes without a kernel."""
    return [n for n in model.graph if (n.domain, n.op_type) not in kernels and not is_constant(n)]


def _body(node: ir.Node, model: ir.Model, kernels: Collection[tuple[str, str]]) -> ir.Graph | None:
    """A graph of nodes with kernels that computes what `node` does; None if there is none."""
    from onnx_ir.passes import common

    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return None
    alone = _alone(node, model)
    for _ in range(_LEVELS):
        infer_shapes(alone)
        missing = _missing(alone, kernels)
        if not missing:
            return _named(alone.graph, node)
        common.AddDefaultAttributesPass()(alone)
        for number, inner in enumerate(missing):
            proto = _function(inner, alone.opset_imports)
            if proto is None:
                return None
            inner.overload = proto.overload = str(number)
            del proto.output[len(inner.outputs) :]  # some bodies do not yield optional outputs that are not asked for
            function = ir.from_proto(proto)
            function.opset_imports.update(alone.opset_imports)
            alone.functions[function.identifier()] = function
        common.InlinePass()(alone)
    return None


def _alone(node: ir.Node, model: ir.Model) -> ir.Model:
    """A model of this node only."""
    inputs = [
        None if v is None else ir.Value(name=f"in_{i}", type=v.type, shape=v.shape) for i, v in enumerate(node.inputs)
    ]
    copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
    for i, (new, old) in enumerate(zip(copy.outputs, node.outputs, strict=True)):
        new.name, new.type, new.shape = f"out_{i}", old.type, old.shape
    given = [v for v in inputs if v is not None]
    graph = ir.Graph(given, copy.outputs, nodes=[copy], opset_imports=dict(model.opset_imports))
    return ir.Model(graph, ir_version=model.ir_version or 10)


def _named(graph: ir.Graph, node: ir.Node) -> ir.Graph | None:
    """The graph with names that say where it comes from; None if it has values of types without kernels.

    Symbols that shape inference made up in here would mean something else in the model.
    """
    for inner in graph:
        if any(v.dtype is not None and v.dtype not in C_TYPES for v in inner.outputs):
            return None
        inner.name = f"{node.name or node.op_type}/{inner.op_type}"
        for value in inner.outputs:
            value.shape = None
    return graph


def _function(node: ir.Node, opsets: Mapping[str, int]) -> onnx.FunctionProto | None:
    """The function that ONNX defines an operator by; None if it does not, or not for types that are known."""
    opset = opsets.get(node.domain, 0)
    own = own_body(node, opset) if node.domain == "" else None
    if own is not None:
        return own
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None
    plain = [v for v in schema.function_opset_versions if v <= opset]
    typed = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    if plain:
        body = schema.get_function_with_opset_version(max(plain))
    elif typed and all(v is None or v.type is not None for v in node.inputs):
        types = [onnx.TypeProto() if v is None else ir.serde.serialize_type(v.type) for v in node.inputs]
        body = schema.get_context_dependent_function_with_opset_version(
            max(typed), ir.to_proto(node).SerializeToString(), [t.SerializeToString() for t in types]
        )
    else:
        return None
    return onnx.FunctionProto.FromString(body)
