"""Elementwise operators for the torch executor: arithmetic, logic, comparison, activations, casts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx_ir as ir
import torch
from torch.nn import functional as F  # noqa: N812

from qc.ir._torch_ops import Call, integer_range, op
from qc.ir.errors import UnsupportedError

Tensor = torch.Tensor

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sign": torch.sign, "Reciprocal": torch.reciprocal,
    "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round,
    "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt, "Erf": torch.erf,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan,
    "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Relu": torch.relu, "Softsign": F.softsign, "Mish": F.mish,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "HardSwish": lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1),
    "Not": torch.logical_not, "BitwiseNot": torch.bitwise_not, "IsNaN": torch.isnan, "Identity": lambda x: x,
}  # fmt: skip

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul,
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
}  # fmt: skip

_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add,
}  # fmt: skip


def _without_call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda call, *inputs: function(*inputs)


def _reduced(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda call, *inputs: functools.reduce(function, inputs)


for _name, _function in (_UNARY | _BINARY).items():
    op(_name)(_without_call(_function))
for _name, _function in _VARIADIC.items():
    op(_name)(_reduced(_function))


@op("Mean")
def _mean(call: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


@op("Div")
def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


@op("Mod")
def _mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.attr("fmod", 0) else torch.remainder(a, b)


@op("Pow", host=(1,))
def _pow(call: Call, base: Tensor, exponent: Tensor) -> Tensor:
    if exponent.dim() == 0 and not exponent.requires_grad:
        return torch.pow(base, exponent.item()).to(base.dtype)  # torch has exact products for small powers
    return torch.pow(base, exponent.to(base.device)).to(base.dtype)


@op("BitShift")
def _bit_shift(call: Call, a: Tensor, b: Tensor) -> Tensor:
    wide, amount = a.to(torch.int64), b.to(torch.int64)
    shifted = wide << amount if call.attr("direction") == "LEFT" else wide >> amount
    return shifted.to(a.dtype)


@op("IsInf")
def _is_inf(call: Call, x: Tensor) -> Tensor:
    positive = torch.isposinf(x) if call.attr("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    return positive | torch.isneginf(x) if call.attr("detect_negative", 1) else positive


@op("Clip", since=1)
def _clip_1(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(x, call.attr("min", -torch.inf), call.attr("max", torch.inf))


@op("Clip", since=11)
def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@op("Where")
def _where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@op("Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.attr("approximate", "none"))


@op("Swish")
@op("Swish", domain="qc")
def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.attr("alpha", 1.0) * x)


@op("SwiGLU")
def _swiglu(call: Call, gate: Tensor, up: Tensor) -> Tensor:
    return _swish(call, gate) * up


@op("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.attr("alpha", 0.01))


@op("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.attr("alpha", 1.0))


@op("Celu")
def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.attr("alpha", 1.0))


@op("Selu")
def _selu(call: Call, x: Tensor) -> Tensor:
    return call.attr("gamma", 1.05070102214813232421875) * F.elu(x, call.attr("alpha", 1.67326319217681884765625))


@op("ThresholdedRelu")
def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.attr("alpha", 1.0), x, torch.zeros_like(x))


@op("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(call.attr("alpha", 0.2) * x + call.attr("beta", 0.5), 0, 1)


@op("Shrink")
def _shrink(call: Call, x: Tensor) -> Tensor:
    bias, threshold = call.attr("bias", 0.0), call.attr("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, zero)).to(x.dtype)


@op("Dropout")
def _dropout(call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> tuple[Tensor, ...]:
    if training is not None and bool(training) and (ratio is None or float(ratio) > 0):
        raise UnsupportedError(
            f"Dropout node {call.node.name!r} is in training mode, which is random and differs between runtimes. "
            "Export the model in evaluation mode."
        )
    return x, torch.ones_like(x, dtype=torch.bool)


@op("Cast")
def _cast(call: Call, x: Tensor) -> Tensor:
    return _convert(call, x, ir.DataType(call.attr("to")))


@op("CastLike")
def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return _convert(call, x, call.type_of(1, like))


def _convert(call: Call, x: Tensor, dtype: ir.DataType) -> Tensor:
    target = call.context.torch_dtype(dtype)
    if dtype in _UNSTORED:
        raise UnsupportedError(f"The torch executor cannot round to {dtype} (node {call.node.name!r}).")
    if dtype in _NARROW:
        low, high = integer_range(dtype)  # type: ignore[misc]
        bits = (high - low).bit_length()
        wrapped = torch.remainder(x.to(torch.int64) - low, 2**bits) + low
        return wrapped.to(target)
    if target in _FLOAT8 and call.attr("saturate", 1):
        return saturate_to(x, target)
    return x.to(target)


def saturate_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to an 8-bit float; what lies outside its range becomes its largest finite value."""
    bound = torch.finfo(dtype).max
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    return torch.clamp(wide, -bound, bound).to(dtype)


_NARROW = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2})
_UNSTORED = frozenset({ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT6E2M3, ir.DataType.FLOAT6E3M2})
_FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})
