"""The ``qc`` operator domain: every operator is an onnxscript function whose body is its reference semantics.

A model that uses these operators carries their bodies as model-local functions, so any ONNX runtime executes it by
inlining them. A backend that has a kernel replaces the node; nothing has to.

To add an operator, write its body in `_bodies`; a node that carries the overload name ``bias`` selects the body with
that overload. The bodies of ``Decode`` are made from the overload, which spells the format (`qc.ir._quant_body`).

| operator | inputs | meaning |
|---|---|---|
| ``Linear`` | x [..., K], weight [N, K] | ``x @ weight.T`` |
| ``Linear`` overload ``bias`` | x [..., K], weight [N, K], bias [N] | ``x @ weight.T + bias`` |
| ``Decode`` | codes and parameters of a weight | the weight, float32 [N, K]; overload: format and shape |
| ``Swish`` | x, attribute alpha | ``x * sigmoid(alpha * x)``: SiLU at 1, the sigmoid form of GELU at 1.702 |
| ``DynamicQuantize`` | x [..., K] float32, attributes bits, clip | x on a grid of ``2^bits`` points, see below |

``DynamicQuantize`` has four overloads. ``token_*`` finds a grid for each vector along the last axis, ``tensor_*`` one
for all of x; ``clip`` shrinks its range. With ``h = 2^(bits-1)`` and rounding half to even:

* ``*_symmetric``: ``s = clip * max|x| / (h - 1)``, ``y = s * clamp(round(x / s), -h, h - 1)``;
* ``*_asymmetric``: ``low = clip * min(min x, 0)``, ``high = clip * max(max x, 0)``, ``s = (high - low) / (2h - 1)``,
  ``z = round(-low / s)``, ``y = s * (clamp(round(x / s) + z, 0, 2h - 1) - z)``.
"""

from __future__ import annotations

import functools

import onnx_ir as ir

__all__ = ["DOMAIN", "VERSION", "dynamic_quantize", "functions_for", "is_op", "linear", "swish", "sync_functions"]

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


def dynamic_quantize(x: ir.Value, *, bits: int, token: bool, symmetric: bool, clip: float = 1.0) -> ir.Node:
    """Builds a ``qc.DynamicQuantize`` node, not yet in any graph.

    Args:
        x: float32 ``[..., K]``.
        bits: Width of a code.
        token: Whether each vector along the last axis has a grid of its own.
        symmetric: Whether the grid is symmetric around zero.
        clip: What the range is multiplied with.
    """
    overload = f"{'token' if token else 'tensor'}_{'symmetric' if symmetric else 'asymmetric'}"
    attributes = {"bits": bits, "clip": float(clip)}
    node = ir.node("DynamicQuantize", [x], attributes, domain=DOMAIN, overload=overload)
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
    if key[0] == "Decode":
        from qc.ir._quant_body import decode_function  # which is made from the overload

        return decode_function(key[1], opset)
    proto = _script(key).to_function_proto()
    function = ir.serde.deserialize_function(proto)
    function.name, function.overload = key  # two overloads of one name are two Python functions
    function.opset_imports[""] = opset
    return function


@functools.cache
def _script(key: tuple[str, str]):
    """The onnxscript function, made on first use: importing onnxscript takes most of a second."""
    from onnxscript import script
    from onnxscript.values import Opset

    return script(Opset(DOMAIN, VERSION))(_bodies()[key])


def _bodies():
    from onnxscript import opset23 as op

    def Linear(x, weight):  # noqa: N802
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def LinearBias(x, weight, bias):  # noqa: N802
        return op.Add(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), bias)

    def Swish(x, alpha: float):  # noqa: N802
        return op.Mul(x, op.Sigmoid(op.Mul(x, op.CastLike(op.Constant(value_float=alpha), x))))

    def TokenSymmetric(x, bits: int, clip: float):  # noqa: N802
        half = op.Pow(op.Constant(value_float=2.0), op.Cast(op.Constant(value_int=bits), to=1) - 1.0)
        largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]))
        scale = op.Max(largest * (op.Constant(value_float=clip) / (half - 1.0)), 1e-30)
        return op.Clip(op.Round(x / scale), op.Neg(half), half - 1.0) * scale

    def TensorSymmetric(x, bits: int, clip: float):  # noqa: N802
        half = op.Pow(op.Constant(value_float=2.0), op.Cast(op.Constant(value_int=bits), to=1) - 1.0)
        largest = op.ReduceMax(op.Abs(x), keepdims=0)
        scale = op.Max(largest * (op.Constant(value_float=clip) / (half - 1.0)), 1e-30)
        return op.Clip(op.Round(x / scale), op.Neg(half), half - 1.0) * scale

    def TokenAsymmetric(x, bits: int, clip: float):  # noqa: N802
        top = op.Pow(op.Constant(value_float=2.0), op.Cast(op.Constant(value_int=bits), to=1)) - 1.0
        low = op.Constant(value_float=clip) * op.Min(op.ReduceMin(x, op.Constant(value_ints=[-1])), 0.0)
        high = op.Constant(value_float=clip) * op.Max(op.ReduceMax(x, op.Constant(value_ints=[-1])), 0.0)
        scale = op.Max((high - low) / top, 1e-30)
        zero = op.Round(op.Neg(low) / scale)
        return (op.Clip(op.Round(x / scale) + zero, 0.0, top) - zero) * scale

    def TensorAsymmetric(x, bits: int, clip: float):  # noqa: N802
        top = op.Pow(op.Constant(value_float=2.0), op.Cast(op.Constant(value_int=bits), to=1)) - 1.0
        low = op.Constant(value_float=clip) * op.Min(op.ReduceMin(x, keepdims=0), 0.0)
        high = op.Constant(value_float=clip) * op.Max(op.ReduceMax(x, keepdims=0), 0.0)
        scale = op.Max((high - low) / top, 1e-30)
        zero = op.Round(op.Neg(low) / scale)
        return (op.Clip(op.Round(x / scale) + zero, 0.0, top) - zero) * scale

    return {
        ("Linear", ""): Linear,
        ("Linear", "bias"): LinearBias,
        ("Swish", ""): Swish,
        ("DynamicQuantize", "token_symmetric"): TokenSymmetric,
        ("DynamicQuantize", "token_asymmetric"): TokenAsymmetric,
        ("DynamicQuantize", "tensor_symmetric"): TensorSymmetric,
        ("DynamicQuantize", "tensor_asymmetric"): TensorAsymmetric,
    }
