"""Sizes that are known when a library runs: polynomials of the model's symbolic dimensions, spelled in C."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

__all__ = [
    "Dim",
    "Size",
    "bounded",
    "c_name",
    "dim",
    "divide",
    "largest",
    "listed",
    "product",
    "scaled",
    "smallest",
    "spelled",
    "stride_of",
    "wider",
]

_ALL = 1 << 30
"""A limit that stands for the end of any axis."""

Monomial = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dim:
    """A sum of products of symbols; a symbol may itself be a C expression such as ``qc_min(a, b)``.

    Attributes:
        terms: Coefficients by sorted symbols, none of them zero; ``()`` stands for the constant.
    """

    terms: tuple[tuple[Monomial, int], ...] = ()

    @staticmethod
    def of(terms: Mapping[Monomial, int]) -> Dim:
        """Builds one from coefficients."""
        return Dim(tuple(sorted((m, c) for m, c in terms.items() if c)))

    @property
    def constant(self) -> int | None:
        """Its value, or None if it depends on a symbol."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def calls(self) -> bool:
        """Whether it takes a function to compute it."""
        return any("(" in symbol for m, _ in self.terms for symbol in m)

    def __add__(self, other: Size) -> Dim:
        terms = dict(self.terms)
        for m, c in dim(other).terms:
            terms[m] = terms.get(m, 0) + c
        return Dim.of(terms)

    def __mul__(self, other: Size) -> Dim:
        terms: dict[Monomial, int] = {}
        for m, c in self.terms:
            for n, d in dim(other).terms:
                key = tuple(sorted((*m, *n)))
                terms[key] = terms.get(key, 0) + c * d
        return Dim.of(terms)

    def __sub__(self, other: Size) -> Dim:
        return self + dim(other) * -1

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Size) -> Dim:
        return dim(other) - self

    @property
    def c(self) -> str:
        """The C expression, which may stand anywhere in another."""
        if not self.terms:
            return "0"
        parts = [[*([str(c)] if c != 1 or not m else []), *m] for m, c in self.terms]
        text = " + ".join(" * ".join(factors) for factors in parts)
        return f"({text})" if len(parts) > 1 or len(parts[0]) > 1 else text


Size = int | Dim


def dim(value: Size | str) -> Dim:
    """A size from an int, a symbol or a size."""
    if isinstance(value, Dim):
        return value
    return Dim.of({(value,): 1}) if isinstance(value, str) else Dim.of({(): int(value)})


def listed(sizes: Sequence[Size]) -> str:
    """An array of sizes in C."""
    return f"DIMS({', '.join(dim(s).c for s in sizes) or '1'})"


def product(sizes: Iterable[Size]) -> Dim:
    """The product of all sizes."""
    found = dim(1)
    for size in sizes:
        found = found * size
    return found


def divide(a: Size, b: Size) -> Dim:
    """``floor(a / b)`` of a positive b; exact where every term is a multiple, or b is one of its factors."""
    a, b = dim(a), dim(b)
    if a.constant is not None and b.constant:
        return dim(a.constant // b.constant)
    if a == b:
        return dim(1)
    if len(b.terms) == 1:
        (factors, number), terms = b.terms[0], {}
        for m, c in a.terms:
            left = list(m)
            for symbol in factors:
                if symbol not in left:
                    break
                left.remove(symbol)
            else:
                if c % number == 0:
                    terms[tuple(left)] = c // number
                    continue
            break
        else:
            return Dim.of(terms)
    return dim(f"qc_div({a.c}, {b.c})")


def largest(a: Size, b: Size) -> Dim:
    """The larger size."""
    a, b = dim(a), dim(b)
    if a.constant is not None and b.constant is not None:
        return dim(max(a.constant, b.constant))
    return a if a == b or (b == dim(0) and "-" not in a.c) else dim(f"qc_max({a.c}, {b.c})")


def smallest(a: Size, b: Size) -> Dim:
    """The smaller size."""
    a, b = dim(a), dim(b)
    if a.constant is not None and b.constant is not None:
        return dim(min(a.constant, b.constant))
    return a if a == b else dim(f"qc_min({a.c}, {b.c})")


def scaled(size: Size, scale: np.float32) -> Dim:
    """``floor(size * scale)``, multiplied in float32."""
    size = dim(size)
    if size.constant is not None:
        return dim(int(np.float32(size.constant) * scale))
    whole = int(scale)
    return size * whole if whole == scale else dim(f"qc_scaled({size.c}, {float(scale)!r})")


def wider(a: Size, b: Size) -> Dim:
    """What two sizes broadcast to."""
    a, b = dim(a), dim(b)
    if a.constant is not None:
        return b if a.constant == 1 else a
    if b.constant is not None:
        return a if b.constant == 1 else b
    parts = sorted({*_parts(a), *_parts(b)}, key=lambda size: size.c)
    if len(parts) == 1:
        return a
    symbol = _Wide(functools.reduce(lambda text, size: f"qc_wide({text}, {size.c})", parts[1:], parts[0].c))
    symbol.parts = tuple(parts)
    return dim(symbol)


class _Wide(str):
    """What several sizes broadcast to; it remembers them, each once, so that it does not grow where they come again."""

    __slots__ = ("parts",)
    parts: tuple[Dim, ...]


def _parts(size: Dim) -> tuple[Dim, ...]:
    symbol = size.terms[0][0][0] if len(size.terms) == 1 and len(size.terms[0][0]) == 1 else ""
    return symbol.parts if isinstance(symbol, _Wide) and size == dim(symbol) else (size,)


def bounded(value: Size, size: Size) -> Dim:
    """A limit of a slice within ``[0, size]``; a negative one counts from the end."""
    value, size = dim(value), dim(size)
    if value == size or (value.constant is not None and value.constant >= _ALL):
        return size
    if value == dim(0):
        return value
    if value.constant is not None and size.constant is not None:
        return dim(min(max(value.constant + (size.constant if value.constant < 0 else 0), 0), size.constant))
    return dim(f"qc_bound({value.c}, {size.c})")


def spelled(text: str, names: Mapping[str, str]) -> Dim | None:
    """The size that the name of a dimension, or a sum of products of such names, stands for; None if it is no such."""
    if text in names:
        return dim(names[text])
    try:
        return _value(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, KeyError):
        return None


def _value(node: ast.AST, names: Mapping[str, str]) -> Dim:
    match node:
        case ast.Constant(value=int(number)):
            return dim(number)
        case ast.Name(id=name):
            return dim(names[name])
        case ast.BinOp(left=a, op=op, right=b):
            return _OPERATIONS[type(op)](_value(a, names), _value(b, names))
    raise KeyError(node)


_OPERATIONS: dict[type, Callable[[Dim, Dim], Dim]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def stride_of(size: Size, stride: Size) -> Dim:
    """The stride of an axis along which an operand repeats if its size is 1, which may be known only in a run."""
    size, stride = dim(size), dim(stride)
    if size.constant is not None:
        return dim(0) if size.constant == 1 else stride
    return dim(f"qc_step({size.c}, {stride.c})")


def c_name(text: str, taken: Iterable[str] = ()) -> str:
    """A C identifier for a symbolic dimension that differs from those taken in more than the case of letters."""
    name = f"d_{re.sub(r'[^A-Za-z0-9_]', '_', text)}"
    used = {t.lower() for t in taken}
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return name if name.lower() not in used else next(n for n in numbered if n.lower() not in used)
