"""qc: a quantizing model compiler.

A PyTorch, Hugging Face or ONNX model goes in; a directory that runs on the target comes out, small, fast, and with its
loss of accuracy measured. ``import qc`` is cheap: everything below loads on first use.

>>> import qc
>>> "compile" in dir(qc)
True
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "Artifact": "qc.backends.artifact",
    "CompileResult": "qc.emission",
    "Context": "qc.passes.base",
    "ContractError": "qc.ir.errors",
    "Format": "qc.ir.quant",
    "InputError": "qc.ir.errors",
    "Model": "qc.ir.model",
    "Pass": "qc.passes.base",
    "PassManager": "qc.passes.manager",
    "QcError": "qc.ir.errors",
    "Sampling": "qc.backends.sampling",
    "Step": "qc.passes.pipeline",
    "UnsupportedError": "qc.ir.errors",
    "compile": "qc.compiler",
    "compile_all": "qc.compiler",
    "load": "qc.frontend",
    "lower": "qc.compiler",
    "parse_pipeline": "qc.passes.pipeline",
}

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604  the names are loaded lazily below


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
