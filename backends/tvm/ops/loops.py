"""Element by element: loops in C over broadcast operands. Copies, too: how every view becomes a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from qc.backends.tvm.lower import Lowering
from qc.backends.tvm.program import C_TYPES, Tensor
from qc.backends.tvm.shapes import Dim, dim, largest

__all__ = ["broadcast", "copy", "fill", "loop"]


def broadcast(at: Lowering, shapes: Sequence[Sequence[Dim]]) -> tuple[Dim, ...]:
    """The shape that shapes broadcast to."""
    rank = max(len(s) for s in shapes)
    found = []
    for axis in range(rank):
        sizes = [s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0]
        wide = [s for s in sizes if s != dim(1)]
        known = [s for s in wide if s.constant is not None]
        found.append(known[0] if known else _widest(wide))
    return tuple(found)


def _widest(sizes: Sequence[Dim]) -> Dim:
    found = sizes[0] if sizes else dim(1)
    for size in sizes[1:]:
        found = largest(found, size)
    return found


def loop(at: Lowering, expression: str, inputs: Sequence[Tensor], y: Tensor) -> None:
    """``y = expression(a, b, ...)`` with the inputs broadcast to y, which has no gaps."""
    inputs = [at.stored(x) for x in inputs]
    rank = max(1, len(y.shape))
    kinds = [C_TYPES[x.dtype][0] for x in inputs]
    out = C_TYPES[y.dtype][0]
    name = _function(at, expression, kinds, out, rank)
    shape = y.shape or (dim(1),)
    steps = [s for x in inputs for s in _strides(x, shape)]
    pointers = ", ".join([*(x.c for x in inputs), y.c])
    sizes, jumps = ", ".join(s.c for s in shape), ", ".join(steps) or "0"
    at.program.add(f"{name}({pointers}, DIMS({sizes}), DIMS({jumps}));", inputs, [y])


def _strides(x: Tensor, shape: Sequence[Dim]) -> list[str]:
    missing = len(shape) - len(x.shape)
    found = ["0"] * missing
    for size, stride, wanted in zip(x.shape, x.strides, shape[missing:], strict=True):
        if size == wanted:
            found.append(stride.c)
        elif size.constant is not None:
            found.append("0")
        else:  # whether this axis repeats is known when the library runs
            found.append(f"({size.c} == 1 ? 0 : {stride.c})")
    return found


def _function(at: Lowering, expression: str, kinds: Sequence[str], out: str, rank: int) -> str:
    names = "abcd"[: len(kinds)]
    digest = hashlib.sha256(repr((expression, kinds, out, rank)).encode()).hexdigest()[:8]
    name = f"loop_{digest}"
    last = rank - 1
    parameters = "".join(f"const {k} *{n}, " for k, n in zip(kinds, names, strict=True))
    lines = [f"static void {name}({parameters}{out} *y, const int64_t *n, const int64_t *s) {{"]
    lines += [f"{'  ' * (a + 1)}for (int64_t i{a} = 0; i{a} < n[{a}]; i{a}++)" for a in range(last)]
    pad = "  " * rank
    lines.append(pad + "{")
    for j, (kind, n) in enumerate(zip(kinds, names, strict=True)):
        terms = "".join(f" + i{axis} * s[{j * rank + axis}]" for axis in range(last))
        lines.append(f"{pad}  const {kind} *p{n} = {n}{terms}; const int64_t s{n} = s[{j * rank + last}];")

    def body(index: Callable[[str], str]) -> str:
        return expression.format(**{n: f"p{n}[{index(n)}]" for n in names})

    ones = " && ".join(f"s{n} == 1" for n in names)
    lines += [
        f"{pad}  if ({ones or '1'}) for (int64_t i = 0; i < n[{last}]; i++) y[i] = ({out})({body(lambda n: 'i')});",
        f"{pad}  else for (int64_t i = 0; i < n[{last}]; i++) y[i] = ({out})({body(lambda n: f'i * s{n}')});",
        f"{pad}  y += n[{last}];",
        pad + "}",
        "}",
    ]
    at.program.functions[name] = "\n".join(lines)
    return name


def copy(at: Lowering, x: Tensor, y: Tensor) -> Tensor:
    """Copies elements to a tensor of the same shape, which may have gaps; returns it."""
    x = at.stored(x)
    if y.contiguous:
        loop(at, "{a}", [x], y)
        return y
    kind, rank = C_TYPES[x.dtype][0], len(y.shape)
    name = f"copy_{kind}_{rank}"
    lines = [f"static void {name}(const {kind} *x, {kind} *y, const int64_t *n, const int64_t *s, const int64_t *t) {{"]
    lines += [f"  for (int64_t i{a} = 0; i{a} < n[{a}]; i{a}++)" for a in range(rank)]
    source, target = (" + ".join(f"i{a} * {v}[{a}]" for a in range(rank)) for v in "st")
    lines += [f"    y[{target}] = x[{source}];", "}"]
    at.program.functions[name] = "\n".join(lines)
    sizes, steps, jumps = (
        ", ".join(values) for values in ([d.c for d in y.shape], _strides(x, y.shape), [d.c for d in y.strides])
    )
    at.program.add(f"{name}({x.c}, {y.c}, DIMS({sizes}), DIMS({steps}), DIMS({jumps}));", [x], [y])
    return y


def fill(at: Lowering, y: Tensor, value: str) -> None:
    """Sets every element."""
    kind = C_TYPES[y.dtype][0]
    at.program.add(f"{{ {kind} *p = {y.c}; for (int64_t i = 0; i < {y.elements.c}; i++) p[i] = {value}; }}", [], [y])
