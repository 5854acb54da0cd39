"""What kernels of integers ask about quantized values, whatever runtime they are of."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import Affine, QuantizedTensor, Select, Table
from qc.passes.canonicalize._graph import made_by

__all__ = ["KERNEL_BITS", "Integers", "code_bits", "integers_of", "rounded_source"]

KERNEL_BITS = (2, 4, 8)
"""Widths of integers that kernels multiply."""

_MULTIPLES = (1, 2, 4, 8, 16)


def rounded_source(x: ir.Value | None) -> ir.Node | None:
    """The node that rounds x, to codes or to a grid; None if x is anything else."""
    if x is not None and dialect.is_op(x.producer(), "DynamicQuantize"):
        return x.producer()
    decode = made_by(x, "DequantizeLinear")
    source = made_by(decode.inputs[0], "DynamicQuantizeLinear", "QuantizeLinear") if decode is not None else None
    if decode is None or source is None:
        return None
    grid = source.outputs[1:] if source.op_type == "DynamicQuantizeLinear" else source.inputs[1:]
    return source if tuple(decode.inputs[1:]) == tuple(grid) else None


def code_bits(source: ir.Node) -> int:
    """Width of the codes that a node found by `rounded_source` makes."""
    if "bits" in source.attributes:
        return source.attributes["bits"].as_int()
    return source.outputs[0].dtype.bitwidth if source.outputs[0].dtype is not None else 8


@dataclasses.dataclass(frozen=True)
class Integers:
    """Values as multiples of ``1 / multiple``.

    Attributes:
        codes: The integer of each code, by kind if there are several tables; None for codes with a zero point, which
            stay as they are.
        bits: Bits that hold them.
        multiple: A power of two.
    """

    codes: np.ndarray | None
    bits: int
    multiple: int

    def of(self, tensor: QuantizedTensor) -> np.ndarray:
        """The integers of all codes of a tensor whose values these are."""
        assert self.codes is not None
        codes = tensor.codes.astype(np.int16) - tensor.format.values.low
        if self.codes.ndim == 1:
            return self.codes[codes]
        rows, columns = tensor.shape
        kinds = np.broadcast_to(tensor.params["kind"], (rows, tensor.format.groups(columns)))
        return self.codes[np.repeat(kinds, tensor.format.width(columns), 1)[:, :columns], codes]


def integers_of(values: object) -> Integers | None:
    """The values of a value map as multiples of one number that fit 8 bits; None if they are none."""
    if isinstance(values, Affine):
        if values.floating:
            return None
        if not values.symmetric:
            return Integers(None, values.bits, 1)
        codes = np.arange(values.low, values.high + 1)
        return _fitting(2 * codes + 1 if values.half else codes, 2 if values.half else 1)
    if not isinstance(values, (Table, Select)):
        return None
    table = np.nan_to_num(values.values.astype(np.float64), nan=np.inf)
    for multiple in _MULTIPLES:
        if np.all(np.isfinite(table)) and np.all(table * multiple == np.rint(table * multiple)):
            return _fitting((table * multiple).astype(np.int64), multiple)
    return None


def _fitting(codes: np.ndarray, multiple: int) -> Integers | None:
    for bits in KERNEL_BITS:
        if codes.min() >= -(1 << (bits - 1)) and codes.max() < 1 << (bits - 1):
            return Integers(codes.astype(np.int8), bits, multiple)
    return None
