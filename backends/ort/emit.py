"""Writes a lowered model as the files that ONNX Runtime loads. Deterministic to the byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from qc.backends.manifest import dump_json
from qc.backends.ort.genai import CONFIG, genai_config
from qc.ir.model import Model

__all__ = ["MODEL", "WEIGHTS", "emit"]

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"

_INLINE = 1024  # bytes; smaller tensors stay in the graph, where the runtime's shape inference can read them
_LINE = 64  # bytes; a cache line, so that a mapped tensor is aligned for every vector load
_PAGE = 4096  # bytes; large tensors start on a page, so that mapping one touches no other
_LARGE = 1 << 16


def emit(model: Model, directory: Path) -> None:
    """Writes ``model.onnx``, ``model.onnx.data``, the assets, and for a decoder ``genai_config.json``.

    Weights stream through memory one tensor at a time, in the order of the graph; a tensor that several initializers
    share is stored once. Metadata that others left in the graph (module paths and source lines of the exporting
    machine) is not written.

    Args:
        model: A lowered model; unchanged.
        directory: An existing directory; files of these names in it are replaced.
    """
    written = Model.of(model.clone())
    _strip(written)
    with (directory / WEIGHTS).open("wb") as stream:
        _externalize(written, stream, directory)
        empty = stream.tell() == 0
    if empty:
        (directory / WEIGHTS).unlink()
    ir.save(written, directory / MODEL)
    for name, source in sorted(model.assets.items()):
        shutil.copyfile(source, directory / name)
    config = genai_config(model, MODEL)
    if config is not None:
        (directory / CONFIG).write_text(dump_json(config), "utf-8", newline="\n")


def _externalize(model: ir.Model, stream: BinaryIO, directory: Path) -> None:
    """Writes every large initializer to `stream` and makes it refer there."""
    placed: dict[object, int] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            if tensor.nbytes <= _INLINE:
                value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
                continue
            key = _identity(tensor)
            if key not in placed:
                unit = _PAGE if tensor.nbytes >= _LARGE else _LINE
                stream.write(bytes(-stream.tell() % unit))
                placed[key] = stream.tell()
                _write(tensor, stream)
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                placed[key],
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=value.name or "",
                base_dir=str(directory),
            )


def _write(tensor: ir.TensorProtocol, stream: BinaryIO) -> None:
    if hasattr(tensor, "tofile"):  # optional in the protocol; spares a copy of the tensor
        tensor.tofile(stream)
    else:
        stream.write(tensor.tobytes())


def _identity(tensor: ir.TensorProtocol) -> object:
    """Equal for two tensors, of a model that is alive, only if they are the same stored bytes."""
    if isinstance(tensor, ir.ExternalTensor):
        return (str(tensor.path), tensor.offset, tensor.nbytes)
    return id(tensor)


def _strip(model: ir.Model) -> None:
    """Removes names and notes that only the exporting machine understands, and keeps what starts with ``qc.``."""
    model.doc_string = None
    _keep_ours(model.metadata_props)
    for function in model.functions.values():
        _strip_nodes(function)
    for graph in model.graphs():
        graph.doc_string = None
        _keep_ours(graph.metadata_props)
        for value in (*graph.inputs, *graph.initializers.values()):
            _strip_value(value)
        _strip_nodes(graph)


def _strip_nodes(graph: ir.Graph | ir.Function) -> None:
    for node in graph:
        node.doc_string = None
        _keep_ours(node.metadata_props)
        for value in node.outputs:
            _strip_value(value)


def _strip_value(value: ir.Value) -> None:
    value.doc_string = None
    _keep_ours(value.metadata_props)


def _keep_ours(properties: dict[str, str]) -> None:
    for key in [k for k in properties if not k.startswith("qc.")]:
        del properties[key]
