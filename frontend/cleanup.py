"""Clean-up of an imported graph: no-ops and duplicates out, names in. Nothing is optimized or folded.

Equal initializers are deliberately *not* merged: two norm gains that happen to hold the same numbers belong to two
layers, and a later pass that folds a scale into one of them must not change the other.
"""

from __future__ import annotations

import ast

import onnx_ir as ir
from onnx_ir.passes import common

from qc.ir.simplify import all_graphs, drop_identities, merge_equal

__all__ = ["SCOPE", "clean", "compact_metadata"]

SCOPE = "qc.scope"
"""Node metadata: path of the module that a node came from, e.g. ``model.layers.3.mlp.down_proj``."""

_FOREIGN = ("pkg.", "namespace")


def clean(model: ir.Model) -> None:
    """Removes identities, common subexpressions and dead nodes, sorts and names every value, in place.

    No tensor is read, so weights may still be placeholders.
    """
    drop_identities(model)
    merge_equal(model)
    for step in (common.RemoveUnusedNodesPass(), common.TopologicalSortPass(), common.NameFixPass()):
        step(model)


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
