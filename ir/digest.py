"""Fingerprints of arrays and models: equal ones have equal content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.store import release
from qc.ir.text import to_text

__all__ = ["digest_batch", "digest_batches", "digest_model"]


def digest_batch(inputs: Mapping[str, np.ndarray]) -> bytes:
    """The SHA-256 of arrays by name; their order does not count."""
    found = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        data = np.ascontiguousarray(value)
        found.update(repr((name, data.dtype.str, data.shape)).encode())
        found.update(repr(data.tolist()).encode() if data.dtype.kind in "OUS" else data.tobytes())
    return found.digest()


def digest_batches(batches: Sequence[Mapping[str, np.ndarray]]) -> str:
    """The SHA-256 of batches in their order, in hexadecimal."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(digest_batch(batch))
    return found.hexdigest()


def digest_model(model: ir.Model) -> str:
    """The SHA-256 of a graph and of the bytes of its weights, in hexadecimal; reads one weight at a time."""
    found = hashlib.sha256(to_text(model).encode())
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        numbers = np.ascontiguousarray(tensor.numpy())
        found.update(repr((name, tensor.dtype.name, numbers.shape)).encode())
        found.update(repr(numbers.tolist()).encode() if numbers.dtype.kind in "OUS" else _bytes(numbers))
        del numbers  # a view of the file
        release(tensor)
    return found.hexdigest()


def _bytes(numbers: np.ndarray) -> np.ndarray:
    return numbers.reshape(-1).view(np.uint8)
