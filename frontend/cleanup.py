"""Clean-up of an imported graph: no-ops and duplicates out, names and shapes in. Nothing is optimized or folded.

Equal initializers are deliberately *not* merged: two norm gains that happen to hold the same numbers belong to two
layers, and a later pass that folds a scale into one of them must not change the other.
"""

from __future__ import annotations

import ast
import contextlib
import os
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["SCOPE", "all_graphs", "clean", "compact_metadata", "infer_shapes"]

SCOPE = "qc.scope"
"""Node metadata: path of the module that a node came from, e.g. ``model.layers.3.mlp.down_proj``."""

_FOREIGN = ("pkg.", "namespace")


def clean(model: ir.Model) -> None:
    """Removes identities, common subexpressions and dead nodes, sorts and names every value, in place.

    No tensor is read, so weights may still be placeholders.
    """
    for step in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        common.NameFixPass(),
    ):
        step(model)


def infer_shapes(model: ir.Model) -> None:
    """Runs ONNX shape inference with the big tensors stripped; a graph it cannot handle keeps the shapes it has.

    Small weights are read, so all must be bound.
    """
    with _quiet():
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def compact_metadata(model: ir.Model, prefix: str) -> None:
    """Replaces an exporter's metadata (stack traces, file paths, reprs) by the module path, ``qc.scope``.

    Args:
        model: Changed in place.
        prefix: Leading module path to drop, the name under which a wrapper holds the model (``"net"``).
    """
    model.metadata_props.clear()
    for graph in all_graphs(model):
        _drop(graph.metadata_props)
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            _drop(value.metadata_props)
        for node in graph:
            scope = _scope(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""), prefix)
            _drop(node.metadata_props)
            if scope:
                node.metadata_props[SCOPE] = scope
            for value in node.outputs:
                _drop(value.metadata_props)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """Yields the main graph, every function and every subgraph."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function
        yield from function.subgraphs()


def _scope(literal: str, prefix: str) -> str:
    # The list is the chain of modules from the root, each a full path, and last the name of the traced operation.
    try:
        scopes = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        return ""
    path = scopes[-2] if isinstance(scopes, list) and len(scopes) > 1 else ""
    return path.removeprefix(prefix).removeprefix(".")


def _drop(properties: dict[str, str]) -> None:
    for key in [k for k in properties if k.startswith(_FOREIGN)]:
        del properties[key]


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
