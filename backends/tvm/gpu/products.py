"""Matrix products for GPUs: expressions of TE that dlight schedules, weights decoded as they are loaded.

Sums are in float32. One row of activations becomes a product of a matrix and a vector, several a tiled product. What
follows a product (bias, residual, activation) is computed with its sums at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qc.backends.tvm.gpu.expressions import activate
from qc.backends.tvm.gpu.weights import Words

__all__ = ["batched", "linear"]


def linear(
    name: str, words: Words | None, rows: int, columns: int, one: bool, bias: bool, residual: bool, kind: str
) -> Any:
    """``y = activation(x @ w.T + bias + r)`` with a weight in words, or in float; `one`: x has one row."""
    from tvm import te

    m: Any = 1 if one else te.var("m", "int32")
    x = te.placeholder((m, columns), "float32", name="x")
    held, weight = _weight(words, rows, columns)
    extra = {}
    if bias:
        extra["bias"] = te.placeholder((rows,), "float32", name="bias")
    if residual:
        extra["r"] = te.placeholder((m, rows), "float32", name="r")
    c = te.reduce_axis((0, columns), name="c")
    last = not bias and not residual and kind == "none"
    y = te.compute((m, rows), lambda i, n: te.sum(x[i, c] * weight[n, c], axis=c), name="y" if last else "sums")
    if not last:
        product = y

        def finished(i: Any, n: Any) -> Any:
            value = product[i, n]
            value = value + extra["bias"][n] if bias else value
            value = value + extra["r"][i, n] if residual else value
            return activate(kind, value)

        y = te.compute((m, rows), finished, name="y")
    return _function(name, {"x": x, **held, "y": y, **extra})


def _weight(words: Words | None, rows: int, columns: int) -> tuple[dict[str, Any], Any]:
    """The parameters of a weight, and its values."""
    from tvm import te

    if words is None:
        weight = te.placeholder((rows, columns), "float32", name="w")
        return {"w": weight}, weight
    held = {n: te.placeholder(s, words.pointers[n], name=n) for n, s in words.shapes(rows, columns).items()}

    def get(parameter: str, *place: Any) -> Any:
        return held[parameter][place]

    return held, te.compute((rows, columns), lambda n, c: words.value(get, n, c), name="decoded")


def batched(name: str) -> Any:
    """``y[b] = a[b] @ b[b]``, all sizes known when it runs."""
    from tvm import te

    batch, m, n, columns = (te.var(v, "int32") for v in ("batch", "m", "n", "columns"))
    a = te.placeholder((batch, m, columns), "float32", name="a")
    b = te.placeholder((batch, columns, n), "float32", name="b")
    c = te.reduce_axis((0, columns), name="c")
    y = te.compute((batch, m, n), lambda i, j, k: te.sum(a[i, j, c] * b[i, c, k], axis=c), name="y")
    return _function(name, {"a": a, "b": b, "y": y})


def _function(name: str, parameters: Mapping[str, Any]) -> Any:
    from tvm import te

    function = te.create_prim_func(list(parameters.values()))
    return function.with_attr("tirx.noalias", True).with_attr("global_symbol", name)
