"""Weights whose codes are looked up: the values of all codes, and how they lie in records."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qc.backends.tvm.kernels.records import Codes
from qc.ir.quant import Format, QuantizedTensor, ValueMap

__all__ = ["TABLE_BITS", "entries_of", "fixed_table", "has_tables_by_group", "is_table", "pack_entries", "tables_of"]

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
    return _tables(format.values, rows, groups, format.by_group(tensor.params, rows, groups))


def _tables(values: ValueMap, rows: int, groups: int, params: Mapping[str, np.ndarray]) -> np.ndarray:
    low, count = values.low, 1 << values.bits
    every = np.tile(np.arange(low, low + count).astype(np.int8 if low else np.uint8), (rows * groups, 1))
    tables = np.zeros((rows, groups, 1 << TABLE_BITS), np.float32)
    tables[..., :count] = values.decode(every, params).reshape(rows, groups, count)
    return tables


def fixed_table(values: ValueMap, entry: int) -> tuple[int, ...]:
    """The bytes of the one table of values that have no parameters, the lowest of all entries first."""
    entries, _ = entries_of(_tables(values, 1, 1, {}), entry)
    return tuple(entries.reshape(16, 1).view(np.uint8).T.reshape(-1).tolist())


def entries_of(tables: np.ndarray, entry: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables ``[rows, groups, 16]`` of floats, or of integers whose largest is `_TOP`; their steps ``[rows, groups]``.

    Args:
        tables: The values.
        entry: Bytes of an entry: 2 of an integer, 4 of a float.
    """
    if entry == 4:
        return tables, np.ones(tables.shape[:2], np.float32)
    peak = np.abs(tables).max(2)
    step = np.where(peak > 0, peak, 1) / np.float32(_TOP)
    return np.rint(tables / step[..., None].astype(np.float64)).astype(np.int16), step


def pack_entries(entries: np.ndarray, L: int) -> np.ndarray:
    """Tables ``[rows, groups, 16]`` as bytes ``[units, groups, bytes]``."""
    rows, groups, _ = entries.shape
    full = np.zeros((-(-rows // L) * L, groups, 16), entries.dtype)
    full[:rows] = entries
    planes = full.reshape(-1, L // 4, 4, groups, 16, 1).view(np.uint8)
    return planes.transpose(0, 3, 2, 5, 1, 4).reshape(len(full) // L, groups, -1)
