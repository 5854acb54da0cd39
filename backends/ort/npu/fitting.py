"""What runs on the processor around the graphs of fixed shapes, so that a program only passes tensors on.

Some languages cannot make a tensor of 16-bit codes or halves. So nothing outside of a graph ever does: masks and
rotations come out of the outer graph at the shapes that the inner ones take, and two small graphs keep the caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu._writer import Writer
from qc.backends.ort.npu.outside import OUTSIDE, padding
from qc.ir.model import Model
from qc.passes.canonicalize._graph import add_constant

__all__ = ["LENGTH", "NEXT", "PAST", "Fitting", "cache_graphs"]

PAST = "past_length"
"""Name of the input of the outer graph that tells how many positions the cache holds."""

LENGTH = "graph_length"
"""Name of the input that tells how many new positions the inner graph takes, if there are several."""

NEXT = ".next"
"""Behind the name of a cache: what it is after a run."""

_COUNT = "count"
"""Name of the input that tells how many of the new positions are true."""

_END = np.iinfo(np.int64).max


class Fitting:
    """Pads values to the shapes of the inner graphs: positions of the cache and new ones keep their beginnings.

    Attributes:
        length: The number of new positions, an input or a constant.
    """

    def __init__(self, graph: ir.Graph, past: ir.Value, cache: int, lengths: Sequence[int]) -> None:
        """Takes notes.

        Args:
            graph: The outer graph.
            past: Its input `PAST`.
            cache: Positions that the cache holds.
            lengths: New positions that each inner graph takes.
        """
        self._graph, self._past, self._cache = graph, past, cache
        if len(set(lengths)) > 1:
            self.length = ir.Value(name=LENGTH, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        else:
            self.length = add_constant(graph, LENGTH, ir.tensor(np.array([lengths[0]], np.int64)))

    def fitted(self, value: ir.Value, axes: Sequence[str]) -> ir.Value:
        """A value whose axes mean `axes` at the fixed shape, under its name."""
        node = value.producer()
        assert node is not None
        write, held = Writer(self._graph, node), value
        behind = write.constant("behind", np.array(padding(value), value.dtype.numpy()))
        for axis, meaning in enumerate(axes):
            if meaning == "new":
                held = _padded(write, held, behind, axis, self.length)
            elif meaning == "all":
                ends = [write.integers(f"{name}_{axis}", n) for name, n in (("from", 0), ("to", _END), ("axis", axis))]
                head = write.add("Slice", held, ends[0], self._past, ends[2])
                tail = write.add("Slice", held, self._past, ends[1], ends[2])
                cache = write.integers(f"cache_{axis}", self._cache)
                parts = (_padded(write, p, behind, axis, n) for p, n in ((head, cache), (tail, self.length)))
                held = write.add("Concat", *parts, axis=axis)
        if held is value:
            return value
        self._graph.extend(write.nodes)
        held.name, value.name = value.name, f"{value.name}.true"
        held.metadata_props[OUTSIDE] = value.metadata_props.pop(OUTSIDE)
        held.shape = ir.Shape([None] * len(axes))
        return held


def _padded(write: Writer, x: ir.Value, behind: ir.Value, axis: int, size: ir.Value) -> ir.Value:
    number = ir.DataType.INT64
    before, found = (write.add("Shape", x, dtype=number, start=a, end=b) for a, b in ((0, axis), (axis, axis + 1)))
    after = write.add("Shape", x, dtype=number, start=axis + 1)
    shape = write.add("Concat", before, write.add("Sub", size, found), after, axis=0)
    return write.add("Concat", x, write.add("Expand", behind, shape), axis=axis)


def cache_graphs(caches: Mapping[str, str], held: Mapping[str, ir.Value], axes: Mapping[str, int]) -> list[Model]:
    """The graph that yields the caches of a text that has not begun, and the one that puts new positions behind.

    Args:
        caches: Inputs of an inner graph that are caches, with the outputs that the new positions come in.
        held: These inputs, by name.
        axes: The axis of each along which positions lie.

    Returns:
        ``() -> past`` with zeros, and ``(past, present, past_length, count) -> past.next``.
    """
    empty = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="empty")
    append = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="append")
    number = ir.TensorType(ir.DataType.INT64)
    counts = [ir.Value(name=n, type=number, shape=ir.Shape([1])) for n in (PAST, _COUNT)]
    past, count = counts
    end = ir.node("Add", [past, count])
    end.outputs[0].name = "end"
    append.extend([end])
    for name, present in caches.items():
        cache, axis = held[name], axes[name]
        shape = add_constant(empty, f"{name}.shape", ir.tensor(np.array(list(cache.shape), np.int64)))
        zero = ir.tensor(np.zeros(1, cache.dtype.numpy()))
        zeros = ir.node("ConstantOfShape", [shape], {"value": zero})
        _yields(empty, zeros, name, cache)
        open_shape = ir.Shape([None if i == axis else d for i, d in enumerate(cache.shape)])
        old = ir.Value(name=name, type=cache.type, shape=cache.shape)
        new = ir.Value(name=present, type=cache.type, shape=open_shape)
        append.inputs.extend([old, new])
        numbers = (("from", 0), ("to", _END), ("axis", axis))
        start, last, along = (
            add_constant(append, f"{name}.{n}", ir.tensor(np.array([i], np.int64))) for n, i in numbers
        )
        parts = [
            ir.node("Slice", [x, a, b, along])
            for x, a, b in ((old, start, past), (new, start, count), (old, end.outputs[0], last))
        ]
        for part, which in zip(parts, ("before", "new", "behind"), strict=True):
            part.outputs[0].name = f"{name}.{which}"
        append.extend(parts)
        _yields(append, ir.node("Concat", [p.outputs[0] for p in parts], {"axis": axis}), f"{name}{NEXT}", cache)
    append.inputs.extend(counts)
    return [Model.of(ir.Model(g, ir_version=10)) for g in (empty, append)]


def _yields(graph: ir.Graph, node: ir.Node, name: str, like: ir.Value) -> None:
    out = node.outputs[0]
    out.name, out.type, out.shape = name, like.type, like.shape
    graph.append(node)
    graph.outputs.append(out)
