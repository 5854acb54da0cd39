"""``torch.onnx.export`` with the settings that keep a graph readable: the one place that calls the exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qc.frontend.cleanup import clean, compact_metadata
from qc.frontend.sequences import unpack_sequences
from qc.frontend.torch_recurrent import kept_layers, translations
from qc.ir.errors import UnsupportedError
from qc.ir.model import OPSET

if TYPE_CHECKING:
    import torch

__all__ = ["export_graph", "exporter_versions"]


def export_graph(
    program: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    prefix: str = "",
) -> ir.Model:
    """Traces a module, or translates an exported program, to a clean ONNX graph of opset 23.

    Weights stay wrapped torch tensors (fake ones stay fake); every linear layer stays ``MatMul(x, Transpose(W))`` with
    W under its parameter name, because the exporter's own optimizer is off.

    Args:
        program: The module (in evaluation mode), or an exported program.
        args: Example positional inputs of a module; ignored for an exported program.
        dynamic_shapes: As `torch.export.export` takes it; strings name dimensions.
        input_names: Names of the flattened graph inputs.
        output_names: Names of the flattened graph outputs.
        prefix: Leading module path to drop from parameter names and scopes.

    Raises:
        UnsupportedError: If the exporter cannot express the program.
    """
    import torch

    try:
        with _quiet(), kept_layers():
            exported = torch.onnx.export(
                program, args, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                dynamic_shapes=dynamic_shapes, input_names=input_names, output_names=output_names,
                custom_translation_table=translations(),
            )  # fmt: skip
    except Exception as error:
        raise UnsupportedError(
            f"The model cannot be exported to ONNX: {_reason(error)}. Export it by other means and give the .onnx file."
        ) from error
    if exported is None:
        raise UnsupportedError("The exporter returned no ONNX program. Export the model by other means.")
    model = exported.model
    if prefix:
        _drop_prefix(model.graph, f"{prefix}.")
    compact_metadata(model, prefix)
    unpack_sequences(model.graph)
    clean(model)
    return model


def exporter_versions(*modules: str) -> str:
    """Returns ``"torch 2.13.0, transformers 5.23.0"`` for the modules that took part."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", *modules))


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [repr(error)]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"


def _drop_prefix(graph: ir.Graph, prefix: str) -> None:
    for name, value in list(graph.initializers.items()):
        short = name.removeprefix(prefix)
        if short != name and short not in graph.initializers:
            del graph.initializers[name]
            value.name = short
            graph.initializers[short] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the exporter's warnings about axis names, absent packages and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
