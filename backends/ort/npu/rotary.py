"""Rotations of positions as products with tables that are looked up outside."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer, finished
from qc.backends.ort.npu.outside import may_stay_outside, put_outside
from qc.passes.base import Contract, Exact, Pass, Result
from qc.passes.canonicalize._graph import Decline, attribute, main_nodes, replace, rewritten

__all__ = ["WriteOutRotary"]


@dataclasses.dataclass(frozen=True)
class WriteOutRotary(Pass):
    """Replaces ``RotaryEmbedding(x, cos, sin, positions)`` by ``cos' * x + sin' * turned(x)``.

    With the halves ``x = [a, b, rest]`` of the channels that rotate: ``turned(x) = [b, a, rest]``,
    ``cos' = [cos, cos, 1]``, ``sin' = [-sin, sin, 0]``; interleaved channels are turned pair by pair. Exact. Left
    alone: heads that are not separate, and widths that are not known.
    """

    contract: ClassVar[Contract] = Exact(1e-5)

    def call(self, model: ir.Model, context: object = None) -> Result:
        tables: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
        nodes = main_nodes(model, "RotaryEmbedding")
        return finished(model, rewritten(nodes, lambda node: _turn(model.graph, node, tables)))


def _turn(graph: ir.Graph, node: ir.Node, tables: dict[tuple[object, ...], tuple[ir.Value, ir.Value]]) -> None:
    x, cos, sin, positions = (*node.inputs, None)[:4]
    if x.shape is None or x.shape.rank() != 4 or not isinstance(x.shape[3], int):
        raise Decline("its heads are not separate, or their width is not known")
    half = cos.shape[-1] if cos.shape is not None else None
    if not isinstance(half, int):
        raise Decline("the number of channels that rotate is not known")
    width, interleaved = x.shape[3], bool(attribute(node, "interleaved", 0))
    write = Writer(graph, node)
    key = (cos, sin, positions, width, interleaved)
    if key not in tables:
        tables[key] = _tables(write, cos, sin, positions, width, interleaved=interleaved)
    wide_cos, wide_sin = tables[key]
    turned = _turned(write, x, half, interleaved=interleaved)
    # Tables first: the simulator of QNN 2.7 multiplies a normalized value wrongly with one that is an input behind it.
    write.add("Add", write.add("Mul", wide_cos, x), write.add("Mul", wide_sin, turned))
    replace(node.outputs[0], write.nodes, like=node)


def _tables(
    write: Writer, cos: ir.Value, sin: ir.Value, positions: ir.Value | None, width: int, *, interleaved: bool
) -> tuple[ir.Value, ir.Value]:
    """``cos'`` and ``sin'`` ``[B, 1, S, D]`` of the positions at hand."""
    half, found = cos.shape[-1], []
    for table, sign, rest in ((cos, 1.0, 1.0), (sin, -1.0, 0.0)):
        looked_up = table if positions is None else write.add("Gather", table, positions, axis=0)
        shape = positions.shape if positions is not None else table.shape[:-1]
        other = looked_up if sign > 0 else write.add("Neg", looked_up)
        if interleaved:
            axis = write.integers("last", -1)
            pairs = write.add("Concat", *(write.add("Unsqueeze", v, axis) for v in (other, looked_up)), axis=-1)
            wide = write.add("Reshape", pairs, write.integers("pairs", 0, 0, 2 * half))
        else:
            wide = write.add("Concat", other, looked_up, axis=-1)
        if width > 2 * half:
            fill = write.constant("rest", np.array([0, 0, 0, 0, 0, width - 2 * half], np.int64))
            wide = write.add("Pad", wide, fill, write.constant("fill", np.array(rest, np.float32)))
        wide = write.add("Unsqueeze", wide, write.integers("heads_axis", 1))
        wide.shape = ir.Shape([shape[0], 1, shape[1], width])
        if may_stay_outside(wide):
            put_outside(wide)
        found.append(wide)
    return found[0], found[1]


def _turned(write: Writer, x: ir.Value, half: int, *, interleaved: bool) -> ir.Value:
    width = x.shape[3]
    if interleaved:
        order = np.arange(width)
        order[: 2 * half] = order[: 2 * half].reshape(-1, 2)[:, ::-1].reshape(-1)
        return write.add("Gather", x, write.constant("pairs_turned", order.astype(np.int64)), axis=3)
    axis = write.integers("channels", 3)
    ends = [(half, 2 * half), (0, half), (2 * half, width)]
    parts = [
        write.add("Slice", x, write.integers("start", a), write.integers("end", b), axis) for a, b in ends if a < b
    ]
    return write.add("Concat", *parts, axis=3)
