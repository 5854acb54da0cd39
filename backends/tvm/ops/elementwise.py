"""Operators that work element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.kernels.rows import activation, gated
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.activations import activation_of
from qc.backends.tvm.ops.loops import broadcast, loop
from qc.backends.tvm.program import C_TYPES, Tensor
from qc.backends.tvm.shapes import Dim, divide, largest, smallest
from qc.ir import dialect

__all__ = [
    "batch_normalization",
    "binary",
    "cast",
    "clip",
    "gelu",
    "per_channel",
    "swish",
    "unary",
    "where",
    "with_slope",
]

F, I64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL

_BINARY = {
    "Add": "{a} + {b}", "Sub": "{a} - {b}", "Mul": "{a} * {b}", "Div": "{a} / {b}",
    "Equal": "{a} == {b}", "Greater": "{a} > {b}", "Less": "{a} < {b}", "GreaterOrEqual": "{a} >= {b}",
    "LessOrEqual": "{a} <= {b}", "And": "{a} && {b}", "Or": "{a} || {b}", "Xor": "{a} != {b}",
    "Min": "{a} < {b} ? {a} : {b}", "Max": "{a} > {b} ? {a} : {b}", "Pow": "powf({a}, {b})",
    "PRelu": "{a} < 0 ? {a} * {b} : {a}",
}  # fmt: skip
_REST = "({a} - {a} / {b} * {b} + {b})"
_WHOLE = {
    "Div": "{b} == 0 ? 0 : {b} == -1 ? -{a} : {a} / {b}",
    "Mod": f"{{b}} == 0 || {{b}} == -1 ? 0 : {_REST} - {_REST} / {{b}} * {{b}}",
}
"""Of integers, of which processors refuse two quotients. A remainder has the sign of the divisor."""

_TO_BOOL = frozenset({"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN"})
_UNARY = {
    "Neg": "-{a}", "Abs": "{a} < 0 ? -{a} : {a}", "Sqrt": "sqrtf({a})", "Exp": "expf({a})", "Log": "logf({a})",
    "Tanh": "tanhf({a})", "Sigmoid": "1.0f / (1.0f + expf(-{a}))", "Erf": "erff({a})", "Floor": "floorf({a})",
    "Ceil": "ceilf({a})", "Round": "rintf({a})", "Reciprocal": "1.0f / {a}", "Relu": "{a} > 0 ? {a} : 0", "Not": "!{a}",
    "Sin": "sinf({a})", "Cos": "cosf({a})", "IsNaN": "{a} != {a}",
    "Softplus": "fmaxf({a}, 0.0f) + log1pf(expf(-fabsf({a})))",
    "Softsign": "{a} / (1.0f + fabsf({a}))", "Sign": "({a} > 0) - ({a} < 0)",
    "HardSwish": "{a} * fminf(fmaxf({a} / 6.0f + 0.5f, 0.0f), 1.0f)",
}  # fmt: skip
_NUMBERS: dict[str, Callable[[Dim, Dim], Dim]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": divide,
    "Min": smallest,
    "Max": largest,
    "Mod": lambda a, b: a - divide(a, b) * b,
}


@operator(*_BINARY, *_WHOLE)
def binary(at: Lowering, node: ir.Node) -> None:
    """Two operands; Min and Max take any number."""
    tensors = [at.get(v) for v in node.inputs if v is not None]
    if all(t.values is not None for t in tensors) and node.op_type in _NUMBERS:
        _numbers(at, node, tensors)
        return
    whole = tensors[0].dtype != F
    operation = (_BINARY | _WHOLE if whole else _BINARY).get(node.op_type)
    if operation is None or (whole and node.op_type == "Pow") or at.attribute(node, "fmod", 0):
        raise at.refuse(node, f"of {tensors[0].dtype.name}")
    total = tensors[0]
    for i, other in enumerate(tensors[1:]):
        last = i == len(tensors) - 2
        shape = broadcast(at, [total.shape, other.shape])
        dtype = BOOL if node.op_type in _TO_BOOL else total.dtype
        y = at.result(node.outputs[0], shape, dtype) if last else at.program.tensor(shape, dtype)
        loop(at, operation, [total, other], y)
        total = y
    if len(tensors) == 1:
        at.set(node.outputs[0], total)


def _numbers(at: Lowering, node: ir.Node, tensors: Sequence[Tensor]) -> None:
    """Arithmetic on numbers that the dimensions determine."""
    function = _NUMBERS[node.op_type]
    length = max(len(t.values or ()) for t in tensors)
    spread = [list(t.values or ()) * (length if len(t.values or ()) == 1 else 1) for t in tensors]
    total = spread[0]
    for other in spread[1:]:
        total = [function(a, b) for a, b in zip(total, other, strict=True)]
    scalar = all(not t.shape for t in tensors)
    at.set(node.outputs[0], at.numbers(total, tensors[0].dtype, scalar=scalar))


@operator(*_UNARY)
def unary(at: Lowering, node: ir.Node) -> None:
    """One operand; activation functions have kernels."""
    if activation_of(node) is not None:
        _activation(at, node)
        return
    x = at.input(node, 0)
    assert x is not None
    if x.values is not None and node.op_type == "Neg":
        at.set(node.outputs[0], at.numbers([v * -1 for v in x.values], x.dtype, scalar=not x.shape))
        return
    y = at.result(node.outputs[0], x.shape, BOOL if node.op_type in _TO_BOOL else x.dtype)
    loop(at, _UNARY[node.op_type], [x], y)


@operator("Gelu")
def gelu(at: Lowering, node: ir.Node) -> None:
    """An activation function with a kernel."""
    _activation(at, node)


@operator("Swish", domain=dialect.DOMAIN)
def swish(at: Lowering, node: ir.Node) -> None:
    """``x * sigmoid(alpha * x)``."""
    if activation_of(node) is not None:
        _activation(at, node)
        return
    x = at.input(node, 0)
    assert x is not None
    alpha = float(np.float32(node.attributes["alpha"].as_float()))
    loop(at, f"{{a}} / (1.0f + expf({-alpha!r}f * {{a}}))", [x], at.result(node.outputs[0], x.shape))


def _activation(at: Lowering, node: ir.Node) -> None:
    """An activation function, multiplied with another value if that is all that becomes of it."""
    x, kind = at.input(node, 0), activation_of(node)
    assert x is not None
    if x.dtype != F:
        raise at.refuse(node, f"it is computed in {x.dtype.name}")
    x, m, n, ldx = at.rows(x)
    user = at.sole_user(node.outputs[0])
    if user is not None and user.domain == "" and user.op_type == "Mul":
        others = [v for v in user.inputs if v is not node.outputs[0]]
        gate = at.known(others[0]) if len(others) == 1 else None
        if gate is not None and gate.shape == x.shape and gate.buffer is not None:
            gate, _, _, ldg = at.rows(gate)
            y = at.result(user.outputs[0], x.shape)
            at.done.add(user)
            name = at.program.kernel("gated", gated, kind, pointers=3, integers=4)
            at.program.call(name, [x, gate, y], [n, ldx, ldg, n], m, writes=[y])
            return
    y = at.result(node.outputs[0], x.shape)
    name = at.program.kernel("act", activation, kind, pointers=2, integers=3)
    at.program.call(name, [x, y], [n, ldx, n], m, writes=[y])


@operator("Where")
def where(at: Lowering, node: ir.Node) -> None:
    """One of two values by a condition."""
    condition, a, b = (at.get(v) for v in node.inputs if v is not None)
    shape = broadcast(at, [condition.shape, a.shape, b.shape])
    loop(at, "{a} ? {b} : {c}", [condition, a, b], at.result(node.outputs[0], shape, a.dtype))


@operator("Clip")
def clip(at: Lowering, node: ir.Node) -> None:
    """Limits from below, from above or from both."""
    x, low, high = at.input(node, 0), at.input(node, 1), at.input(node, 2)
    assert x is not None
    expression, inputs = "{a}", [x]
    if low is not None:
        inputs.append(low)
        expression = "({a} < {b} ? {b} : {a})"
    if high is not None:
        inputs.append(high)
        name = "{" + "abc"[len(inputs) - 1] + "}"
        expression = f"({expression} > {name} ? {name} : {expression})"
    loop(at, expression, inputs, at.result(node.outputs[0], x.shape, x.dtype))


@operator("LeakyRelu", "Elu", "HardSigmoid")
def with_slope(at: Lowering, node: ir.Node) -> None:
    """Activation functions with a parameter."""
    x = at.input(node, 0)
    assert x is not None
    default = {"LeakyRelu": 0.01, "Elu": 1.0, "HardSigmoid": 0.2}[node.op_type]
    alpha = f"{float(at.attribute(node, 'alpha', default))!r}f"  # type: ignore[arg-type]
    beta = f"{float(at.attribute(node, 'beta', 0.5))!r}f"  # type: ignore[arg-type]
    expression = {
        "LeakyRelu": f"{{a}} < 0 ? {alpha} * {{a}} : {{a}}",
        "Elu": f"{{a}} < 0 ? {alpha} * (expf({{a}}) - 1.0f) : {{a}}",
        "HardSigmoid": f"fminf(fmaxf({alpha} * {{a}} + {beta}, 0.0f), 1.0f)",
    }[node.op_type]
    loop(at, expression, [x], at.result(node.outputs[0], x.shape))


@operator("Cast")
def cast(at: Lowering, node: ir.Node) -> None:
    """Another element type."""
    x, to = at.input(node, 0), ir.DataType(int(at.attribute(node, "to")))  # type: ignore[call-overload]
    assert x is not None
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    if x.values is not None and to in integers:
        at.set(node.outputs[0], at.numbers(x.values, to, scalar=not x.shape))
    elif x.dtype == to:
        at.set(node.outputs[0], x)
    elif to not in C_TYPES:
        raise at.refuse(node, f"it casts to {to.name}")
    else:
        expression = "{a} != 0" if to == BOOL else "{a}"
        loop(at, expression, [x], at.result(node.outputs[0], x.shape, to))


def per_channel(x: Tensor, t: Tensor) -> Tensor:
    """A vector of the second axis of x, to be broadcast to it."""
    trailing = len(x.shape) - 2
    return t.view((t.shape[0], *[1] * trailing), (t.strides[0], *[0] * trailing))


@operator("BatchNormalization")
def batch_normalization(at: Lowering, node: ir.Node) -> None:
    """``(x - mean) / sqrt(var + eps) * scale + bias`` per channel."""
    x, scale, bias, mean, var = (at.get(v) for v in node.inputs[:5] if v is not None)
    eps = float(at.attribute(node, "epsilon", 1e-5))  # type: ignore[arg-type]
    for held in (scale, bias, mean, var):
        at.program.require_equal(held.shape[0], x.shape[1])

    factor = at.program.tensor(scale.shape)
    loop(at, f"{{a}} / sqrtf({{b}} + {eps!r}f)", [scale, var], factor)
    shift = at.program.tensor(scale.shape)
    loop(at, "{a} - {b} * {c}", [bias, mean, factor], shift)
    loop(at, "{a} * {b} + {c}", [x, per_channel(x, factor), per_channel(x, shift)], at.result(node.outputs[0], x.shape))
