"""Clean-up of an imported graph: no-ops and duplicates out, names in. Nothing is optimized or folded.

Equal initializers are deliberately *not* merged: two norm gains that happen to hold the same numbers belong to two
layers, and a later pass that folds a scale into one of them must not change the other.
"""

from __future__ import annotations

import ast
import re

import onnx_ir as ir
from onnx_ir.passes import common

from qc.ir.simplify import all_graphs, drop_identities, merge_equal

__all__ = ["SCOPE", "clean", "compact_metadata", "name_axes"]

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


def name_axes(graph: ir.Graph) -> None:
    """Gives axes of inputs that have neither a size nor a name one of their own, so that it can be said what has it."""
    taken = {str(d.value) for v in graph.inputs for d in v.shape or () if isinstance(d, ir.SymbolicDim)}
    for value in graph.inputs:
        if value.shape is None or not value.shape.has_unknown_dim():
            continue
        value.shape = value.shape.copy()
        for axis in (a for a, size in enumerate(value.shape) if not isinstance(size, int) and size.value is None):
            name = re.sub(r"\W", "_", f"{value.name}_{axis}")
            while name in taken:
                name += "_"
            taken.add(name)
            value.shape[axis] = name


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
