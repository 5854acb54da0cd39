"""How scales are stored: a part of a format that is independent of what the codes mean.

`encode` rounds float scales to what is stored, `decode` says what that stands for. Codes are always chosen for decoded
scales. A scale never rounds to zero.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qc.ir._quant_types import Stream
from qc.ir.errors import InputError

__all__ = ["FLOAT_SCALES", "FloatScale", "MicroScale", "NanoScale", "NoScale", "Scale", "TwoLevel", "parse_scale"]

FLOAT_SCALES = {"f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


class Scale(Protocol):
    """The storage of the scales ``[N, groups]`` of a weight."""

    def streams(self, rows: int, groups: int) -> list[Stream]:
        """What is stored."""
        ...

    def encode(self, scale: np.ndarray, name: str = "weight") -> dict[str, np.ndarray]:
        """Rounds float32 scales ``[N, groups]`` to their storage.

        Raises:
            InputError: If one is too large for it.
        """
        ...

    def decode(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The scales that the codes are multiplied with, float32 ``[N, groups]``."""
        ...


@dataclasses.dataclass(frozen=True)
class FloatScale:
    """One float per group.

    Attributes:
        dtype: FLOAT, FLOAT16 or BFLOAT16.
    """

    dtype: ir.DataType = ir.DataType.FLOAT

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_SCALES.values():
            raise InputError(f"Expected scales in {', '.join(FLOAT_SCALES)}, found {self.dtype.name}.")

    @property
    def largest(self) -> float:
        """The largest scale that it holds."""
        return float(ml_dtypes.finfo(self.dtype.numpy()).max)

    def __str__(self) -> str:
        return next(name for name, dtype in FLOAT_SCALES.items() if dtype == self.dtype)

    def streams(self, rows: int, groups: int) -> list[Stream]:
        return [Stream("scale", (rows, groups), self.dtype)]

    def encode(self, scale: np.ndarray, name: str = "weight") -> dict[str, np.ndarray]:
        return {"scale": _stored(scale, self.dtype, name)}

    def decode(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return params["scale"].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class NoScale:
    """None: the values are absolute."""

    def __str__(self) -> str:
        return ""

    def streams(self, rows: int, groups: int) -> list[Stream]:
        return []

    def encode(self, scale: np.ndarray, name: str = "weight") -> dict[str, np.ndarray]:
        return {}

    def decode(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.ones((1, 1), np.float32)


@dataclasses.dataclass(frozen=True)
class MicroScale:
    """Powers of two in a byte, ``2^(q - 127)``: E8M0 of the OCP's microscaling formats. Code 255 is NaN."""

    def __str__(self) -> str:
        return "e8m0"

    def streams(self, rows: int, groups: int) -> list[Stream]:
        return [Stream("scale", (rows, groups), ir.DataType.UINT8)]

    def encode(self, scale: np.ndarray, name: str = "weight") -> dict[str, np.ndarray]:
        """Rounds to the nearest exponent; the sign is lost."""
        exponent = np.rint(np.log2(np.maximum(np.abs(scale), np.float32(2.0**-126)).astype(np.float64)))
        return {"scale": np.clip(exponent + 127, 0, 254).astype(np.uint8)}

    def decode(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        codes = params["scale"].astype(np.int32)
        powers = np.ldexp(np.float32(1), np.minimum(codes, 254) - 127)
        return np.where(codes == 255, np.float32(np.nan), powers)


@dataclasses.dataclass(frozen=True)
class NanoScale:
    """FLOAT8E4M3FN times one float32 per weight: NVFP4's scales."""

    def __str__(self) -> str:
        return "e4m3"

    def streams(self, rows: int, groups: int) -> list[Stream]:
        return [
            Stream("scale", (rows, groups), ir.DataType.FLOAT8E4M3FN),
            Stream("scale_unit", (1,), ir.DataType.FLOAT, by_row=False),
        ]

    def encode(self, scale: np.ndarray, name: str = "weight") -> dict[str, np.ndarray]:
        """The largest scale becomes 448, the largest number of the type."""
        unit = np.maximum(np.abs(scale).max() / np.float32(448), np.float32(1e-38))
        codes = np.copysign(np.maximum(np.abs(scale / unit), np.float32(2.0**-9)), scale)
        return {"scale": codes.astype(ml_dtypes.float8_e4m3fn), "scale_unit": np.array([unit], np.float32)}

    def decode(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return params["scale"].astype(np.float32) * params["scale_unit"]


@dataclasses.dataclass(frozen=True)
class TwoLevel:
    """Codes times a half-precision scale per run of groups, or per row: double quantization, K-quants, DGQ.

    Attributes:
        bits: Width of a code, 2 to 8.
        run: Groups that share the outer scale; None for all of a row.
        signed: Whether scales may be negative; the codes then are ``-(2^(b-1) - 1)`` to ``2^(b-1) - 1``, offset by
            ``2^(b-1)`` as stored.
    """

    bits: int
    run: int | None = None
    signed: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or (self.run is not None and self.run < 1):
            raise InputError(f"Expected scales of 2 to 8 bits in runs of at least one group, found {self}.")

    def __str__(self) -> str:
        return f"{'s' if self.signed else 'q'}{self.bits}" + ("" if self.run is None else f"x{self.run}")

    def streams(self, rows: int, groups: int) -> list[Stream]:
        runs = 1 if self.run is None else -(-groups // self.run)
        return [
            Stream("scale", (rows, groups), bits=self.bits),
            Stream("scale_unit", (rows, runs), ir.DataType.FLOAT16),
        ]

    def encode(self, scale: np.ndarray, name: str = "weight") -> dict[str, np.ndarray]:
        rows, groups = scale.shape
        run = groups if self.run is None else self.run
        runs = -(-groups // run)
        magnitudes = np.zeros((rows, runs * run), np.float32)
        magnitudes[:, :groups] = np.abs(scale)
        top = (1 << (self.bits - 1 if self.signed else self.bits)) - 1
        unit = _stored(magnitudes.reshape(rows, runs, run).max(axis=2) / np.float32(top), ir.DataType.FLOAT16, name)
        codes = np.rint(magnitudes[:, :groups] / np.repeat(unit.astype(np.float32), run, axis=1)[:, :groups])
        codes = np.clip(codes, 1, top)
        if self.signed:
            codes = np.copysign(codes, scale) + (1 << (self.bits - 1))
        return {"scale": codes.astype(np.uint8), "scale_unit": unit}

    def decode(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        codes = params["scale"].astype(np.float32)
        if self.signed:
            codes -= np.float32(1 << (self.bits - 1))
        groups = codes.shape[1]
        run = groups if self.run is None else self.run
        return codes * np.repeat(params["scale_unit"].astype(np.float32), run, axis=1)[:, :groups]


def parse_scale(text: str) -> Scale | None:
    """Reads ``f32``, ``f16``, ``bf16``, ``e8m0``, ``e4m3``, ``q8``, ``q6x8`` or ``s6x16``; None if it is neither."""
    if text in FLOAT_SCALES:
        return FloatScale(FLOAT_SCALES[text])
    if text in ("e8m0", "e4m3"):
        return MicroScale() if text == "e8m0" else NanoScale()
    match = re.fullmatch(r"([qs])(\d)(?:x(\d+))?", text)
    if match is None:
        return None
    return TwoLevel(int(match[2]), int(match[3]) if match[3] else None, match[1] == "s")


def _stored(scale: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """Rounds scales to a float type, never to zero."""
    kind = ml_dtypes.finfo(dtype.numpy())
    largest = float(np.abs(scale).max(initial=0))
    if largest > float(kind.max):
        raise InputError(
            f"Expected scales of {name!r} up to {float(kind.max):.3g}, the largest number that {dtype.name} holds; "
            f"found {largest:.3g}. Store its scales in f32."
        )
    tiny = float(kind.smallest_subnormal)
    return np.copysign(np.maximum(np.abs(scale), tiny), scale).astype(dtype.numpy())
