"""Quantized checkpoints, written by packers that follow their makers' loops, against plain dequantization."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qc.frontend.prequantized import Packed, split_checkpoint
from qc.frontend.safetensors_file import open_checkpoint
from qc.ir.errors import InputError, UnsupportedError

N, K = 16, 64
NAME = "model.layers.0.mlp.up_proj"


def opened(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> Packed:
    """The one quantized weight of a checkpoint that also holds a norm, which must be left over alone."""
    held = {f"{NAME}.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(held | {"model.norm.weight": np.ones(K, np.float32)}, directory / "model.safetensors")
    rest, packed = split_checkpoint(config, open_checkpoint(directory))
    assert list(rest) == ["model.norm.weight"]
    assert list(packed) == [f"{NAME}.weight"]
    return packed[f"{NAME}.weight"]


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each row as one long little-endian number, cut into 32-bit words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append([number >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return np.array(rows, np.uint32).view(np.int32)


def random_codes(bits: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``[N, K]``, zero points and scales ``[N, groups]``."""
    rng = np.random.default_rng(seed)
    zeros = rng.integers(0, 1 << bits, (N, groups))
    return rng.integers(0, 1 << bits, (N, K)), zeros, rng.uniform(0.01, 0.1, (N, groups)).astype(np.float16)


