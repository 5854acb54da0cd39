"""How codes of any width lie in bytes: every stored bit carries information, but for the end of a row.

A row of codes is cut into *slices* whose widths are powers of two, 7 = 4 + 2 + 1 bits, lowest bits first; each slice
is packed lowest bits first, so code i of a 4-bit slice lies in the low half of byte i / 2 if i is even. A row ends on a
byte: rows are read one by one, and unpacking takes shifts and masks only. FLUTE (arXiv 2407.10960) and the K-quants of
llama.cpp store 3, 5 and 6 bits in the same manner.

Ternary codes are five to a byte, ``sum_i t_i 3^(4-i) <= 242``: 1.6 bits each.
"""

from __future__ import annotations

import numpy as np

__all__ = ["TRITS", "pack", "row_bytes", "slices", "unpack"]

TRITS = 0
"""Width that stands for ternary codes, five to a byte."""

_POWERS_OF_3 = np.array([81, 27, 9, 3, 1], np.uint8)


def slices(bits: int) -> list[int]:
    """The widths that `bits` is cut into, lowest bits first: ``[4, 2]`` for 6, ``[8, 4]`` for 12."""
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    if bits == TRITS:
        return -(-count // 5)
    return sum(-(-count * width // 8) for width in slices(bits))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs rows of non-negative codes.

    Args:
        codes: ``[..., n]`` integers in ``[0, 2^bits)``, or in ``{0, 1, 2}`` for `TRITS`.
        bits: 1 to 16, or `TRITS`.

    Returns:
        uint8 ``[..., row_bytes(n, bits)]``.
    """
    if bits == TRITS:
        return (_padded(codes, 5) * _POWERS_OF_3).sum(axis=-1, dtype=np.uint8)
    parts, shift = [], 0
    for width in slices(bits):
        part = codes >> shift
        parts.append(_pack_slice((part & ((1 << width) - 1)).astype(np.uint8), width))
        shift += width
    return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: codes ``[..., count]``, uint8 or, of more than 8 bits, uint16."""
    if bits == TRITS:
        trits = packed[..., None] // _POWERS_OF_3 % np.uint8(3)
        return trits.reshape(*packed.shape[:-1], -1)[..., :count]
    kind = np.uint8 if bits <= 8 else np.uint16
    codes, shift, start = np.zeros((*packed.shape[:-1], count), kind), 0, 0
    for width in slices(bits):
        end = start + row_bytes(count, width)
        codes |= _unpack_slice(packed[..., start:end], width, count).astype(kind) << kind(shift)
        shift, start = shift + width, end
    return codes


def _pack_slice(codes: np.ndarray, width: int) -> np.ndarray:
    if width == 8:
        return codes
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return np.bitwise_or.reduce(_padded(codes, len(shifts)) << shifts, axis=-1)


def _unpack_slice(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    if width == 8:
        return packed
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    codes = packed[..., None] >> shifts & np.uint8((1 << width) - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def _padded(codes: np.ndarray, per_byte: int) -> np.ndarray:
    """Splits the last axis into bytes' worth of codes, the last ones zero."""
    *rest, count = codes.shape
    padded = np.zeros((*rest, -(-count // per_byte) * per_byte), np.uint8)
    padded[..., :count] = codes
    return padded.reshape(*rest, -1, per_byte)
