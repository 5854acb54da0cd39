"""Affine values: codes on a uniform grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qc.ir._quant_types import Param
from qc.ir.errors import InputError

__all__ = ["AFFINE_TYPES", "Affine"]

AFFINE_TYPES = {
    (2, True): ir.DataType.INT2,
    (2, False): ir.DataType.UINT2,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}
"""ONNX element types of affine codes by bits and symmetry."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """The value map ``w = (q - z) * s`` with a per-group scale s and zero point z.

    Attributes:
        bits: Width of a code, 1 to 8.
        symmetric: True: z is fixed and codes lie in ``[-2^(b-1), 2^(b-1) - 1]``. False: z is stored and codes lie in
            ``[0, 2^b - 1]``.
        half: Of symmetric codes: z = -1/2, so that values are ``..., -s/2, s/2, ...``, none of them zero: the best
            grid of 1 and 2 bits, and the sum of b binary planes whose scales are powers of two.
        floating: Of asymmetric codes: z is stored in half precision instead of as a code.
    """

    bits: int
    symmetric: bool = True
    half: bool = False
    floating: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or (self.bits == 1 and self.symmetric and not self.half):
            raise InputError(
                f"Expected affine codes of 2 to 8 bits (mid and uint: from 1 bit), found {self.bits}. See `qc formats`."
            )
        if (self.half and not self.symmetric) or (self.floating and self.symmetric):
            raise InputError("Expected half offsets of symmetric codes only, and float zero points of asymmetric ones.")

    def __str__(self) -> str:
        kind = "mid" if self.half else "int" if self.symmetric else "zint" if self.floating else "uint"
        return f"{kind}{self.bits}"

    tile = books = 1
    scaled = True

    @property
    def dtype(self) -> ir.DataType | None:
        """ONNX element type of the codes and zero points; None if there is none of these bits."""
        standard = not self.half and not self.floating
        return AFFINE_TYPES.get((self.bits, self.symmetric)) if standard else None

    @property
    def params(self) -> tuple[Param, ...]:
        """The zero point, if it is stored."""
        if self.symmetric:
            return ()
        if self.floating:
            return (Param("zero_point", "group", dtype=ir.DataType.FLOAT16),)
        return (Param("zero_point", "group", bits=self.bits),)

    @property
    def about(self) -> str:
        """One line for listings."""
        kind = "symmetric" if self.symmetric else "asymmetric, integer zero point"
        kind = "symmetric without a zero, half offset" if self.half else "float zero point" if self.floating else kind
        return f"affine, {self.bits} bits, {kind}"

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """Largest code."""
        return self.low + (1 << self.bits) - 1

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        ends = np.array([[self.low, self.high]], np.int16)
        units = self.decode(ends if self.symmetric else np.repeat(ends, len(params["zero_point"]), axis=0), params)
        return units[:, :1], units[:, 1:]

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        units = codes.astype(np.float32)
        if self.half:
            units += np.float32(0.5)
        if not self.symmetric:
            units -= params["zero_point"].astype(np.float32)[:, None]
        return units

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Rounds half to even; of half-offset codes, half down to the lower code."""
        if self.half:
            codes = np.ceil(units) - 1
        elif self.symmetric:
            codes = np.rint(units)
        elif self.floating:
            codes = np.rint(units + params["zero_point"].astype(np.float32)[:, None])
        else:
            codes = np.rint(units) + params["zero_point"].astype(np.float32)[:, None]
        return np.clip(codes, self.low, self.high).astype(np.int8 if self.symmetric else np.uint8)
