"""PyTorch modules and exported programs. These run in this process: the module already lives here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qc.frontend.roles import assign_roles
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.simplify import infer_shapes

if TYPE_CHECKING:
    import torch

__all__ = ["from_exported_program", "from_module", "load_pt2"]


def from_module(
    module: torch.nn.Module,
    inputs: Sequence[Any],
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Model:
    """Imports a module. Its weights are shared, not copied; do not train it while the model is in use.

    Args:
        module: Exported in evaluation mode; its own mode is restored.
        inputs: Example positional inputs. Use sizes that differ and are larger than 1 on dynamic axes.
        dynamic_shapes: As `torch.export.export` takes it; a string names a dimension, e.g. ``({0: "batch"},)``.
        input_names: Names of the graph inputs; by default those of ``forward``.
        output_names: Names of the graph outputs.
        roles: Role of inputs and outputs by name; by default guessed from the names.

    Raises:
        InputError: If PyTorch is not installed.
        UnsupportedError: If the module cannot be exported.
    """
    _require_torch()
    from qc.frontend.torch_export import export_graph

    training = module.training
    module.eval()
    try:
        graph_model = export_graph(
            module, tuple(inputs), dynamic_shapes=dynamic_shapes, input_names=input_names, output_names=output_names
        )
    finally:
        module.train(training)
    return _finish(graph_model, "torch", roles)


def from_exported_program(
    program: torch.export.ExportedProgram,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Model:
    """Imports an exported program; its weights are shared, not copied. Arguments and errors as `from_module`."""
    _require_torch()
    from qc.frontend.torch_export import export_graph

    graph_model = export_graph(program, (), input_names=input_names, output_names=output_names)
    return _finish(graph_model, "torch.export", roles)


def load_pt2(path: Path) -> Model:
    """Reads a ``.pt2`` file written by `torch.export.save`.

    Raises:
        InputError: If PyTorch is not installed or the file is not an exported program.
        UnsupportedError: If the program cannot be expressed in ONNX.
    """
    _require_torch()
    import torch

    try:
        program = torch.export.load(path)
    except Exception as error:
        raise InputError(f"{path} is not an exported program ({error}). Write it with torch.export.save.") from error
    return from_exported_program(program)


def _finish(graph_model: Any, source: str, roles: Mapping[str, str] | None) -> Model:
    from qc.frontend.torch_export import exporter_versions
    from qc.ir.model import set_role

    infer_shapes(graph_model)
    model = Model.of(graph_model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if roles is not None and value.name in roles:
            set_role(value, roles[value.name])
    assign_roles(model)
    model.record(source=source, exporter=exporter_versions())
    return model


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("A PyTorch model needs torch. Install it: pip install 'qc-compiler[torch]'.") from error
