"""The ``qc`` operator domain: every operator is an onnxscript function whose body is its reference semantics.

A model that uses these operators carries their bodies as model-local functions, so any ONNX runtime executes it by
inlining them. A backend that has a kernel replaces the node; nothing has to.

To add an operator, write its body in `_bodies`; a node that carries the overload name ``bias`` selects the body with
that overload.

| operator | inputs | meaning |
|---|---|---|
| ``Linear`` | x [..., K], weight [N, K] | ``x @ weight.T`` |
| ``Linear`` overload ``bias`` | x [..., K], weight [N, K], bias [N] | ``x @ weight.T + bias`` |
| ``Swish`` | x, attribute alpha | ``x * sigmoid(alpha * x)``: SiLU at 1, the sigmoid form of GELU at 1.702 |
"""

from __future__ import annotations

import functools

import onnx_ir as ir

__all__ = ["DOMAIN", "VERSION", "functions_for", "is_op", "linear", "swish", "sync_functions"]

DOMAIN = "qc"
VERSION = 1


def linear(x: ir.Value, weight: ir.Value, bias: ir.Value | None = None, *, name: str | None = None) -> ir.Node:
    """Builds a ``qc.Linear`` node, not yet in any graph.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``: output channels first.
        bias: ``[N]`` or None.
        name: Name of the node.
    """
    inputs = [x, weight] if bias is None else [x, weight, bias]
    node = ir.Node(DOMAIN, "Linear", inputs, overload="" if bias is None else "bias", name=name)
    out = node.outputs[0]
    out.dtype = x.dtype
    if x.shape is not None and weight.shape is not None:
        out.shape = ir.Shape([*x.shape.dims[:-1], weight.shape.dims[0]])
    return node


def swish(x: ir.Value, alpha: float = 1.0, *, name: str | None = None) -> ir.Node:
    """Builds a ``qc.Swish`` node, not yet in any graph."""
    node = ir.node("Swish", [x], {"alpha": float(alpha)}, domain=DOMAIN, name=name)
    node.outputs[0].dtype, node.outputs[0].shape = x.dtype, x.shape
    return node


def is_op(node: ir.Node | None, op_type: str) -> bool:
    """Whether `node` is that operator of the dialect, in any overload."""
    return node is not None and node.domain == DOMAIN and node.op_type == op_type


def functions_for(opset: int) -> dict[tuple[str, str], ir.Function]:
    """Returns fresh bodies of all operators by (name, overload), written against default-domain `opset`."""
    return {key: _body(key, opset) for key in _bodies()}


def sync_functions(model: ir.Model) -> None:
    """Gives `model` exactly the function bodies that its ``qc`` nodes need, and the opset import of the domain.

    Called by the pass manager after every pass, so no pass needs to.
    """
    used = {(n.op_type, n.overload) for n in _all_nodes(model) if n.domain == DOMAIN}
    opset = model.opset_imports.get("", 1)
    for key in [k for k in model.functions if k[0] == DOMAIN]:
        if (key[1], key[2]) not in used or model.functions[key].opset_imports.get("") != opset:
            del model.functions[key]
    for op_type, overload in sorted(used):
        if (DOMAIN, op_type, overload) not in model.functions:
            model.functions[(DOMAIN, op_type, overload)] = _body((op_type, overload), opset)
    if used:
        model.opset_imports[DOMAIN] = VERSION
    else:
        model.opset_imports.pop(DOMAIN, None)


def _all_nodes(model: ir.Model):
    yield from model.graph.all_nodes()
    for key, function in model.functions.items():
        if key[0] != DOMAIN:
            yield from function.all_nodes()


def _body(key: tuple[str, str], opset: int) -> ir.Function:
    proto = _bodies()[key].to_function_proto()
    function = ir.serde.deserialize_function(proto)
    function.name, function.overload = key  # two overloads of one name are two Python functions
    function.opset_imports[""] = opset
    return function


@functools.cache
def _bodies():
    """The onnxscript functions, built on first use: importing onnxscript takes most of a second."""
    from onnxscript import opset23 as op
    from onnxscript import script
    from onnxscript.values import Opset

    qc = Opset(DOMAIN, VERSION)

    @script(qc)
    def Linear(x, weight):  # noqa: N802
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    @script(qc)
    def LinearBias(x, weight, bias):  # noqa: N802
        return op.Add(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), bias)

    @script(qc)
    def Swish(x, alpha: float):  # noqa: N802
        return op.Mul(x, op.Sigmoid(op.Mul(x, op.CastLike(op.Constant(value_float=alpha), x))))

    return {("Linear", ""): Linear, ("Linear", "bias"): LinearBias, ("Swish", ""): Swish}
