"""Models that travel with the source tree: ``builtin:NAME`` is ``examples/models/NAME``."""

from __future__ import annotations

from pathlib import Path

from qc.ir.errors import InputError

__all__ = ["builtin_directory"]

_MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"


def builtin_directory(name: str) -> Path:
    """Returns the directory of a built-in model.

    Raises:
        InputError: If there is none of that name here.
    """
    names = sorted(p.parent.name for p in _MODELS.glob("*/model.onnx"))
    if name in names:
        return _MODELS / name
    if not names:
        raise InputError(
            f"builtin:{name} lives in the source tree (examples/models), which an installed package does not carry. "
            "Clone the repository and install it with `pip install -e .`, or give the path of a model."
        )
    raise InputError(f"Expected a built-in model among {names}, found {name!r}.")
