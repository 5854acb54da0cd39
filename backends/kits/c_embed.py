"""How the C kit makes one vector of a sentence: which arrays the model takes, and what becomes of those it yields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qc.backends.kits.facts import Facts
from qc.ir.model import Port

__all__ = ["embedding"]

_ROLES = {
    "tokens": "tokens.data()",
    "mask": "ones.data()",
    "positions": "places.data()",
    "token_types": "zeros.data()",
}

_POOLING = {
    "mean": "for (size_t i = 0; i < count * WIDTH; i++) vector[i % WIDTH] += made[i] / static_cast<float>(count);",
    "max": """vector.assign(made.begin(), made.begin() + WIDTH);
    for (size_t i = 0; i < count * WIDTH; i++) vector[i % WIDTH] = std::max(vector[i % WIDTH], made[i]);""",
    "cls": "vector.assign(made.begin(), made.begin() + WIDTH);",
    "lasttoken": "vector.assign(made.end() - WIDTH, made.end());",
}

_METHOD = """
  // The vector of a sentence; two are as alike as their product is large.
  std::vector<float> embed(std::vector<int64_t> tokens) {
    if (tokens.size() > LIMIT) tokens = shortened(tokens, LIMIT);
    const size_t count = tokens.size();
    const std::vector<int64_t> ones(count, 1), zeros(count, 0);
    std::vector<int64_t> places(count);
    for (size_t i = 0; i < count; i++) places[i] = static_cast<int64_t>(i);
BUFFERS
    run({DIMS}, {INPUTS}, {OUTPUTS});
    std::vector<float> vector(WIDTH, 0.0f);
    POOL
    return vector;
  }

  // Without what is too long, but with the last token.
  static std::vector<int64_t> shortened(const std::vector<int64_t> &tokens, size_t limit) {
    std::vector<int64_t> kept(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(limit));
    kept.back() = tokens.back();
    return kept;
  }
"""

_NORMALIZE = """
    float size = 0;
    for (float x : vector) size += x * x;
    for (float &x : vector) x /= std::max(std::sqrt(size), 1e-12f);"""

_UNLIMITED = 1 << 30


def embedding(facts: Facts, directory: Path) -> str | None:
    """The method of an instance that embeds; None if the model does something else, or takes more than integers."""
    inputs, outputs = facts.signature.inputs, facts.signature.outputs
    made = facts.signature.output("embedding") or facts.signature.output("hidden")
    tokens = facts.signature.input("tokens")
    plain = all(p.role in _ROLES and p.dtype == ir.DataType.INT64 for p in inputs)
    if facts.task != "embed" or made is None or tokens is None or not plain or len(tokens.shape) != 2:
        return None
    sizes = dict(zip(tokens.shape, ("1", "static_cast<int64_t>(count)"), strict=True))
    dims = json.loads((directory / "model.json").read_text("utf-8"))["dimensions"]
    widths = [_size(p, sizes) for p in outputs]
    width = made.shape[-1]
    if any(d not in sizes for d in dims) or None in widths or not isinstance(width, int):
        return None
    whole = made.role == "embedding"
    pool = "vector = made;" if whole else _POOLING.get(facts.pooling, _POOLING["lasttoken"])
    names = ["made" if p is made else f"other{i}" for i, p in enumerate(outputs)]
    filled: Mapping[str, str] = {
        "LIMIT": str(facts.limit or _UNLIMITED),
        "BUFFERS": "\n".join(
            f"    std::vector<{'float' if p.dtype == ir.DataType.FLOAT else 'int64_t'}> {n}({size});"
            for p, n, size in zip(outputs, names, widths, strict=True)
        ),
        "DIMS": ", ".join(sizes[d] for d in dims),
        "INPUTS": ", ".join(_ROLES[p.role] for p in inputs),
        "OUTPUTS": ", ".join(f"{n}.data()" for n in names),
        "POOL": pool + (_NORMALIZE if facts.normalize and not whole else ""),
        "WIDTH": str(width),
    }
    text = _METHOD
    for name, value in filled.items():
        text = text.replace(name, value)
    return text


def _size(port: Port, sizes: Mapping[object, str]) -> str | None:
    """The number of elements of an output, in C++."""
    if port.dtype not in (ir.DataType.FLOAT, ir.DataType.INT64) or any(
        isinstance(d, str) and d not in sizes for d in port.shape
    ):
        return None
    counted = ["count"] if any(isinstance(d, str) and sizes[d] != "1" for d in port.shape) else []
    return " * ".join([*counted, str(math.prod(d for d in port.shape if isinstance(d, int)))])
