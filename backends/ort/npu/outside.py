"""What an NPU does not compute: masks and positions, which depend on lengths and not on activations.

They come out of a small graph of integers that runs on the processor beside the NPU, before each run, at the true
length of the text. So the NPU's graph has fixed shapes and no integer arithmetic. Its inputs are padded with zeros: the
code 0 of a mask is its lowest value, which hides a position. Only a mask of floats is padded with that value itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import read_weight

__all__ = ["OUTSIDE", "may_stay_outside", "outside_nodes", "outside_values", "padding", "put_outside"]

OUTSIDE = "qc.outside"
"""Metadata property of a value that is computed beside the NPU: what is put behind its end to fit a fixed shape."""

_COMPUTING = frozenset(
    {
        "Attention",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "GRU",
        "LSTM",
        "LayerNormalization",
        "RMSNormalization",
    }
)
_LARGEST = 1 << 22  # elements; a table of rotations for 32768 positions of 128 channels


def put_outside(value: ir.Value, padding: float = 0.0) -> None:
    """Marks a value, for which `may_stay_outside` is true."""
    value.metadata_props[OUTSIDE] = repr(padding)


def padding(value: ir.Value) -> float:
    """What is put behind the end of a marked value."""
    return float(value.metadata_props[OUTSIDE])


def outside_values(graph: ir.Graph) -> list[ir.Value]:
    """The marked values, in graph order."""
    return [v for n in graph for v in n.outputs if OUTSIDE in v.metadata_props]


def outside_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that make the marked values."""
    return _before(outside_values(graph))[0]


def may_stay_outside(value: ir.Value) -> bool:
    """Whether a value depends on nothing but inputs other than caches, on lengths and on small tables."""
    nodes, sources = _before([value])
    if any(dialect.is_op(n, "Linear") or n.op_type in _COMPUTING for n in nodes):
        return False
    for source in sources:
        if source.is_graph_input():
            cache = source.metadata_props.get("qc.role", "").startswith("past_")
            if cache and any(u.node in nodes and u.node.op_type != "Shape" for u in source.uses()):
                return False
        elif (weight := read_weight(source)) is not None and weight.tensor.size > _LARGEST:
            return False
    return True


def _before(values: Iterable[ir.Value]) -> tuple[set[ir.Node], set[ir.Value]]:
    """The nodes that make `values`, and the inputs and constants that these read.

    What only a ``Shape`` looks at is not made: lengths are known.
    """
    nodes: set[ir.Node] = set()
    sources: set[ir.Value] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            sources.add(value)
        elif node not in nodes:
            nodes.add(node)
            if node.op_type == "Shape" and node.inputs[0].producer() is not None:
                continue
            pending.extend(v for v in node.inputs if v is not None)
    return nodes, sources
