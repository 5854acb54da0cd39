"""Frontends: anything becomes a `qc.ir.model.Model`. They read; they never optimize."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qc.frontend.source import load

if TYPE_CHECKING:
    from qc.frontend.torch_module import from_exported_program, from_module

__all__ = ["from_exported_program", "from_module", "load"]


def __getattr__(name: str) -> object:
    if name in ("from_exported_program", "from_module"):
        from qc.frontend import torch_module

        return getattr(torch_module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