def plain(codes: np.ndarray, zeros: np.ndarray, scale: np.ndarray, group: np.ndarray) -> np.ndarray:
    """``(q - z) s`` with the group of each column."""
    return ((codes - zeros[:, group]) * scale.astype(np.float32)[:, group]).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits: int, version: str, tmp_path: Path) -> None:
    codes, zeros, scale = random_codes(bits, 2)
    stored = (zeros - 1) % (1 << bits) if version == "gptq" else zeros
    # 3-bit zero points of 16 rows do not fill words; the packers round up.
    padded = np.zeros((2, -(-N * bits // 32) * 32 // bits), int)
    padded = np.zeros((2, 32), int) if bits == 3 else padded
    padded[:, :N] = stored.T
    tensors = {"qweight": words(codes.T.T, bits).T, "qzeros": words(padded, bits), "scales": scale.T}
    tensors["g_idx"] = np.arange(K, dtype=np.int32) // 32
    packed = opened(tmp_path, {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}, tensors)
    tensor = packed.read()
    assert (str(tensor.format), tensor.shape) == (f"uint{bits}:g32:f16", (N, K))
    assert np.array_equal(tensor.decode(), plain(codes, zeros, scale, np.arange(K) // 32))


def test_gptq_with_columns_in_the_order_of_their_activations(tmp_path: Path) -> None:
    codes, zeros, scale = random_codes(4, 4)
    group = np.random.default_rng(1).permutation(np.arange(K) // 16).astype(np.int32)
    tensors = {"qweight": words(codes, 4).T, "qzeros": words(((zeros - 1) % 16).T, 4), "scales": scale.T}
    packed = opened(tmp_path, {"quant_method": "gptq", "bits": 4}, tensors | {"g_idx": group})
    tensor = packed.read()
    assert str(tensor.format) == "uint4:g16:f16+order"
    assert np.array_equal(tensor.decode(), plain(codes, zeros, scale, group))


def test_symmetric_gptq_stores_no_zero_points(tmp_path: Path) -> None:
    codes, _, scale = random_codes(4, 1)
    zeros = np.full((N, 1), 8)
    tensors = {"qweight": words(codes, 4).T, "qzeros": words(zeros.T - 1, 4), "scales": scale.T}
    tensor = opened(tmp_path, {"quant_method": "gptq", "bits": 4, "sym": True}, tensors).read()
    assert str(tensor.format) == "int4:f16"
    assert np.array_equal(tensor.decode(), plain(codes, zeros, scale, np.zeros(K, int)))


def test_awq(tmp_path: Path) -> None:
    codes, zeros, scale = random_codes(4, 2)

    def interleaved(matrix: np.ndarray) -> np.ndarray:
        packed = np.zeros((len(matrix), matrix.shape[1] // 8), np.uint32)
        for column in range(packed.shape[1]):
            for nibble, source in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, column] |= matrix[:, 8 * column + source].astype(np.uint32) << np.uint32(4 * nibble)
        return packed.view(np.int32)

    tensors = {"qweight": interleaved(codes.T), "qzeros": interleaved(zeros.T), "scales": scale.T}
    tensor = opened(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 32}, tensors).read()
    assert str(tensor.format) == "uint4:g32:f16"
    assert np.array_equal(tensor.decode(), plain(codes, zeros, scale, np.arange(K) // 32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packed(symmetric: bool, tmp_path: Path) -> None:
    codes, zeros, scale = random_codes(4, 2)
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    tensors = {"weight_packed": words(codes, 4), "weight_scale": scale, "weight_shape": np.array([N, K])}
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.T, 4).T
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}, "format": "pack-quantized"}
    tensor = opened(tmp_path, {"quant_method": "compressed-tensors", **config}, tensors).read()
    assert str(tensor.format) == ("int4:g32:f16" if symmetric else "uint4:g32:f16")
    assert np.array_equal(tensor.decode(), plain(codes, zeros, scale, np.arange(K) // 32))


@pytest.mark.parametrize("scale_shape", [(N, 1), (1,)])
def test_compressed_tensors_int8(scale_shape: tuple[int, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-128, 128, (N, K)).astype(np.int8), rng.random(scale_shape).astype(np.float32)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    tensor = opened(tmp_path, config, {"weight": codes, "weight_scale": scale}).read()
    assert str(tensor.format) == "int8"
    assert np.array_equal(tensor.decode(), codes.astype(np.float32) * scale)


def test_compressed_tensors_nvfp4(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (N, K)).astype(np.uint8)
    scale = rng.uniform(1, 400, (N, K // 16)).astype(ml_dtypes.float8_e4m3fn)
    entries = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale}
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    tensor = opened_float8(tmp_path, config, entries | {"weight_global_scale": np.array([512.0], np.float32)})
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.where(codes >= 8, -1, 1) * magnitudes[codes & 7]
    expected = values * np.repeat(scale.astype(np.float32) / 512, 16, axis=1)
    assert str(tensor.format) == "e2m1:g16:e4m3"
    assert np.allclose(tensor.decode(), expected, rtol=1e-6)


def opened_float8(directory: Path, config: dict, tensors: dict[str, np.ndarray]):
    """As `opened`: older versions of safetensors do not write float8 from numpy, so its header is made here."""
    kinds = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "uint8": "U8", "bfloat16": "BF16"}
    header, data = {}, b""
    for key, array in tensors.items():
        start, data = len(data), data + np.ascontiguousarray(array).tobytes()
        fields = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, len(data)]}
        header[f"{NAME}.{key}"] = fields
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    rest, packed = split_checkpoint(config, open_checkpoint(directory))
    assert not rest
    return packed[f"{NAME}.weight"].read()


def test_float8_in_tiles(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, columns = 160, 256  # the second row of tiles is cut off
    codes = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random((2, 2)).astype(np.float32)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensor = opened_float8(tmp_path, config, {"weight": codes, "weight_scale_inv": scale})
    expected = codes.astype(np.float32) * np.kron(scale, np.ones((128, 128), np.float32))[:rows, :columns]
    assert str(tensor.format) == "e4m3:g128"
    assert np.array_equal(tensor.decode(), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind: str, nested: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (N, K)).astype(np.uint8)
    flat = codes.reshape(-1)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": [N, K]}
    tensors = {"weight": (flat[::2] << 4 | flat[1::2])[:, None]}
    absmax = rng.uniform(0.1, 2, N).astype(np.float32)
    if nested:
        table, codes8 = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32), rng.integers(0, 256, N).astype(np.uint8)
        inner = np.array([0.25], np.float32)
        state |= {"nested_blocksize": 256, "nested_offset": 0.75, "nested_dtype": "float32"}
        absmax = table[codes8] * inner[0] + np.float32(0.75)
        tensors |= {"weight.nested_absmax": inner, "weight.nested_quant_map": table, "weight.absmax": codes8}
    else:
        tensors["weight.absmax"] = absmax
    tensors["weight.quant_map"] = np.zeros(16, np.float32)
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    tensor = opened(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors).read()
    nf4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
           -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
           0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
           0.7229568362236023, 1.0]  # fmt: skip
    fp4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    values = np.array(nf4 if kind == "nf4" else [*fp4, *(-v for v in fp4)], np.float32)
    assert str(tensor.format) == ("nf4:g64" if kind == "nf4" else "bnb4:g64")
    assert np.allclose(tensor.decode(), values[codes] * absmax[:, None], rtol=1e-6)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes, absmax = rng.integers(-127, 128, (N, K)).astype(np.int8), rng.random(N).astype(np.float32)
    tensors = {"weight": codes, "SCB": absmax, "weight_format": np.array(0, np.uint8)}
    tensor = opened(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors).read()
    assert np.allclose(tensor.decode(), codes * absmax[:, None] / 127, rtol=1e-6)


@pytest.mark.parametrize("multiplies", [True, False])
def test_bitnet(multiplies: bool, tmp_path: Path) -> None:
    trits = np.random.default_rng(0).integers(0, 3, (N, K)).astype(np.uint8)
    packed = np.zeros((N // 4, K), np.uint8)
    for i in range(4):
        packed |= trits[i * N // 4 : (i + 1) * N // 4] << (2 * i)
    config = {"quant_method": "bitnet"} | ({"linear_class": "autobitlinear"} if multiplies else {})
    tensor = opened(tmp_path, config, {"weight": packed, "weight_scale": np.array([4.0], np.float32)}).read()
    assert str(tensor.format) == "ternary:tensor"
    assert np.array_equal(tensor.decode(), (trits.astype(np.float32) - 1) * (4 if multiplies else 0.25))


def test_unknown_methods_and_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'quip'"):
        split_checkpoint({"quant_method": "quip"}, {})
    codes, zeros, scale = random_codes(4, 2)
    tensors = {"qweight": words(codes, 4).T, "qzeros": words(zeros.T, 4)[:, :1], "scales": scale.T}
    with pytest.raises(InputError, match=r"zero_point .* shape \[16, 2\]"):
        opened(tmp_path, {"quant_method": "gptq", "bits": 4}, tensors).read().decode()
