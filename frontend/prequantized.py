"""Checkpoints that somebody else quantized: which tensors make up a weight, and what its codes mean.

Each weight becomes a `QuantizedTensor` with the very codes and scales of the checkpoint, one weight at a time: nothing
is decoded to float. Activations are left in float, also where the checkpoint asks for quantized ones.

| method | stored | becomes |
|---|---|---|
| gptq | ``qweight`` [K b / 32, N], ``qzeros`` less 1 (not in v2), ``scales``, ``g_idx`` | int, uint, ``+order`` |
| awq | ``qweight`` [K, N / 8], columns interleaved, ``qzeros``, ``scales`` | uint4 |
| compressed-tensors | ``weight_packed`` [N, K b / 32], or ``weight``; ``weight_scale``... | int, uint, e4m3, e2m1 |
| bitsandbytes | ``weight``, ``weight.absmax``, ``weight.quant_state...``; or int8 with ``SCB`` | nf4, bnb4, int8 |
| fp8 | ``weight`` in float8, ``weight_scale_inv`` per tile | e4m3 |
| bitnet | ``weight`` in bytes of four, along N, ``weight_scale`` | ternary |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.frontend.safetensors_file import Entry
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.quant import Affine, FloatScale, Format, NanoScale, Order, QuantizedTensor, Table

__all__ = ["Packed", "split_checkpoint"]

_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where the nibbles of a word hold the columns 0 to 7."""

