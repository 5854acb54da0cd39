"""Weights whose codes are looked up: the values of all codes, and how they lie in records."""

from __future__ import annotations

import numpy as np

from qc.backends.tvm.kernels.records import Codes
from qc.ir.quant import Format, QuantizedTensor, ValueMap

__all__ = ["TABLE_BITS", "has_tables_by_group", "is_table", "pack_tables", "tables_of"]

TABLE_BITS = 4
"""Bits of a code that processors look up."""

_TOP = (1 << 15) - 1
"""The largest integer of a table of 16 bits: entries are off by 2^-16 of the largest."""


def has_tables_by_group(format: Format) -> bool:
    """Whether each group has values of its own."""
    return format.group is not None and any(param.scope == "group" for param in format.values.params)


def is_table(values: ValueMap) -> bool:
    """Whether each code stands for an element, and codes are so few that a kernel looks them up."""
    alone = values.tile == values.books == 1 and all(param.scope != "column" for param in values.params)
    return alone and 1 <= values.bits <= TABLE_BITS


def tables_of(tensor: QuantizedTensor, codes: Codes) -> np.ndarray:
    """The values of all codes of each row, or of each group of it: float32 ``[rows, groups, 16]``, zeros if fewer."""
    format, rows = tensor.format, tensor.shape[0]
    groups = format.groups(tensor.shape[1]) if codes.by_group else 1
    low, count = format.values.low, 1 << format.values.bits
    every = np.tile(np.arange(low, low + count).astype(np.int8 if low else np.uint8), (rows * groups, 1))
    units = format.values.decode(every, format.by_group(tensor.params, rows, groups))
    tables = np.zeros((rows, groups, 1 << TABLE_BITS), np.float32)
    tables[..., :count] = units.reshape(rows, groups, count)
    return tables


def pack_tables(tables: np.ndarray, codes: Codes, L: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables ``[rows, groups, 16]`` as bytes ``[units, groups, bytes]``, and the steps of entries ``[rows, groups]``.

    Entries are floats, or integers whose largest is `_TOP`.
    """
    rows, groups, _ = tables.shape
    one = np.ones((rows, groups), np.float32)
    if codes.entry == 2:
        peak = np.abs(tables).max(2)
        one = np.where(peak > 0, peak, 1) / np.float32(_TOP)
        tables = np.rint(tables / one[..., None].astype(np.float64)).astype(np.int16)
    full = np.zeros((-(-rows // L) * L, groups, 16), tables.dtype)
    full[:rows] = tables
    entries = full.reshape(-1, L // 4, 4, groups, 16, 1).view(np.uint8)
    return entries.transpose(0, 3, 2, 5, 1, 4).reshape(len(full) // L, groups, -1), one
