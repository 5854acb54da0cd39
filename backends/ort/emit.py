"""Writes a lowered model as the files that ONNX Runtime loads. Deterministic to the byte."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from qc.backends.manifest import dump_json
from qc.backends.ort.genai import CONFIG, genai_config
from qc.ir.model import Model

__all__ = ["MODEL", "WEIGHTS", "emit", "emit_genai", "stripped_copy"]

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"

_INLINE = 1024  # bytes; smaller tensors stay in the graph, where the runtime's shape inference can read them
_LINE = 64  # bytes; a cache line, so that a mapped tensor is aligned for every vector load
_PAGE = 4096  # bytes; large tensors start on a page, so that mapping one touches no other
_LARGE = 1 << 16


def emit(model: Model, directory: Path, *, shard: int | None = None) -> None:
    """Writes ``model.onnx``, ``model.onnx.data`` and the assets.

    Weights stream through memory one tensor at a time, in the order of the graph; a tensor that several initializers
    share is stored once. Metadata that others left in the graph (module paths and source lines of the exporting
    machine) is not written.

    Args:
        model: A lowered model; unchanged.
        directory: An existing directory; files of these names in it are replaced.
        shard: Bytes after which weights go on in another file, ``model-00002.onnx.data`` and so on. Only a tensor that
            is itself larger makes a larger file.
    """
    ir.save(stripped_copy(model, directory, shard=shard), directory / MODEL)
    for name, source in sorted(model.assets.items()):
        shutil.copyfile(source, directory / name)


def stripped_copy(model: Model, directory: Path, *, shard: int | None = None) -> Model:
    """A copy of a model without foreign metadata, whose large tensors lie in the weight files of `directory`."""
    written = Model.of(model.clone())
    _strip(written)
    with contextlib.closing(_WeightFiles(directory, shard)) as files:
        _externalize(written, files, directory)
    return written


def emit_genai(model: Model, directory: Path) -> None:
    """Writes ``genai_config.json`` beside the model of a decoder."""
    config = genai_config(model, MODEL)
    if config is not None:
        (directory / CONFIG).write_text(dump_json(config), "utf-8", newline="\n")


def _externalize(model: ir.Model, files: _WeightFiles, directory: Path) -> None:
    """Writes every large initializer to `files` and makes it refer there."""
    placed: dict[object, tuple[str, int]] = {}
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
                placed[key] = files.append(tensor)
            name, offset = placed[key]
            value.const_value = ir.ExternalTensor(
                name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=value.name or "",
                base_dir=str(directory),
            )


class _WeightFiles:
    """The files of the weights, written one after the other; none if there is nothing to write."""

    def __init__(self, directory: Path, shard: int | None) -> None:
        self._directory, self._shard = directory, shard
        self._stream: BinaryIO | None = None
        self._count = 0

    def append(self, tensor: ir.TensorProtocol) -> tuple[str, int]:
        """Writes a tensor; returns the name of its file and its offset there."""
        unit = _PAGE if tensor.nbytes >= _LARGE else _LINE
        stream = self._stream
        if stream is not None and self._shard is not None and stream.tell() + unit + tensor.nbytes > self._shard:
            stream = None
        if stream is None:
            stream = self._next()
        stream.write(bytes(-stream.tell() % unit))
        offset = stream.tell()
        _write(tensor, stream)
        return self._name, offset

    @property
    def _name(self) -> str:
        return WEIGHTS if self._shard is None else f"model-{self._count:05d}.onnx.data"

    def _next(self) -> BinaryIO:
        self.close()
        self._count += 1
        self._stream = (self._directory / self._name).open("wb")
        return self._stream

    def close(self) -> None:
        """Closes the last file."""
        if self._stream is not None:
            self._stream.close()


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