_SCALES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized weight of a checkpoint.

    Attributes:
        name: Its name as a float weight: ``model.layers.0.mlp.up_proj.weight``.
        parts: The tensors that it is made of, by what follows the name of the module.
        shape: ``[N, K]``.
        decoder: Makes the tensor of `parts`; called when the weight is read.
    """

    name: str
    parts: Mapping[str, Entry]
    shape: tuple[int, int]
    decoder: Callable[[Packed], QuantizedTensor]

    def read(self) -> QuantizedTensor:
        """Codes and parameters.

        Raises:
            InputError: If they do not fit together.
        """
        try:
            tensor = self.decoder(self)
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(
                f"The tensors of {self.name!r} ({', '.join(self.parts)}) do not fit together: {error!r}. Check that "
                "quantization_config in config.json belongs to these weights."
            ) from error
        found = {"codes": tensor.codes, **tensor.params}
        for stream in tensor.format.streams(self.shape):
            if found[stream.name].shape != stream.shape:
                raise InputError(
                    f"Expected {stream.name} of {self.name!r} of shape {list(stream.shape)} for {tensor.format}, found "
                    f"{list(found[stream.name].shape)}. Check that quantization_config belongs to these weights."
                )
        return tensor

    def array(self, part: str) -> np.ndarray:
        """One of the parts, copied."""
        tensor = self.parts[part].tensor(part)
        array = np.array(tensor.numpy())
        tensor.release()
        return array

    def entry(self) -> Entry:
        """What stands for the weight where only names and shapes matter."""
        first = next(iter(self.parts.values()))
        return Entry(first.file, self.name, ir.DataType.FLOAT, self.shape, 0, 0)


def split_checkpoint(
    config: Mapping[str, Any], checkpoint: Mapping[str, Entry]
) -> tuple[dict[str, Entry], dict[str, Packed]]:
    """Separates the tensors of a checkpoint from its quantized weights.

    Args:
        config: ``quantization_config`` of config.json.
        checkpoint: All tensors by name.

    Returns:
        The other tensors, and the quantized weights by their names as float weights.

    Raises:
        UnsupportedError: If the method is unknown.
    """
    method = str(config.get("quant_method", "")).replace("_", "-")
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in _METHODS:
        raise UnsupportedError(
            f"Expected a checkpoint quantized by {', '.join(_METHODS)}; quantization_config in config.json says "
            f"{method or 'nothing'!r}. Give the float checkpoint it was made from."
        )
    key, parts, find = _METHODS[method]
    packed: dict[str, Packed] = {}
    rest = dict(checkpoint)
    below: dict[str, list[str]] = {}  # weight.absmax and the like, by the weight
    for name in checkpoint:
        above, _, last = name.rpartition(".weight.")
        if above:
            below.setdefault(above, []).append(f"weight.{last}")
    for name in checkpoint:
        module, dot, last = name.rpartition(".")
        if not dot or last not in key:
            continue
        names = (*key, *parts, *below.get(module, ()))
        own = {p: checkpoint[f"{module}.{p}"] for p in names if f"{module}.{p}" in checkpoint}
        found = find(f"{module}.weight", own, config)
        if found is not None:
            packed[found.name] = found
            for part in own:
                rest.pop(f"{module}.{part}", None)
    return rest, packed


def _scale_of(dtype: np.dtype) -> FloatScale:
    found = ir.DataType.from_numpy(dtype)
    return FloatScale(found if found in _SCALES else ir.DataType.FLOAT)


def _unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of rows of 32-bit words, lowest bits first and across words: ``[n, w] -> [n, 32 w / bits]``."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return np.packbits(stream, axis=2, bitorder="little")[..., 0]


def _affine(
    codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray, bits: int, order: np.ndarray | None = None
) -> QuantizedTensor:
    """Unsigned codes ``[N, K]`` with scales and zero points ``[N, groups]``; symmetric if all zeros are the middle."""
    columns, groups = codes.shape[1], scale.shape[1]
    group = None if groups == 1 else -(-columns // groups)
    remainder = None if order is None else Order()
    middle = 1 << (bits - 1)
    scale_type, scale = _scale_of(scale.dtype), np.ascontiguousarray(scale)
    params = {"scale": scale} | ({} if order is None else {"order": order})
    if np.all(zeros == middle) and bits > 1:
        format = Format(Affine(bits), group, scale_type, remainder=remainder)
        return QuantizedTensor(format, (codes.astype(np.int16) - middle).astype(np.int8), params)
    format = Format(Affine(bits, symmetric=False), group, scale_type, remainder=remainder)
    return QuantizedTensor(format, codes, params | {"zero_point": np.ascontiguousarray(zeros.astype(np.uint8))})


def _find_gptq(name: str, parts: Mapping[str, Entry], config: Mapping[str, Any]) -> Packed | None:
    bits = int(config["bits"])
    first = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def read(packed: Packed) -> QuantizedTensor:
        codes = _unpack_words(packed.array("qweight").T, bits)
        scale = packed.array("scales").T
        # Stored minus one; zero itself wraps around.
        stored = _unpack_words(packed.array("qzeros"), bits).T[: len(codes)]
        zeros = (stored + np.uint8(first)) & np.uint8((1 << bits) - 1)
        order = None
        groups, columns = scale.shape[1], codes.shape[1]
        index = packed.array("g_idx") if "g_idx" in packed.parts else np.arange(columns) * groups // columns
        if np.any(np.diff(index) < 0) and groups > 1:
            sizes = np.bincount(index, minlength=groups)
            if np.any(sizes != columns // groups):
                raise InputError(f"Expected groups of one size in {packed.name!r}, found {np.unique(sizes).tolist()}.")
            places = np.argsort(index, kind="stable")
            codes = codes[:, places]
            order = np.empty(columns, np.uint16 if columns <= 1 << 16 else np.int32)
            order[places] = np.arange(columns)
        return _affine(codes, scale, zeros, bits, order)

    rows, columns = parts["scales"].shape[1], parts["qweight"].shape[0] * 32 // bits
    return Packed(name, parts, (rows, columns), read)


def _find_awq(name: str, parts: Mapping[str, Entry], config: Mapping[str, Any]) -> Packed | None:
    bits = int(config.get("bits", config.get("w_bit", 4)))
    if bits != 4:
        raise UnsupportedError(f"Expected AWQ weights of 4 bits, found {bits}. Give the float checkpoint.")

    def unpacked(words: np.ndarray) -> np.ndarray:
        nibbles = _unpack_words(words, 4).reshape(len(words), -1, 8)
        return nibbles[..., _AWQ_ORDER].reshape(len(words), -1)

    def read(packed: Packed) -> QuantizedTensor:
        codes, zeros = (np.ascontiguousarray(unpacked(packed.array(p)).T) for p in ("qweight", "qzeros"))
        return _affine(codes, packed.array("scales").T, zeros, 4)

    return Packed(name, parts, (parts["scales"].shape[1], parts["qweight"].shape[0]), read)


def _find_compressed(name: str, parts: Mapping[str, Entry], config: Mapping[str, Any]) -> Packed | None:
    if "weight_packed" in parts and "weight_global_scale" in parts:
        return Packed(name, parts, _doubled(parts["weight_packed"].shape), _read_nvfp4)
    if "weight_packed" in parts:
        weights = next(iter(config.get("config_groups", {}).values()), {}).get("weights") or {}
        bits = int(weights.get("num_bits", 4))
        rows, words = parts["weight_packed"].shape
        return Packed(name, parts, (rows, _columns(parts, words * 32 // bits)), _compressed_reader(bits))
    if "weight" not in parts or "weight_scale" not in parts or parts["weight"].dtype.is_floating_point():
        floating = "weight" in parts and parts["weight"].dtype == ir.DataType.FLOAT8E4M3FN
        return Packed(name, parts, _pair(parts["weight"].shape), _read_float8) if floating else None
    return Packed(name, parts, _pair(parts["weight"].shape), _read_int8)


def _columns(parts: Mapping[str, Entry], stored: int) -> int:
    """K of packed rows: padding fills their last word, and ``weight_shape`` says where it begins."""
    if "weight_shape" not in parts:
        return stored
    tensor = parts["weight_shape"].tensor("weight_shape")
    columns = int(tensor.numpy()[1])
    tensor.release()
    return columns


def _compressed_reader(bits: int) -> Callable[[Packed], QuantizedTensor]:
    def read(packed: Packed) -> QuantizedTensor:
        rows, columns = packed.shape
        codes = np.ascontiguousarray(_unpack_words(packed.array("weight_packed"), bits)[:, :columns])
        scale = packed.array("weight_scale").reshape(rows, -1)
        zeros = np.full(scale.shape, 1 << (bits - 1), np.uint8)
        if "weight_zero_point" in packed.parts:
            stored = packed.array("weight_zero_point")
            if stored.dtype == np.int32 and stored.shape != scale.shape:
                zeros = np.ascontiguousarray(_unpack_words(np.ascontiguousarray(stored.T), bits).T[:rows])
            else:
                zeros = (stored.astype(np.int16).reshape(scale.shape) + (1 << (bits - 1))).astype(np.uint8)
        if "weight_g_idx" in packed.parts and np.any(np.diff(packed.array("weight_g_idx")) < 0):
            raise UnsupportedError(f"{packed.name!r} has groups that are not neighbours. Give the float checkpoint.")
        return _affine(codes, scale, zeros, bits)

    return read


def _read_int8(packed: Packed) -> QuantizedTensor:
    """Signed bytes with a scale per row, per group or for all."""
    codes, scale = packed.array("weight"), packed.array("weight_scale")
    rows = packed.shape[0]
    scale = np.full((rows, 1), scale.reshape(-1)[0]) if scale.size == 1 else scale.reshape(rows, -1)
    zeros = np.full(scale.shape, 128, np.uint8)
    if "weight_zero_point" in packed.parts:
        zeros = (packed.array("weight_zero_point").astype(np.int16).reshape(scale.shape) + 128).astype(np.uint8)
    return _affine((codes.astype(np.int16) + 128).astype(np.uint8), scale, zeros, 8)


def _read_float8(packed: Packed) -> QuantizedTensor:
    """E4M3 with a scale for all, per row, or per tile of rows and columns."""
    rows, columns = packed.shape
    codes = packed.array("weight").view(np.uint8)
    part = "weight_scale_inv" if "weight_scale_inv" in packed.parts else "weight_scale"
    scale = packed.array(part)
    scale = scale.reshape(-1, scale.shape[-1]) if scale.ndim > 1 else scale.reshape(-1, 1)
    scale = np.repeat(scale, _tile(rows, len(scale)), axis=0)[:rows]
    group = None if scale.shape[1] == 1 else _tile(columns, scale.shape[1])
    format = Format(Table("e4m3"), group, _scale_of(scale.dtype))
    return QuantizedTensor(format, codes, {"scale": np.ascontiguousarray(scale)})


def _tile(length: int, groups: int) -> int:
    """The power of two that cuts a length into so many groups, the last one shorter; else their mean."""
    found = [1 << n for n in range(4, 16) if -(-length // (1 << n)) == groups]
    return found[0] if found and groups > 1 else -(-length // groups)


def _read_nvfp4(packed: Packed) -> QuantizedTensor:
    """Two E2M1 codes per byte, the first in the low half; the global scale divides."""
    bytes_ = packed.array("weight_packed")
    codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(len(bytes_), -1)
    unit = np.float32(1) / packed.array("weight_global_scale").astype(np.float32).reshape(1)
    params = {"scale": packed.array("weight_scale"), "scale_unit": unit}
    return QuantizedTensor(Format(Table("e2m1"), 16, NanoScale()), codes, params)


def _find_float8(name: str, parts: Mapping[str, Entry], config: Mapping[str, Any]) -> Packed | None:
    if "weight_scale_inv" not in parts or parts["weight"].dtype != ir.DataType.FLOAT8E4M3FN:
        return None
    return Packed(name, parts, _pair(parts["weight"].shape), _read_float8)


def _find_bitsandbytes(name: str, parts: Mapping[str, Entry], config: Mapping[str, Any]) -> Packed | None:
    if "SCB" in parts:
        return Packed(name, parts, _pair(parts["weight"].shape), _read_scb)
    state_part = next((p for p in parts if p.startswith("weight.quant_state")), None)
    if state_part is None:
        return None
    tensor = parts[state_part].tensor(state_part)
    state = json.loads(bytes(np.array(tensor.numpy()).astype(np.uint8)).decode())
    tensor.release()

    def read(packed: Packed) -> QuantizedTensor:
        rows, columns = packed.shape
        block = int(state["blocksize"])
        if columns % block:
            raise UnsupportedError(
                f"{packed.name!r} has rows of {columns}, and blocks of {block} cross them. Give the float checkpoint."
            )
        bytes_ = packed.array("weight").reshape(-1)
        codes = np.stack([bytes_ >> 4, bytes_ & 15], axis=-1).reshape(rows, columns)
        scale = packed.array("weight.absmax")
        if "weight.nested_absmax" in packed.parts:
            inner = packed.array("weight.nested_absmax").astype(np.float32)
            size = int(state["nested_blocksize"])
            values = packed.array("weight.nested_quant_map").astype(np.float32)[scale]
            scale = values * np.repeat(inner, size)[: len(values)] + np.float32(state["nested_offset"])
        table = Table("nf4" if str(state["quant_type"]) == "nf4" else "bnb4")
        params = {"scale": scale.astype(np.float32).reshape(rows, -1)}
        return QuantizedTensor(Format(table, block), codes, params)

    rows, columns = (int(n) for n in state["shape"])
    return Packed(name, parts, (rows, columns), read)


def _read_scb(packed: Packed) -> QuantizedTensor:
    """LLM.int8: absmax per row."""
    scale = packed.array("SCB").astype(np.float32).reshape(-1, 1) / np.float32(127)
    return QuantizedTensor(Format(Affine(8)), packed.array("weight").view(np.int8), {"scale": scale})


def _find_bitnet(name: str, parts: Mapping[str, Entry], config: Mapping[str, Any]) -> Packed | None:
    if parts["weight"].dtype != ir.DataType.UINT8 or "weight_scale" not in parts:
        return None
    multiplies = config.get("linear_class") == "autobitlinear"

    def read(packed: Packed) -> QuantizedTensor:
        bytes_ = packed.array("weight")
        codes = np.concatenate([bytes_ >> np.uint8(2 * i) & np.uint8(3) for i in range(4)], axis=0)
        if codes.max(initial=0) > 2:
            raise InputError(f"Expected ternary codes 0, 1 and 2 in {packed.name!r}, found 3. The file is damaged.")
        scale = packed.array("weight_scale").astype(np.float32).reshape(1, 1)
        format = Format(Table("ternary"), axis="tensor")
        return QuantizedTensor(format, codes, {"scale": scale if multiplies else 1 / scale})

    rows, columns = parts["weight"].shape
    return Packed(name, parts, (4 * rows, columns), read)


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _doubled(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, 2 * columns


_Find = Callable[[str, Mapping[str, Entry], Mapping[str, Any]], Packed | None]

_COMPRESSED = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
               "input_scale", "input_zero_point", "input_global_scale")  # fmt: skip

_METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...], _Find]] = {
    "gptq": (("qweight",), ("qzeros", "scales", "g_idx"), _find_gptq),
    "awq": (("qweight",), ("qzeros", "scales"), _find_awq),
    "compressed-tensors": (("weight_packed", "weight"), _COMPRESSED, _find_compressed),
    "bitsandbytes": (("weight",), ("SCB", "weight_format"), _find_bitsandbytes),
    "fp8": (("weight",), ("weight_scale_inv", "input_scale", "activation_scale"), _find_float8),
    "bitnet": (("weight",), ("weight_scale",), _find_bitnet),
}
"""By method: which tensor marks a quantized weight, which others belong to it, and what finds out what it is."""
