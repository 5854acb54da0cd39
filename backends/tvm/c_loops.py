"""C functions that go through elements: what no kernel does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from qc.backends.tvm.host import template

__all__ = [
    "GRID_PADDING",
    "REDUCTIONS",
    "RESIZE_PLACES",
    "RESIZE_VALUES",
    "UPDATES",
    "copy_function",
    "indexed_function",
    "loop_function",
    "reduce_function",
]

REDUCTIONS = {
    "ReduceSum": ("0", "t += {x}", "t"),
    "ReduceMean": ("0", "t += {x}", "t / (float)count"),
    "ReduceMax": ("{lowest}", "if ({x} > t) t = {x}", "t"),
    "ReduceMin": ("{highest}", "if ({x} < t) t = {x}", "t"),
    "ReduceProd": ("1", "t *= {x}", "t"),
    "ReduceL2": ("0", "t += {x} * {x}", "sqrtf(t)"),
    "ReduceSumSquare": ("0", "t += {x} * {x}", "t"),
}
"""How a total starts, takes an element in, and becomes the result."""

_WHOLE = {"ReduceMean": "count == 0 ? 0 : t / count", "ReduceL2": "({kind})sqrt((double)t)"}
"""How a total of integers becomes the result, where not as one of floats does."""

RESIZE_PLACES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
RESIZE_VALUES = ("linear", "round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
"""Where elements of a larger or smaller axis lie, and what they are: numbered as in ``host/resize.c``."""

GRID_PADDING = ("zeros", "border", "reflection")
"""What lies beyond images: numbered as in ``host/grid_sample.c``."""

UPDATES = {
    "none": "{b}",
    "add": "{a} + {b}",
    "mul": "{a} * {b}",
    "min": "{b} < {a} ? {b} : {a}",
    "max": "{b} > {a} ? {b} : {a}",
}
"""What becomes of an element a, and of b which comes to its place."""

_ENDS = {
    "float": ("-INFINITY", "INFINITY"), "int64_t": ("INT64_MIN", "INT64_MAX"), "int32_t": ("INT32_MIN", "INT32_MAX"),
    "int8_t": ("INT8_MIN", "INT8_MAX"), "uint8_t": ("0", "UINT8_MAX"),
}  # fmt: skip
"""The lowest and the highest number of a type: what the extremes of no numbers are."""


def loop_function(expression: str, kinds: Sequence[str], out: str, rank: int) -> tuple[str, str]:
    """Name and text of ``y = expression(a, b, ...)``, each operand with a stride per axis, y without gaps."""
    names = "abcd"[: len(kinds)]
    digest = hashlib.sha256(repr((expression, kinds, out, rank)).encode()).hexdigest()[:8]
    name = f"loop_{digest}"
    last = rank - 1
    parameters = "".join(f"const {k} *{n}, " for k, n in zip(kinds, names, strict=True))
    lines = [f"static void {name}({parameters}{out} *y, const int64_t *n, const int64_t *s) {{"]
    lines += [] if kinds else ["  (void)s;"]
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
    return name, "\n".join(lines)


def copy_function(kind: str, rank: int) -> tuple[str, str]:
    """Name and text of a copy between tensors that both have a stride per axis."""
    name = f"copy_{kind}_{rank}"
    lines = [f"static void {name}(const {kind} *x, {kind} *y, const int64_t *n, const int64_t *s, const int64_t *t) {{"]
    lines += [f"  for (int64_t i{a} = 0; i{a} < n[{a}]; i{a}++)" for a in range(rank)]
    source, target = (" + ".join(f"i{a} * {v}[{a}]" for a in range(rank)) for v in "st")
    lines += [f"    y[{target}] = x[{source}];", "}"]
    return name, "\n".join(lines)


def reduce_function(kind: str, ctype: str, kept: int, rank: int) -> tuple[str, str]:
    """Name and text of a reduction of the axes behind the first `kept`."""
    start, step, end = REDUCTIONS[kind]
    end = end if ctype == "float" else _WHOLE.get(kind, end).format(kind=ctype)
    name = f"{kind}_{ctype}_{kept}_{rank}"
    lines = [f"static void {name}(const {ctype} *x, {ctype} *y, const int64_t *n, const int64_t *s) {{"]
    terms = " + ".join(f"i{a} * s[{a}]" for a in range(kept)) or "0"
    lines += [f"  for (int64_t i{a} = 0; i{a} < n[{a}]; i{a}++)" for a in range(kept)]
    lowest, highest = _ENDS[ctype]
    start = start.format(lowest=lowest, highest=highest)
    lines += [f"  {{ const {ctype} *r = x + {terms}; {ctype} t = {start}; int64_t count = 1;"]
    lines += [f"    count *= n[{a}];" for a in range(kept, rank)]
    lines += [f"    for (int64_t i{a} = 0; i{a} < n[{a}]; i{a}++)" for a in range(kept, rank)]
    inner = " + ".join(f"i{a} * s[{a}]" for a in range(kept, rank)) or "0"
    lines += [f"      {{ {step.format(x=f'r[{inner}]')}; }}", f"    (void)count; *y++ = {end}; }}", "}"]
    return name, "\n".join(lines)


def indexed_function(walk: str, step: str, kind: str) -> tuple[str, str]:
    """Name and text of a function that goes through indices, of ``elements`` or ``slices``.

    Each step takes an element from its place ("gather"), or brings one there, as one of `UPDATES` says.
    """
    done = "y[i] = x[at]" if step == "gather" else f"y[at] = {UPDATES[step].format(a='y[at]', b='x[i]')}"
    name = f"{walk}_{step}_{kind}"
    text = template(f"{walk}.c").replace("@NAME@", name).replace("@KIND@", kind).replace("@STEP@", done)
    return name, text.rstrip()
