"""ONNX files of any opset: loaded lazily, raised to our opset where that is safe, otherwise kept as they are."""

from __future__ import annotations

from pathlib import Path

from qc.frontend.cleanup import clean, infer_shapes
from qc.frontend.external import check_external
from qc.frontend.roles import assign_roles
from qc.ir.model import Model

__all__ = ["load_onnx"]


def load_onnx(path: Path) -> Model:
    """Reads an ``.onnx`` file, or a directory that holds ``model.onnx``. Weights stay on disk.

    Raises:
        InputError: If the file is missing, truncated or corrupt, or its external data are missing, too short or outside
            its directory.
    """
    model = Model.load(path)
    check_external(model, path if path.is_dir() else path.parent)
    if "source" in model.provenance:
        return model
    clean(model)
    infer_shapes(model)
    assign_roles(model)
    model.record(source="onnx")
    return model
