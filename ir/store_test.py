"""Tensors go to files and come back as maps of them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qc.ir.errors import InputError
from qc.ir.store import SMALL, Store


def ramp(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def test_a_large_tensor_comes_back_as_a_map_of_the_file() -> None:
    store, array = Store(), ramp(40, 30)
    tensor = store.put("w", array)
    assert isinstance(tensor, ir.ExternalTensor)
    assert Path(tensor.path).parent == store.directory
    assert (tensor.name, tensor.dtype, tensor.nbytes) == ("w", ir.DataType.FLOAT, 4800)
    assert np.array_equal(tensor.numpy(), array)
    assert not tensor.numpy().flags.owndata


def test_a_small_tensor_stays_in_memory() -> None:
    store = Store()
    tensor = store.put("scale", ramp(SMALL // 4))
    assert not isinstance(tensor, ir.ExternalTensor)
    assert os.listdir(store.directory) == ["weights.bin"]
    assert (store.directory / "weights.bin").stat().st_size == 0


@pytest.mark.parametrize(
    ("dtype", "low", "high", "per_byte"),
    [
        (ir.DataType.INT4, -8, 8, 2),
        (ir.DataType.UINT4, 0, 16, 2),
        (ir.DataType.INT2, -2, 2, 4),
        (ir.DataType.UINT2, 0, 4, 4),
        (ir.DataType.INT8, -128, 128, 1),
    ],
)
def test_codes_are_packed_even_if_their_number_is_odd(dtype: ir.DataType, low: int, high: int, per_byte: int) -> None:
    codes = np.random.default_rng(0).integers(low, high, (71, 73)).astype(np.int8 if low < 0 else np.uint8)
    store = Store()
    first, second = store.put("a", codes, dtype), store.put("b", codes[::-1], dtype)
    assert first.nbytes == -(-codes.size // per_byte)
    assert np.array_equal(first.numpy().astype(codes.dtype), codes)
    assert np.array_equal(second.numpy().astype(codes.dtype), codes[::-1])


def test_a_transposed_array_is_written_in_its_logical_order() -> None:
    assert np.array_equal(Store().put("w", ramp(40, 30).T).numpy(), ramp(40, 30).T)


def test_stacked_tensors_are_concatenated_wherever_they_lie() -> None:
    store, other = Store(), Store()
    arrays = [ramp(50, 20, dtype=ml_dtypes.bfloat16), ramp(1, 20, dtype=ml_dtypes.bfloat16)]
    lazy = ir.LazyTensor(lambda: ir.tensor(arrays[0] + arrays[1]), dtype=ir.DataType.BFLOAT16, shape=ir.Shape((50, 20)))
    parts = [store.put("a", arrays[0]), other.put("b", arrays[0]), ir.tensor(arrays[1]), lazy]
    stacked = store.stack("all", parts)
    assert (stacked.dtype, stacked.nbytes) == (ir.DataType.BFLOAT16, 151 * 20 * 2)
    expected = np.concatenate([arrays[0], arrays[0], arrays[1], arrays[0] + arrays[1]])
    assert np.array_equal(stacked.numpy(), expected)
    assert np.array_equal(store.put("after", ramp(300)).numpy(), ramp(300))


def test_a_temporary_store_lives_as_long_as_its_last_tensor() -> None:
    tensor = Store().put("w", ramp(40, 30))
    gc.collect()
    assert np.array_equal(tensor.numpy(), ramp(40, 30))
    directory = Path(tensor.path).parent
    del tensor
    gc.collect()
    assert not directory.exists()


def test_a_given_directory_is_made_and_kept_and_never_overwritten(tmp_path: Path) -> None:
    first = Store(tmp_path / "work").put("a", ramp(40, 30))
    gc.collect()
    Store(tmp_path / "work").put("b", ramp(40, 30) + 1)
    assert np.array_equal(first.numpy(), ramp(40, 30))
    assert (tmp_path / "work" / "weights.bin").stat().st_size == 2 * 4800


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_reported_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"Could not write 4800 bytes of 'w'.*Free some"):
        Store(tmp_path).put("w", ramp(40, 30))
