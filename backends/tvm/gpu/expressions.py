"""Expressions of C, as element-wise operators are spelled, as expressions of TVM's TIR."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from qc.backends.tvm.kernels.vectors import ERF, ERF_BELOW

__all__ = ["activate", "erf", "parse"]

Expr = Any

_TOKEN = re.compile(
    r"\s*(?:(?P<float>0x[\da-f.]+p[+-]?\d+f?|\d+\.\d*(?:e[+-]?\d+)?f?|\d+e[+-]?\d+f?)|(?P<int>\d+)"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<sign>\|\||&&|==|!=|<=|>=|[-+*/<>!?:(),]))"
)
_TYPES = {"float": "float32", "int64_t": "int32", "int32_t": "int32", "uint8_t": "int32", "int8_t": "int32"}
_LEVELS = (("||",), ("&&",), ("==", "!="), ("<", "<=", ">", ">="), ("+", "-"), ("*", "/"))


def parse(text: str, names: Mapping[str, Expr]) -> Expr:
    """The expression that C text spells; the names in it stand for expressions."""
    return _Parser(text, names).whole()


def _kind(value: Expr) -> str:
    return str(value.ty)


class _Parser:
    def __init__(self, text: str, names: Mapping[str, Expr]) -> None:
        from tvm import tirx

        self.x, self._names = tirx, names
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text.rstrip()):
            match = _TOKEN.match(text, at)
            assert match is not None, f"no C expression: {text!r} at {at}"
            kind = match.lastgroup
            assert kind is not None
            self._tokens.append((kind, match[kind]))
            at = match.end()
        self._tokens.append(("end", ""))

    def whole(self) -> Expr:
        found = self._choice()
        assert self._tokens[0][0] == "end", self._tokens
        return found

    def _take(self, sign: str) -> bool:
        if self._tokens[0] != ("sign", sign):
            return False
        self._tokens.pop(0)
        return True

    def _expect(self, sign: str) -> None:
        assert self._take(sign), (sign, self._tokens)

    def _choice(self) -> Expr:
        condition = self._binary(0)
        if not self._take("?"):
            return condition
        yes = self._choice()
        self._expect(":")
        no = self._choice()
        return self.x.Select(self._truth(condition), *self._same(yes, no))

    def _binary(self, level: int) -> Expr:
        if level == len(_LEVELS):
            return self._unary()
        left = self._binary(level + 1)
        while self._tokens[0][1] in _LEVELS[level] and self._tokens[0][0] == "sign":
            sign = self._tokens.pop(0)[1]
            left = self._apply(sign, left, self._binary(level + 1))
        return left

    def _apply(self, sign: str, a: Expr, b: Expr) -> Expr:
        x = self.x
        if sign in ("||", "&&"):
            return (x.Or if sign == "||" else x.And)(self._truth(a), self._truth(b))
        a, b = self._same(a, b)
        if sign == "/" and _kind(a) != "float32":
            return x.truncdiv(a, b)
        return _SIGNS[sign](x, a, b)

    def _unary(self) -> Expr:
        x = self.x
        if self._take("-"):
            value = self._number(self._unary())
            return x.const(0, _kind(value)) - value
        if self._take("!"):
            return x.Not(self._truth(self._unary()))
        if self._take("("):
            kind, word = self._tokens[0]
            if kind == "name" and word in _TYPES:
                self._tokens.pop(0)
                self._expect(")")
                return self._cast(self._unary(), _TYPES[word])
            inner = self._choice()
            self._expect(")")
            return inner
        kind, word = self._tokens.pop(0)
        if kind == "float":
            bare = word.removesuffix("f")
            return x.const(float.fromhex(bare) if bare.startswith("0x") else float(bare), "float32")
        if kind == "int":
            return x.const(int(word), "int32")
        assert kind == "name", (kind, word)
        return self._call(word) if self._take("(") else self._names[word]

    def _call(self, name: str) -> Expr:
        arguments = [self._choice()]
        while self._take(","):
            arguments.append(self._choice())
        self._expect(")")
        return _FUNCTIONS[name](self.x, *(self._cast(a, "float32") for a in arguments))

    def _truth(self, value: Expr) -> Expr:
        return value if _kind(value) == "bool" else value != self.x.const(0, _kind(value))

    def _number(self, value: Expr) -> Expr:
        return self.x.Cast("int32", value) if _kind(value) == "bool" else value

    def _cast(self, value: Expr, dtype: str) -> Expr:
        return value if _kind(value) == dtype else self.x.Cast(dtype, value)

    def _same(self, a: Expr, b: Expr) -> tuple[Expr, Expr]:
        a, b = self._number(a), self._number(b)
        dtype = "float32" if "float32" in (_kind(a), _kind(b)) else _kind(a)
        return self._cast(a, dtype), self._cast(b, dtype)


_SIGNS: Mapping[str, Callable[[Any, Expr, Expr], Expr]] = {
    "+": lambda x, a, b: a + b,
    "-": lambda x, a, b: a - b,
    "*": lambda x, a, b: a * b,
    "/": lambda x, a, b: a / b,
    "<": lambda x, a, b: a < b,
    "<=": lambda x, a, b: a <= b,
    ">": lambda x, a, b: a > b,
    ">=": lambda x, a, b: a >= b,
    "==": lambda x, a, b: x.EQ(a, b),
    "!=": lambda x, a, b: x.NE(a, b),
}


def erf(x: Any, a: Expr) -> Expr:
    """``erf(a) = a p(a^2) / q(a^2)`` on [-4, 4]; beyond, it is 1 to seven digits. Not every language has it."""
    a = x.Max(x.Min(a, x.const(4.0, "float32")), x.const(-4.0, "float32"))
    square, above, below = a * a, x.const(ERF[0], "float32"), x.const(ERF_BELOW[0], "float32")
    for c in ERF[1:]:
        above = above * square + x.const(c, "float32")
    for c in ERF_BELOW[1:]:
        below = below * square + x.const(c, "float32")
    return a * above / below


def _tanh(x: Any, a: Expr) -> Expr:
    """``1 - 2 / (exp(2 a) + 1)``: right at both ends, where a quotient of powers would be NaN."""
    one, two = x.const(1.0, "float32"), x.const(2.0, "float32")
    limited = x.Max(x.Min(a, x.const(10.0, "float32")), x.const(-10.0, "float32"))
    small = a * (one - a * a * x.const(1 / 3, "float32"))
    return x.Select(x.abs(a) < x.const(0.01, "float32"), small, one - two / (x.exp(two * limited) + one))


def _sigmoid(x: Any, a: Expr) -> Expr:
    one = x.const(1.0, "float32")
    return one / (one + x.exp(x.Max(x.const(0.0, "float32") - a, x.const(-80.0, "float32"))))


_FUNCTIONS: Mapping[str, Callable[..., Expr]] = {
    "expf": lambda x, a: x.exp(a),
    "logf": lambda x, a: x.log(a),
    "log1pf": lambda x, a: x.log(x.const(1.0, "float32") + a),
    "sqrtf": lambda x, a: x.sqrt(a),
    "tanhf": _tanh,
    "erff": erf,
    "sinf": lambda x, a: x.sin(a),
    "cosf": lambda x, a: x.cos(a),
    "powf": lambda x, a, b: x.power(a, b),
    "fabsf": lambda x, a: x.abs(a),
    "floorf": lambda x, a: x.floor(a),
    "ceilf": lambda x, a: x.ceil(a),
    "rintf": lambda x, a: x.nearbyint(a),
    "fminf": lambda x, a, b: x.Min(a, b),
    "fmaxf": lambda x, a, b: x.Max(a, b),
}


def activate(kind: str, a: Expr) -> Expr:
    """The activation functions of `qc.backends.tvm.ops.activations`."""
    from tvm import tirx as x

    half, one = x.const(0.5, "float32"), x.const(1.0, "float32")
    match kind:
        case "none":
            return a
        case "relu":
            return x.Max(a, x.const(0.0, "float32"))
        case "tanh":
            return _tanh(x, a)
        case "sigmoid":
            return _sigmoid(x, a)
        case "silu":
            return a * _sigmoid(x, a)
        case "quick_gelu":
            return a * _sigmoid(x, x.const(1.702, "float32") * a)
        case "gelu":
            return half * a * (one + erf(x, a * x.const(0.7071067811865476, "float32")))
        case "gelu_tanh":
            inner = x.const(0.7978845608028654, "float32") * (a + x.const(0.044715, "float32") * a * a * a)
            return half * a * (one + _tanh(x, inner))
        case _:
            raise ValueError(kind)
