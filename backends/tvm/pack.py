"""Weights in the layouts that the kernels stream through, made when the weights file is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qc.backends.integers import integers_of
from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.bytes import FACTS, PADDING
from qc.backends.tvm.kernels.records import Codes
from qc.backends.tvm.pack_tables import (
    TABLE_BITS,
    entries_of,
    fixed_table,
    has_tables_by_group,
    is_table,
    pack_entries,
    tables_of,
)
from qc.ir.errors import UnsupportedError
from qc.ir.quant import Affine, FloatScale, Format, QuantizedTensor

__all__ = [
    "bytes_of",
    "codes_of",
    "groups_of",
    "pack_bytes",
    "pack_columns",
    "pack_records",
    "record_bytes",
    "why_decoded",
]

_BLOCKS = (64, 32, 16)
"""Columns whose activations share a scale: the longest that divides a group. Longer ones would unroll to large code."""

_ROW_GROUP = 256

_BITS = (2, 3, 4, 8)

_PART = 1 << 22
"""Elements that are packed at a time: what lies between codes and records takes several bytes for each."""


def codes_of(format: Format, columns: int, isa: Isa, *, exact: bool) -> Codes:
    """How a weight of a format lies in records at a level. Codes of 1 bit take 2, of 5 to 7 bits take 8.

    `exact` is for products with activations in float: they look up floats.

    Raises:
        UnsupportedError: If no kernel computes with it; says why.
    """
    reason = why_decoded(format)
    if reason:
        raise UnsupportedError(f"Expected a weight format with a kernel, found {format}: {reason}.")
    group, (bits, zero, table, _) = format.group, _stored(format, isa)
    integers = integers_of(format.values) is not None
    affine = format.values if integers and isinstance(format.values, Affine) else None
    half = affine is not None and not affine.half and format.scale == FloatScale(ir.DataType.FLOAT16)
    zeros = affine is not None and not affine.symmetric
    blocks = [b for b in _BLOCKS if bits != 3 or b % 32 == 0]
    if group is None:  # the scale of a row is repeated every few hundred columns: exact, and one kernel less
        block = next((b for b in blocks if b <= columns), blocks[-1])
        group = min(_ROW_GROUP, -(-columns // block) * block)
    block = next(b for b in blocks if group % b == 0)
    params = (2 if half else 4) + zeros
    per = next((p for p in (1, 2, 4) if p * params * isa.lanes % isa.vector_bytes == 0), 4)
    entry = int(table is not None) if integers else 4 if exact else 2
    if not integers and not format.values.params:
        table = fixed_table(format.values, entry)
    by_group = not integers and has_tables_by_group(format)
    return Codes(bits, block, group // block, half, zeros, zero, per, entry, table, by_group)


def _stored(format: Format, isa: Isa) -> tuple[int, int, tuple[int, ...] | None, np.ndarray | None]:
    """Bits of a code in a record, the code that stands for 0, the bytes that codes stand for, and what codes become.

    Codes of integers are stored from 0 up, bytes signed where the level wants it. Codes of a table of integers stay,
    and the kernel looks them up, where that takes fewer bits than the integers. Codes of other tables stay.
    """
    values, integers = format.values, integers_of(format.values)
    bits = next(b for b in _BITS if b >= values.bits)
    if integers is None:
        return bits, 0, None, None
    if isinstance(values, Affine) and not values.half:
        return bits, 0 if bits == 8 and isa.signed else -values.low, None, None
    assert integers.codes is not None
    if integers.codes.ndim == 1 and bits < integers.bits:
        bias = 0 if isa.signed else max(0, -int(integers.codes.min()))
        table = [(int(c) + bias) & 255 for c in integers.codes]
        return bits, bias, tuple(table + [bias] * (16 - len(table))), None
    bits = integers.bits
    return bits, 0 if bits == 8 and isa.signed else 1 << (bits - 1), None, integers.codes


def why_decoded(format: Format) -> str:
    """Why weights of a format are decoded when the file is written; empty if a kernel computes with it."""
    values, group = format.values, format.group
    if integers_of(values) is None and not is_table(values):
        return f"its values are neither integers times a scale nor tables of up to {1 << TABLE_BITS}"
    if format.axis == "out" or format.remainder is not None:
        return "its groups do not lie along a row, or it has a remainder"
    unit = 32 if values.bits == 3 else _BLOCKS[-1]
    if group is not None and group % unit:
        return f"groups are multiples of {unit} columns"
    return ""


def groups_of(codes: Codes, columns: int) -> int:
    """Groups in a row."""
    return -(-columns // (codes.block * codes.blocks))


def record_bytes(codes: Codes, rows: int, columns: int, isa: Isa) -> int:
    """Bytes of a packed weight."""
    return -(-rows // isa.lanes) * codes.unit_bytes(isa.lanes, groups_of(codes, columns))


def pack_records(tensor: QuantizedTensor, codes: Codes, isa: Isa) -> np.ndarray:
    """Codes, scales and zero points in records: uint8, see `qc.backends.tvm.kernels.records`."""
    return _in_parts(tensor, isa.lanes, lambda part: _records(part, codes, isa))


def _in_parts(tensor: QuantizedTensor, unit: int, pack: Callable[[QuantizedTensor], np.ndarray]) -> np.ndarray:
    """What a weight is packed to, in parts of whole units of `unit` rows."""
    rows, columns = tensor.shape
    step = max(1, _PART // (unit * columns)) * unit
    return np.concatenate([pack(tensor.rows(slice(i, i + step))) for i in range(0, rows, step)])


def _records(tensor: QuantizedTensor, codes: Codes, isa: Isa) -> np.ndarray:
    values, L = tensor.format.values, isa.lanes
    scale = tensor.params["scale"] if codes.half else tensor.format.scale.decode(tensor.params)
    if codes.entry > 1:
        source = tensor.codes.astype(np.int16) - values.low
        entries, step = entries_of(tables_of(tensor, codes), codes.entry)
        tables = pack_entries(entries, L)
        scale = _by_row(tensor, scale) * step
    else:
        source, multiple = _integers(tensor, codes, isa)
        scale = scale if codes.half else scale / np.float32(multiple)
    rows, columns = tensor.codes.shape
    units, width = -(-rows // L), codes.block * codes.blocks
    groups = groups_of(codes, columns)
    per, records = codes.per_record, -(-groups // codes.per_record)
    # Padding: codes of columns meet activations of zero, rows are never stored.
    padded = np.zeros((units * L, records * per * width), np.uint8)
    padded[:rows, :columns] = source.astype(np.uint8)
    signed = codes.bits == 8 and isa.signed
    if signed:
        padded ^= np.uint8(0x80)
    if codes.entry > 1:
        slots = padded.reshape(units, L // 4, 4, -1, 16).transpose(0, 3, 2, 1, 4)
    else:
        slots = padded.reshape(units, L, -1, 4).transpose(0, 2, 1, 3)
    packed = _pack_slots(slots.reshape(units, records, per * codes.blocks, codes.block // 4, 4 * L), codes.bits)
    parts = [packed.reshape(units, records, -1), _per_group(_by_row(tensor, scale), units, L, records, per)]
    if codes.zeros:
        zeros = _by_row(tensor, tensor.params["zero_point"]).astype(np.uint8) ^ np.uint8(0x80 if signed else 0)
        parts.append(_per_group(zeros, units, L, records, per))
    if codes.by_group:
        parts.append(tables)
    out = np.zeros((units, records, codes.record_bytes(L)), np.uint8)
    np.concatenate(parts, axis=2, out=out[:, :, : sum(part.shape[2] for part in parts)])
    out = out.reshape(units, -1)
    if codes.head_bytes(L):
        out = np.concatenate([tables.reshape(units, -1), out], axis=1)
    return out.reshape(-1)


def _integers(tensor: QuantizedTensor, codes: Codes, isa: Isa) -> tuple[np.ndarray, int]:
    """Codes as they are stored, and the multiple of the values that they stand for."""
    *_, recoded = _stored(tensor.format, isa)
    integers = integers_of(tensor.format.values)
    assert integers is not None
    if recoded is not None:
        return integers.of(tensor).astype(np.int16) + (1 << (codes.bits - 1)), integers.multiple
    return tensor.codes.astype(np.int16) - tensor.format.values.low, 1 if codes.table is None else integers.multiple


def _by_row(tensor: QuantizedTensor, param: np.ndarray) -> np.ndarray:
    """Parameters ``[rows, groups]``, or ``[rows, 1]`` where a row, or all of them, have one."""
    return np.broadcast_to(param, (tensor.codes.shape[0], param.shape[-1]))


def _pack_slots(slots: np.ndarray, bits: int) -> np.ndarray:
    """``[..., slots, bytes]`` of one code per byte, several slots per byte."""
    if bits == 8:
        return slots
    if bits == 3:
        low, high = _pack_slots(slots & 3, 2), _pack_slots(slots >> 2, 1)
        return np.concatenate([low, high], axis=-2)
    per = 8 // bits
    grouped = slots.reshape(*slots.shape[:-2], slots.shape[-2] // per, per, slots.shape[-1])
    shifts = (bits * np.arange(per, dtype=np.uint8)).astype(np.uint8)[:, None]
    return np.bitwise_or.reduce(grouped << shifts, axis=-2)


def _per_group(params: np.ndarray, units: int, lanes: int, records: int, per: int) -> np.ndarray:
    """Parameters ``[rows, groups]`` as bytes ``[units, records, per * lanes * size]``."""
    full = np.zeros((units * lanes, records * per), params.dtype)
    full[: params.shape[0], : params.shape[1] if params.shape[1] > 1 else None] = params
    turned = np.ascontiguousarray(full.reshape(units, lanes, records, per).transpose(0, 2, 3, 1))
    return turned.reshape(units, records, -1).view(np.uint8)


def bytes_of(rows: int, columns: int, unit: int) -> int:
    """Bytes of a weight packed by `pack_bytes`."""
    padded = -(-columns // PADDING) * PADDING
    return -(-rows // unit) * unit * (padded + FACTS)


def pack_bytes(tensor: QuantizedTensor, unit: int, isa: Isa) -> np.ndarray:
    """Codes of 8 bits with one scale per row, `unit` rows to a unit; see `qc.backends.tvm.kernels.bytes`."""
    return _in_parts(tensor, unit, lambda part: _bytes(part, unit, isa))


def _bytes(tensor: QuantizedTensor, unit: int, isa: Isa) -> np.ndarray:
    values, (rows, columns) = tensor.format.values, tensor.codes.shape
    assert isinstance(values, Affine)
    units, padded = -(-rows // unit), -(-columns // PADDING) * PADDING
    shift = 0 if isa.signed else 128  # the codes are signed there
    low = -128 if values.symmetric else 0
    codes = np.zeros((units * unit, padded), np.int16)
    codes[:rows, :columns] = tensor.codes.astype(np.int16) - (low + 128) + shift
    facts = np.zeros((units, 3, unit), np.int32)
    scale = np.zeros(units * unit, np.float32)
    scale[:rows] = np.broadcast_to(tensor.format.scale.decode(tensor.params).reshape(-1), rows)
    facts[:, 0] = scale.reshape(units, unit).view(np.int32)
    zero = np.zeros(units * unit, np.int32)
    held = tensor.params["zero_point"].astype(np.int32).reshape(-1) if not values.symmetric else np.int32(0)
    zero[:rows] = held - (low + 128) + shift
    facts[:, 1] = zero.reshape(units, unit)
    facts[:, 2] = codes[:, :columns].sum(1, dtype=np.int32).reshape(units, unit)
    turned = codes.astype(np.uint8).reshape(units, unit, padded // 4, 4).transpose(0, 2, 1, 3)
    out = np.empty((units, unit * (padded + FACTS)), np.uint8)
    out[:, : unit * padded] = turned.reshape(units, -1)
    out[:, unit * padded :] = facts.reshape(units, -1).view(np.uint8)
    return out.reshape(-1)


def pack_columns(weight: np.ndarray, columns: int) -> np.ndarray:
    """A float weight ``[N, K]`` as ``[units, K, columns]``, `columns` output channels to a unit, zeros beyond N."""
    rows, width = weight.shape
    packed = np.zeros((-(-rows // columns), width, columns), weight.dtype)
    whole = rows // columns
    packed[:whole] = weight[: whole * columns].reshape(whole, columns, width).transpose(0, 2, 1)
    packed[whole:, :, : rows % columns] = weight[whole * columns :].T
    return packed.reshape(-1)
