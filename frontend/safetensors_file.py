"""Safetensors files, read by header only: which tensor lies where. No weight is touched.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
``{name: {dtype, shape, data_offsets}}``, then the raw data. Everything in a header is treated as hostile: its length is
capped, offsets must lie inside the file, ranges must not overlap and must equal ``shape x dtype``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import onnx_ir as ir

from qc.ir.errors import InputError

__all__ = ["Entry", "open_checkpoint", "read_header"]

_MAX_HEADER = 100_000_000
"""Bytes; the cap of the reference implementation. A header of a 1000-tensor checkpoint has about 100 kB."""

_DTYPES = {
    "BOOL": (ir.DataType.BOOL, 1),
    "U8": (ir.DataType.UINT8, 1),
    "I8": (ir.DataType.INT8, 1),
    "U16": (ir.DataType.UINT16, 2),
    "I16": (ir.DataType.INT16, 2),
    "U32": (ir.DataType.UINT32, 4),
    "I32": (ir.DataType.INT32, 4),
    "U64": (ir.DataType.UINT64, 8),
    "I64": (ir.DataType.INT64, 8),
    "F8_E4M3": (ir.DataType.FLOAT8E4M3FN, 1),
    "F8_E5M2": (ir.DataType.FLOAT8E5M2, 1),
    "F16": (ir.DataType.FLOAT16, 2),
    "BF16": (ir.DataType.BFLOAT16, 2),
    "F32": (ir.DataType.FLOAT, 4),
    "F64": (ir.DataType.DOUBLE, 8),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file.

    Attributes:
        file: The file, as the user named it (it may be a symbolic link into a content-addressed cache).
        key: Its name in the file.
        dtype: Element type.
        shape: Dimensions.
        offset: First byte, from the start of the file.
        length: Number of bytes.
    """

    file: Path
    key: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int

    def tensor(self, name: str) -> ir.ExternalTensor:
        """Returns a memory-mapped tensor over these bytes; nothing is read."""
        return ir.ExternalTensor(
            self.file.name, self.offset, self.length, self.dtype,
            shape=ir.Shape(self.shape), name=name, base_dir=self.file.parent,
        )  # fmt: skip


def read_header(file: Path) -> dict[str, Entry]:
    """Returns the tensors of one safetensors file by name, every bound checked against the size of the file.

    Raises:
        InputError: If the file is missing, truncated or breaks a rule of the format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_length > _MAX_HEADER or 8 + header_length > size:
                raise InputError(
                    f"{file} is not a complete safetensors file: its header should take "
                    f"{header_length if len(prefix) == 8 else 8:,} bytes (at most {_MAX_HEADER:,}), "
                    f"the file has {size:,}. Copy or download it again."
                )
            raw = stream.read(header_length)
    except OSError as error:
        raise InputError(f"Cannot read the weights {file}: {error.strerror}. Check path and permissions.") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {key: _entry(file, key, fields, 8 + header_length) for key, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} has a malformed header ({error!r}). Copy or download it again.") from error
    _check_ranges(file, entries, 8 + header_length, size)
    return entries


def open_checkpoint(directory: Path) -> dict[str, Entry]:
    """Returns the tensors of a checkpoint directory by name, from one ``model.safetensors`` or its indexed shards.

    Raises:
        InputError: If there is no safetensors checkpoint, a shard is missing or damaged, or the index names a file
            outside the directory or a tensor that its shard does not hold.
    """
    index_file = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index_file.is_file():
        if single.is_file():
            return read_header(single)
        raise InputError(
            f"Expected {single.name} or {index_file.name} in {directory}, found "
            f"{sorted(p.name for p in directory.iterdir() if p.is_file())[:12]}. "
            "Only safetensors weights are read; re-save other formats with save_pretrained()."
        )
    try:
        weight_map = json.loads(index_file.read_text("utf-8"))["weight_map"]
        places = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index_file} is not a safetensors index ({error!r}). Copy or download it again.") from error
    for name in set(places.values()):
        if Path(name).name != name:
            raise InputError(f"{index_file} names the shard {name!r}; expected a plain file name inside {directory}.")
    shards = {name: read_header(directory / name) for name in sorted(set(places.values()))}
    missing = [key for key, name in places.items() if key not in shards[name]]
    if missing:
        raise InputError(f"{index_file} places {missing[0]!r} in {places[missing[0]]}, which does not hold it.")
    return {key: shards[name][key] for key, name in places.items()}


def _entry(file: Path, key: str, fields: dict, data_start: int) -> Entry:
    if fields["dtype"] not in _DTYPES:
        raise InputError(f"{file}: tensor {key!r} has dtype {fields['dtype']!r}; expected one of {sorted(_DTYPES)}.")
    dtype, itemsize = _DTYPES[fields["dtype"]]
    shape = tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {key!r}: shape and offsets must be non-negative integers")
    if end - begin != math.prod(shape) * itemsize:
        raise ValueError(f"tensor {key!r}: shape {shape} of {fields['dtype']} does not fill bytes {begin}..{end}")
    return Entry(file, key, dtype, shape, data_start + begin, end - begin)


def _check_ranges(file: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    position = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.length)):
        if entry.offset != position:
            raise InputError(
                f"{file}: the data of {entry.key!r} starts at byte {entry.offset:,}, expected {position:,} "
                "(holes and overlaps are not allowed). The file is damaged."
            )
        position += entry.length
    if position != size:
        raise InputError(
            f"{file} is damaged or truncated: its header describes {position:,} bytes, the file has {size:,}. "
            "Copy or download it again."
        )
