"""How codes lie in bytes for ``MatMulNBits`` and ``GatherBlockQuantized``.

A row of K codes is cut into blocks of `block` codes, the last one padded with zeros. A code of b bits holds ``q - low``
(so a symmetric code is offset by ``2^(b-1)``, the kernels' implicit zero point). Codes fill a byte from its lowest bits
on along K: for 4 bits, byte i holds code 2i in its low and code 2i+1 in its high half.

ONNX packs its sub-byte types in the same order along a flat tensor. Where no padding is needed the two differ in the
sign only, ``q - low = q XOR 2^(b-1)``, so packing is one pass over the bytes and never unpacks them.
"""

from __future__ import annotations

import io

import numpy as np
import onnx_ir as ir

from qc.ir.quant import Affine
from qc.ir.store import release

__all__ = ["pack_codes", "pack_tensor", "unpack_codes"]

_SIGN_BITS = {2: 0xAA, 4: 0x88, 8: 0x80}
_CHUNK_ROWS = 1024
"""Rows that are unpacked at a time where padding is needed: at most a few dozen MiB for the widest layers."""


def pack_codes(codes: np.ndarray, bits: int, width: int | None = None) -> np.ndarray:
    """Packs non-negative codes along their last axis, lowest bits first.

    Args:
        codes: ``[N, K]`` integers in ``[0, 2^bits)``.
        bits: 2, 4 or 8.
        width: Codes per row after zero padding; None: K rounded up to whole bytes.

    Returns:
        uint8 ``[N, width * bits / 8]``.
    """
    per_byte = 8 // bits
    rows, columns = codes.shape
    padded = np.zeros((rows, width or -(-columns // per_byte) * per_byte), np.uint8)
    padded[:, :columns] = codes
    packed = padded[:, ::per_byte].copy()
    for i in range(1, per_byte):
        packed |= padded[:, i::per_byte] << np.uint8(bits * i)
    return packed


def unpack_codes(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 codes ``[N, columns]`` of packed rows."""
    rows = packed.reshape(packed.shape[0], -1)
    mask = np.uint8((1 << bits) - 1)
    codes = np.stack([(rows >> np.uint8(bits * i)) & mask for i in range(8 // bits)], axis=-1)
    return codes.reshape(rows.shape[0], -1)[:, :columns]


def pack_tensor(tensor: ir.TensorProtocol, values: Affine, width: int) -> np.ndarray:
    """Packs a stored ``[N, K]`` tensor of codes (or ``[N, G]`` of zero points) for the kernels.

    Args:
        tensor: Element type ``values.dtype``.
        values: The value map of the codes.
        width: Codes per row after padding, at least K; ``width * bits`` is a multiple of 8.

    Returns:
        uint8 ``[N, width * bits / 8]``.
    """
    rows, columns = (int(d) for d in tensor.shape)
    if width == columns:
        stream = io.BytesIO()
        tensor.tofile(stream)  # type: ignore[attr-defined]  # `tobytes` of a file unpacks it first
        raw = np.frombuffer(stream.getbuffer(), np.uint8).reshape(rows, -1)
        return raw ^ np.uint8(_SIGN_BITS[values.bits]) if values.symmetric else raw
    codes = tensor.numpy()
    packed = np.empty((rows, width * values.bits // 8), np.uint8)
    for start in range(0, rows, _CHUNK_ROWS):
        chunk = codes[start : start + _CHUNK_ROWS].astype(np.int16) - values.low
        packed[start : start + _CHUNK_ROWS] = pack_codes(chunk, values.bits, width)
    del codes
    release(tensor)
    return packed
