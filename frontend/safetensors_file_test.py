"""Safetensors headers: read, bounded, and refused when they lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from qc.frontend.safetensors_file import open_checkpoint, read_header
from qc.ir.errors import InputError


def write(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def test_a_tensor_is_a_mapped_view_of_its_bytes(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)}, tmp_path / "x")
    entries = read_header(tmp_path / "x")
    assert (entries["a"].dtype, entries["a"].shape) == (ir.DataType.FLOAT, (2, 3))
    np.testing.assert_array_equal(entries["a"].tensor("w").numpy(), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(entries["b"].tensor("v").numpy(), np.arange(4))


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "FP99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": 3},
        [1, 2],
        b"{not json",
        b"\xff\xfe",
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
         "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(InputError, match=r"w\.safetensors"):
        read_header(write(tmp_path / "w.safetensors", header, bytes(8)))


@pytest.mark.parametrize("length", [2**63, 100_000_001, 1000])
def test_a_header_longer_than_the_file_or_the_cap_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match="complete"):
        read_header(write(tmp_path / "w.safetensors", {}, length=length))


def test_truncation_at_any_place_names_the_expected_and_the_found_size(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": np.ones((8, 8), np.float32)}, file)
    whole = file.read_bytes()
    for size in (0, 7, 8, 20, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"w\.safetensors.*\b{size:,}\b"):
            read_header(file)


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {k: e.file.name for k, e in open_checkpoint(tmp_path).items()} == index["weight_map"]


@pytest.mark.parametrize(
    "weight_map", [{"a": "../one.safetensors"}, {"z": "one.safetensors"}, {"a": "none.safetensors"}, []]
)
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: object) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)


def test_other_weight_formats_are_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
        open_checkpoint(tmp_path)
