"""No artifact that its runtime cannot load."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qc.backends.ort.capability import require_kernels
from qc.passes.base import Pass, Result

__all__ = ["RequireKernels"]


@dataclasses.dataclass(frozen=True)
class RequireKernels(Pass):
    """Stops the compile if the installed runtime has no kernel for an operator of the model. Changes nothing."""

    def call(self, model: ir.Model, context: object = None) -> Result:
        """Checks.

        Raises:
            UnsupportedError: Listing the operators and where they are.
        """
        require_kernels(model)
        return Result.of(model, [])
