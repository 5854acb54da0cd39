"""Where passes put new weights: files in a work directory, handed back as memory-mapped tensors.

A pass that rewrites a weight computes it, puts it here and forgets it, so the memory of a compile is that of the weight
in hand, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError

__all__ = ["FILE", "SMALL", "Store", "release"]

FILE = "weights.bin"
"""Name of a store's file in its directory."""

SMALL = 1024
"""Tensors of at most this many bytes stay in memory: a file reference would cost more than they do."""


class Store:
    """An append-only file of tensors.

    Reading a tensor back maps the file; it never copies. A tensor keeps its store alive, and a store its temporary
    directory, so a model can be used and saved after whoever made the store is gone.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        """Opens a store.

        Args:
            directory: Where to write; created if missing. None makes a temporary one that is removed with this
                object.
        """
        if directory is None:
            directory = tempfile.mkdtemp(prefix="qc-store-")
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._path = self.directory / FILE
        self._path.touch()
        # Not in append mode, in which the kernel refuses to copy ranges from another file.
        self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115  closed by the finalizer
        self._close = weakref.finalize(self, self._file.close)

    def put(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.TensorProtocol:
        """Writes one tensor and returns it as a memory-mapped one.

        Args:
            name: Label of the tensor.
            array: Values, one element per code; sub-byte types are packed here.
            dtype: Element type if it is not that of `array` (``INT4``, ``UINT2``, ...).

        Raises:
            InputError: If the disk is full.
        """
        tensor = ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=name)
        if tensor.nbytes <= SMALL:
            return tensor
        return self._write(name, [tensor], tuple(tensor.shape.numpy()))

    def stack(self, name: str, tensors: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
        """Writes tensors one after the other as one, concatenated along their first axis; one is read at a time.

        Args:
            name: Label of the new tensor.
            tensors: Of one element type of at least 8 bits; their shapes differ in the first axis only.

        Raises:
            InputError: If the disk is full.
        """
        rows = sum(t.shape.numpy()[0] for t in tensors)
        return self._write(name, tensors, (rows, *tensors[0].shape.numpy()[1:]))

    def sync(self) -> None:
        """Brings what was written to the disk."""
        os.fsync(self._file.fileno())

    def holds(self, tensor: ir.ExternalTensor) -> bool:
        """Whether a tensor lies in this store."""
        return tensor.meta.get("qc.store") is self

    def at(
        self, name: str, offset: int, length: int, dtype: ir.DataType, shape: ir.Shape | Sequence[int]
    ) -> ir.ExternalTensor:
        """The tensor that lies at a place of the file, perhaps written by an earlier process."""
        held = ir.ExternalTensor(
            self._path.name,
            offset,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.directory.absolute()),
        )
        held.meta["qc.store"] = self
        return held

    def _write(self, name: str, parts: Sequence[ir.TensorProtocol], shape: tuple[int, ...]) -> ir.ExternalTensor:
        offset, length = self._file.seek(0, os.SEEK_END), sum(t.nbytes for t in parts)
        try:
            for part in parts:
                part.tofile(self._file)  # type: ignore[attr-defined]  # every tensor class has it
        except OSError as error:
            raise InputError(
                f"Could not write {length} bytes of {name!r} to {self._path}: {error.strerror or error}. "
                "Free some space there, or put the output on another disk."
            ) from error
        return self.at(name, offset, length, parts[0].dtype, shape)


def release(tensor: ir.TensorProtocol) -> None:
    """Forgets what reading a tensor from its file left in memory: the map, and of 2 and 4-bit types a byte per element.

    It is read again when asked for again. A file of which somebody still holds a view stays mapped.
    """
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):
            tensor.release()
