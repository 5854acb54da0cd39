"""ONNX files of any opset: loaded lazily, raised to our opset where that provably changes nothing, else kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qc.frontend.cleanup import clean, name_axes
from qc.frontend.external import check_external
from qc.frontend.layouts import put_time_first
from qc.frontend.roles import assign_roles
from qc.ir.errors import InputError, InternalError, UnsupportedError
from qc.ir.model import IR_VERSION, OPSET, Model
from qc.ir.simplify import all_graphs, infer_shapes

__all__ = ["load_onnx", "raise_opset"]

_SCRIPT_CONVERTER_FROM = 18
"""Lowest opset that onnxscript's converter starts from; ONNX's own converter leads up to it."""

_TOLERANCE = 1e-5
"""Largest difference, relative to the largest value, that raising the opset may make on a probe input."""


def load_onnx(path: Path) -> Model:
    """Reads an ``.onnx`` file, or a directory that holds ``model.onnx``. Weights stay on disk.

    Subgraphs, functions and operators of foreign domains are kept. A model that qc wrote comes back as it is.

    Raises:
        InputError: If the file is missing, truncated or corrupt, or its external data are missing, too short or outside
            its directory.
    """
    model = Model.load(path)
    if not model.graph.outputs:
        raise InputError(f"{path} holds no graph with an output. It may be truncated; copy it again.")
    check_external(model, path / "model.onnx" if path.is_dir() else path)
    if "source" in model.provenance:
        return model
    _check_defined(model, path)
    _drop_ours(model)
    model.record(source="onnx", source_opset=model.opset_imports.get("", 0))
    model.graph.name = model.graph.name or "main"  # without one it is not valid ONNX
    common.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version, IR_VERSION)
    name_axes(model.graph)
    put_time_first(model)
    model = raise_opset(model)
    clean(model)
    infer_shapes(model)
    assign_roles(model)
    _record_decoder_start(model)
    return model


def raise_opset(model: Model) -> Model:
    """Returns the model at the opset that the passes are written for, or unchanged if that cannot be had.

    The raised model is used only if ONNX Runtime accepts it and yields the same outputs on probe inputs. Otherwise the
    reason is recorded in the provenance (``opset_kept``) and the original goes on.
    """
    opset = model.opset_imports.get("", 0)
    if opset >= OPSET or opset == 0:
        return model
    reason = _obstacle(model, opset)
    if reason is None:
        raised = model.clone()
        try:
            _convert(raised, opset)
            reason = _difference(model, raised)
        except Exception as error:  # noqa: BLE001  two foreign converters; whatever they raise, the original stands
            reason = f"the conversion failed: {error}".splitlines()[0]
        if reason is None:
            return raised
    model.record(opset_kept=f"{opset}: {reason}")
    return model


def _check_defined(model: Model, path: Path) -> None:
    """Refuses a graph in which a value comes from nowhere."""
    for graph in all_graphs(model):
        used = (v for node in graph for v in node.inputs if v is not None)
        for value in (*used, *graph.outputs):
            made = value.producer() is not None or value.is_graph_input() or value.const_value is not None
            if not made and value.name:
                raise UnsupportedError(
                    f"{path}: the value {value.name!r} is used, but no node, input or initializer of the graph makes "
                    "it. Sparse initializers are not read: store them densely. Otherwise the file is damaged."
                )


def _drop_ours(model: Model) -> None:
    """Removes metadata that looks like ours but was not written by us, so that nobody takes it for a fact."""
    for key in [k for k in model.metadata_props if k.startswith("qc.")]:
        del model.metadata_props[key]


def _record_decoder_start(model: Model) -> None:
    """Of an encoder-decoder, what its configuration says about the beginning of each text."""
    file = model.assets.get("config.json")
    if file is None or model.signature.input("decoder_tokens") is None:
        return
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable JSON ({error}). Copy it again.") from error
    start = config.get("decoder_start_token_id") if isinstance(config, dict) else None
    if isinstance(start, int):
        model.record(decoder_start=start)


def _obstacle(model: ir.Model, opset: int) -> str | None:
    if model.functions:
        return "the converters would inline the model's functions"
    if opset < _SCRIPT_CONVERTER_FROM and next(model.graph.subgraphs(), None) is not None:
        return "the converter for old opsets does not enter subgraphs"
    domains = sorted({node.domain for graph in all_graphs(model) for node in graph} - {"", "ai.onnx"})
    if opset < _SCRIPT_CONVERTER_FROM and domains:
        return f"the converter for old opsets does not know the domains {domains}"
    return None


def _convert(model: Model, opset: int) -> None:
    from onnxscript import version_converter

    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        if opset < _SCRIPT_CONVERTER_FROM:
            version_converter.convert_version(model, _SCRIPT_CONVERTER_FROM, fallback=True)
        version_converter.convert_version(model, OPSET)
    finally:
        logger.setLevel(level)


def _difference(before: Model, after: Model) -> str | None:
    """Says how two models differ in ONNX Runtime, or None if they agree."""
    from qc.ir.probe import find_inputs
    from qc.ir.runtime import Session

    if after.opset_imports.get("") != OPSET:
        return "no converter supports it"
    if [v.name for v in before.graph.outputs] != [v.name for v in after.graph.outputs]:
        return "the conversion renames outputs"
    try:
        found = find_inputs(before, Session(before, threads=1).run)
        session = Session(after, threads=1)
    except InternalError as error:
        return str(error).removeprefix("Bug: ")
    if found.obstacle:
        return f"nothing can be proven about the original: {found.obstacle}"
    for probe, reference in zip(found.batches, found.outputs, strict=True):
        for name, value in session.run(probe).items():
            if not _same(reference[name], value):
                return f"the converted model gives another {name!r}"
    return None


def _same(expected: object, actual: object) -> bool:
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray):
        return repr(expected) == repr(actual)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if expected.dtype.kind != "f":
        return bool((expected == actual).all())
    scale = np.nanmax(np.abs(expected), initial=1.0, where=np.isfinite(expected))
    return bool(np.allclose(actual, expected, rtol=0, atol=_TOLERANCE * float(scale), equal_nan=True))
