"""`Format` and `QuantizedTensor`: see `qc.ir.quant`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qc.ir._quant_affine import Affine
from qc.ir._quant_learned import SignedLowRank
from qc.ir._quant_remainder import Remainder
from qc.ir._quant_scales import FloatScale, NoScale, Scale
from qc.ir._quant_spelling import parse
from qc.ir._quant_tables import Table
from qc.ir._quant_types import Stream, ValueMap
from qc.ir.errors import InputError

__all__ = ["Format", "QuantizedTensor"]

_FLOAT8 = {"e4m3": ir.DataType.FLOAT8E4M3FN, "e5m2": ir.DataType.FLOAT8E5M2}


@dataclasses.dataclass(frozen=True)
class Format:
    """The meaning of a quantized weight ``[N, K]`` (output channels first).

    Attributes:
        values: The value map of a code.
        group: Number of consecutive elements along the axis of groups that share parameters; None: all of them.
        scale: Storage of the scales.
        axis: Where groups lie: ``in`` (along K; None is per output channel), ``out`` (along N; None is per input
            channel) or ``tensor`` (one scale for all).
        remainder: What is done to the decoded values, if anything; grouping, values and scale then describe the dense
            part.
    """

    values: ValueMap
    group: int | None = None
    scale: Scale = dataclasses.field(default_factory=FloatScale)
    axis: str = "in"
    remainder: Remainder | None = None

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise InputError(f"Expected a group of at least 1 element, or none for per channel; found {self.group}.")
        if self.axis not in ("in", "out", "tensor") or (self.axis == "tensor" and self.group is not None):
            raise InputError(f"Expected groups along in or out, or one per tensor; found {self.axis}, {self.group}.")
        if self.values.scaled == isinstance(self.scale, NoScale):
            wanted = "scales" if self.values.scaled else "no scales, its values are absolute"
            raise InputError(f"Expected {self.values} with {wanted}; found {self.scale or 'none'}.")
        if self.group is not None and (self.group % self.values.tile or isinstance(self.values, SignedLowRank)):
            raise InputError(f"Expected groups that {self.values} can express, found {self.group}.")

    @classmethod
    def parse(cls, text: str) -> Format:
        """Reads the spelling that `str` writes: ``int4``, ``nf4:g64:q8x256``, ``lut3+sparse0.45``, or a standard name.

        Values come first: ``int`` is symmetric, ``uint`` asymmetric; see `qc formats`. Then the grouping, absent for
        per output channel: ``gN`` along K, ``in`` or ``inN`` along N, ``tensor``. Then the storage of scales: ``f32``
        if absent, ``f16``, ``bf16``, ``e8m0``, ``e4m3``, or ``q8x16`` for 8-bit codes with a half per 16 groups.

        Raises:
            InputError: If `text` is not such a spelling.
        """
        return parse(text, cls)

    def __str__(self) -> str:
        if self.axis == "tensor":
            group = ":tensor"
        elif self.axis == "out":
            group = f":in{self.group or ''}"
        else:
            group = "" if self.group is None else f":g{self.group}"
        scale = "" if self.scale == FloatScale() or isinstance(self.scale, NoScale) else f":{self.scale}"
        return f"{self.values}{group}{scale}" + ("" if self.remainder is None else f"+{self.remainder}")

    def groups(self, columns: int) -> int:
        """Number of groups along an axis of `columns` elements; the last one may be shorter."""
        return 1 if self.group is None else -(-columns // self.group)

    def width(self, columns: int) -> int:
        """Elements in a group, but for a last one that is shorter."""
        return columns if self.group is None or self.group > columns else self.group

    @property
    def per_row(self) -> bool:
        """Whether an output channel has one scale, and shares it with no other."""
        return self.axis == "in" and self.group is None

    @property
    def native(self) -> ir.DataType | None:
        """Element type of codes and zero points if ``DequantizeLinear`` expresses the format, else None."""
        if self.remainder is not None or self.scale not in (FloatScale(), FloatScale(ir.DataType.FLOAT16)):
            return None
        if isinstance(self.values, Affine):
            return self.values.dtype
        return _FLOAT8.get(self.values.name) if isinstance(self.values, Table) else None

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the scales of a weight of that shape ``[N, K]``, and of every parameter of a group.

        Of formats whose groups lie along N, that is ``[K, groups]``: they are those of the transposed weight.
        """
        if self.axis == "tensor":
            return 1, 1
        rows, columns = shape if self.axis == "in" else shape[::-1]
        return rows, self.groups(columns)

    def streams(self, shape: tuple[int, ...]) -> list[Stream]:
        """Everything that is stored for a weight of that shape ``[N, K]``: codes, scales, other parameters.

        Raises:
            InputError: If the format cannot express the shape.
        """
        if self.remainder is not None:
            dense = dataclasses.replace(self, remainder=None)
            return [*(s.packed for s in dense.streams(self.remainder.inner(shape))), *self.remainder.streams(shape)]
        rows, columns = shape if self.axis != "out" else shape[::-1]
        count, rest = divmod(columns, self.values.tile)
        if rest:
            raise InputError(f"Expected rows of a multiple of {self.values.tile} for {self.values}, found {columns}.")
        grid = self.grid(shape)
        codes = Stream("codes", (rows, count * self.values.books), bits=self.values.bits, low=self.values.low)
        params = [p.stream(*grid, columns) for p in self.values.params]
        found = [codes, *self.scale.streams(*grid), *params]
        if self.native is not None:
            found = [dataclasses.replace(s, dtype=self.native) if s.name != "scale" else s for s in found]
        return found if self.axis == "in" else [dataclasses.replace(s, by_row=False) for s in found]

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """All bits that a weight of that shape occupies as initializers: codes, scales, zero points, byte padding."""
        return 8 * sum(s.nbytes for s in self.streams(shape))

    def bits_per_group(self) -> int:
        """Bits that one more group costs beside its codes."""
        few, more = (sum(s.nbytes for s in self._of_groups(n)) for n in (64, 128))
        return 8 * (more - few) // 64

    def _of_groups(self, groups: int) -> list[Stream]:
        params = [p.stream(1, groups, groups) for p in self.values.params if p.scope == "group"]
        return [*self.scale.streams(1, groups), *params]

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The definition of the format.

        Args:
            codes: ``[N, K]`` integers for most formats; see `streams` and `QuantizedTensor`.
            params: ``scale`` ``[N, groups]``, and ``zero_point`` ``[N, groups]`` if asymmetric; see `streams`.

        Returns:
            The weight, float32 ``[N, K]``.
        """
        rows, columns = codes.shape[0], codes.shape[1] // self.values.books * self.values.tile
        groups, width = self.groups(columns), self.width(columns)
        units = self.values.decode(self._by_group(codes, groups), self.by_group(params, rows, groups))
        units = units.reshape(rows, groups, width)
        scale = self.scale.decode(params)
        dense = (units * scale.reshape(*scale.shape, 1)).reshape(rows, -1)[:, :columns]
        dense = dense.T if self.axis == "out" else dense
        return dense if self.remainder is None else self.remainder.decode(dense, params)

    def nearest(self, weight: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The codes nearest to a float32 matrix under given parameters, each element (or tile) on its own.

        The matrix is the weight ``[N, K]``, or the dense part of it if there is a remainder.
        """
        weight = weight.T if self.axis == "out" else weight
        rows, columns = weight.shape
        groups, width = self.groups(columns), self.width(columns)
        padded = _padded(weight, groups * width).reshape(rows, groups, width)
        scale = self.scale.decode(params)
        units = (padded / scale.reshape(*scale.shape, 1)).reshape(rows * groups, width)
        codes = self.values.nearest(units, self.by_group(params, rows, groups))
        return np.ascontiguousarray(codes.reshape(rows, -1)[:, : columns // self.values.tile * self.values.books])

    def by_group(self, params: Mapping[str, np.ndarray], rows: int, groups: int) -> dict[str, np.ndarray]:
        """The parameters of the value map as `ValueMap` takes them: ``[rows * groups, ...]``, or ``[1, ...]``."""
        found = {}
        for param in self.values.params:
            array = params[param.name]
            if param.scope == "group":
                array = array.reshape(-1, *param.shape)
            elif param.scope == "row" and groups > 1:
                array = np.repeat(array, groups, axis=0)
            found[param.name] = array
        return found

    def _by_group(self, codes: np.ndarray, groups: int) -> np.ndarray:
        if groups == 1 or self.group is None:
            return codes
        width = self.group // self.values.tile * self.values.books
        return _padded(codes, groups * width).reshape(-1, width)


def _padded(array: np.ndarray, columns: int) -> np.ndarray:
    missing = columns - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing))) if missing else array


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight, outside of any graph.

    Attributes:
        format: What the codes mean.
        codes: ``[N, K]``, int8 or uint8, one code per element; other shapes where `Format.streams` says so. Of formats
            whose groups lie along N, codes and parameters are those of the transposed weight.
        params: ``scale`` and what else `Format.streams` lists, in their stored precision.
    """

    format: Format
    codes: np.ndarray
    params: Mapping[str, np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        values = self.format.values
        shape = self.codes.shape[0], self.codes.shape[1] // values.books * values.tile
        shape = shape[::-1] if self.format.axis == "out" else shape
        return (shape[0], len(self.params["order"])) if "order" in self.params else shape

    def decode(self) -> np.ndarray:
        """The weight that the codes stand for, float32 ``[N, K]``."""
        return self.format.decode(self.codes, self.params)

    @property
    def sliceable(self) -> bool:
        """Whether rows can be decoded without the others."""
        remainder = self.format.remainder
        return self.format.axis == "in" and (remainder is None or remainder.sliceable)

    def rows(self, part: slice | np.ndarray) -> QuantizedTensor:
        """Some of the rows, sharing memory if `part` is a slice; of `sliceable` tensors."""
        by_row = {s.name: s.by_row for s in self.format.streams(self.shape)}
        params = {name: array[part] if by_row[name] else array for name, array in self.params.items()}
        return QuantizedTensor(self.format, self.codes[part], params)

    @property
    def stored_bits(self) -> int:
        """All stored bits; equals the bytes of the initializers times 8."""
        return self.format.stored_bits(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        rows, columns = self.shape
        return self.stored_bits / (rows * columns)
