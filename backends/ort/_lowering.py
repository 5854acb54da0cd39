"""What all lowerings to the runtime's own operators do at their end."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qc.ir import dialect
from qc.passes.base import Result, Site
from qc.passes.canonicalize._graph import drop_unused

__all__ = ["MICROSOFT", "finish"]

MICROSOFT = "com.microsoft"
"""The domain of the runtime's own operators."""


def finish(model: ir.Model, sites: Sequence[Site]) -> Result:
    """The result of a lowering; a model that it changed imports the runtime's operators and keeps nothing unused."""
    result = Result.of(model, sites)
    if result.modified:
        model.opset_imports.setdefault(MICROSOFT, 1)
        drop_unused(model)
        dialect.sync_functions(model)
    return result
