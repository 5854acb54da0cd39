"""Clean-up that changes nothing: types and shapes in, identities and repeated expressions out.

These stand in for the passes of the same purpose in ``onnx_ir``, which lose three things that a model may not lose: the
name of an output (two outputs that are one value become one name), the second of two outputs of a subgraph, and the
types of sequences and optionals.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.proto import without_weights

__all__ = ["RANDOM_OPS", "all_graphs", "drop_identities", "infer_shapes", "merge_equal"]

_PURE_DOMAINS = frozenset({"", dialect.DOMAIN})
RANDOM_OPS = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators that may yield other numbers at each run."""

_PLAIN = frozenset(
    {
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)
_SMALL = 16  # elements; larger constants may be parameters of two layers that only happen to be equal


def all_graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """Yields the main graph, every function and every subgraph."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function
        yield from function.subgraphs()


def infer_shapes(model: ir.Model) -> bool:
    """Runs ONNX type and shape inference without the large weights; what it cannot infer stays as it is.

    Returns:
        Whether anything was learned.
    """
    try:
        with _quiet():
            proto = onnx.shape_inference.infer_shapes(
                without_weights(model), check_type=False, strict_mode=False, data_prop=True
            )
    except Exception:  # noqa: BLE001  the checker of a foreign library; a graph that it cannot read keeps its shapes
        return False
    learned = False
    for graph, inferred in zip(model.graphs(), ir.serde.deserialize_model(proto).graphs(), strict=True):
        found = {v.name: v for v in _values(inferred)}
        for value in _values(graph):
            other = found.get(value.name)
            if other is None or not value.name:
                continue
            if other.type is not None and other.type != value.type:
                value.type, learned = other.type, True
            if other.shape is not None and other.shape != value.shape:
                value.shape, learned = other.shape, True
    return learned


def drop_identities(model: ir.Model) -> bool:
    """Removes ``Identity`` nodes, in subgraphs and functions too, unless an output needs them.

    One stays where it makes a graph output out of something that has a name of its own to keep: an input, a weight,
    another output, a value of an outer graph.

    Returns:
        Whether any was removed.
    """
    changed = False
    for graph in all_graphs(model):
        for node in tuple(graph):
            if node.op_type == "Identity" and node.domain == "":
                changed |= _drop_identity(graph, node)
    return changed


def merge_equal(model: ir.Model) -> bool:
    """Merges nodes of the main graph that compute the same from the same values.

    Left alone: operators with subgraphs, random ones, those of foreign domains (they may keep a state), constants of
    more than a few elements, and nodes of which each makes a graph output.

    Returns:
        Whether any were merged.
    """
    first: dict[object, ir.Node] = {}
    changed = False
    for node in tuple(model.graph):
        key = _key(node)
        if key is None:
            continue
        kept = first.setdefault(key, node)
        if kept is node or any(v.is_graph_output() for v in node.outputs):
            continue
        for old, new in zip(node.outputs, kept.outputs, strict=True):
            old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
        changed = True
    return changed


def _drop_identity(graph: ir.Graph | ir.Function, node: ir.Node) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    if source is None:
        return False
    if result.is_graph_output():
        producer = source.producer()
        if producer is None or producer.graph is not graph or source.is_graph_output():
            return False
        name, result.name = result.name, None
        source.name = name
        source.metadata_props.update(result.metadata_props)
        source.type = result.type or source.type
    source.type = source.type or result.type
    if source.shape is None:
        source.shape = result.shape
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


def _key(node: ir.Node) -> object | None:
    """Equal for two nodes only if they compute the same; None for a node that must stay."""
    if node.domain not in _PURE_DOMAINS or node.op_type in RANDOM_OPS:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if attribute.is_ref():
            return None
        if attribute.type == ir.AttributeType.TENSOR and value.size <= _SMALL and value.dtype != ir.DataType.STRING:
            value = (value.dtype, tuple(value.shape), value.tobytes())
        elif attribute.type not in _PLAIN:
            return None
        attributes.append((name, attribute.type, tuple(value) if isinstance(value, list) else value))
    # A missing output counts: it may be what makes an operator skip work, or choose its mode.
    outputs = tuple(bool(v.name) or bool(v.uses()) for v in node.outputs)
    return node.op_identifier(), tuple(map(id, node.inputs)), tuple(attributes), outputs


def _values(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from graph.inputs
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings that native shape inference prints on file descriptor 2."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
