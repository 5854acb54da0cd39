"""What is done to the decoded values: additions, exceptions and the order of columns.

A remainder is stored in half precision unless said otherwise, and computed from the *decoded* dense part, so it makes
up for all that the codes leave.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from qc.ir._quant_types import Stream
from qc.ir.errors import InputError

if TYPE_CHECKING:
    from qc.ir._quant_format import Format

__all__ = ["Columns", "LowRank", "Order", "Remainder", "Sparse", "parse_remainder"]


class Remainder(Protocol):
    """The part of a format that acts on the decoded matrix.

    Attributes:
        sliceable: Whether it acts on each row alone.
    """

    sliceable: bool

    def inner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the dense part of a weight ``[N, K]``."""
        ...

    def streams(self, shape: tuple[int, ...]) -> list[Stream]:
        """What is stored."""
        ...

    def decode(self, dense: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weight ``[N, K]``, given its decoded dense part."""
        ...


def _index_type(count: int) -> ir.DataType:
    return ir.DataType.UINT16 if count <= 1 << 16 else ir.DataType.INT32


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Adds half-precision values at single places, stored row by row.

    Attributes:
        percent: Share of the elements, in percent.
    """

    percent: float

    sliceable = False

    def __str__(self) -> str:
        return f"sparse{self.percent:g}"

    def count(self, shape: tuple[int, ...]) -> int:
        """Number of the places."""
        return min(shape[0] * shape[1], max(1, round(shape[0] * shape[1] * self.percent / 100)))

    def inner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], shape[1]

    def streams(self, shape: tuple[int, ...]) -> list[Stream]:
        count = self.count(shape)
        return [
            Stream("sparse_values", (count,), ir.DataType.FLOAT16, by_row=False),
            Stream("sparse_columns", (count,), _index_type(shape[1]), by_row=False),
            Stream("sparse_counts", (shape[0],), _index_type(shape[1] + 1), by_row=False),
        ]

    def decode(self, dense: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        rows = np.repeat(np.arange(len(dense)), params["sparse_counts"].astype(np.int64))
        out = dense.copy()
        out[rows, params["sparse_columns"]] += params["sparse_values"].astype(np.float32)
        return out


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Adds ``A B`` in half precision.

    Attributes:
        rank: Columns of A.
    """

    rank: int

    sliceable = True

    def __str__(self) -> str:
        return f"lowrank{self.rank}"

    def inner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], shape[1]

    def streams(self, shape: tuple[int, ...]) -> list[Stream]:
        return [
            Stream("lowrank_left", (shape[0], self.rank), ir.DataType.FLOAT16),
            Stream("lowrank_right", (self.rank, shape[1]), ir.DataType.FLOAT16, by_row=False),
        ]

    def decode(self, dense: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return dense + params["lowrank_left"].astype(np.float32) @ params["lowrank_right"].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Stores some columns in another format; the dense part holds the others only.

    That format may hold some of its columns in yet another one: three widths in one weight, as SliM-LLM has
    (arXiv 2405.14917).

    Attributes:
        percent: Share of the columns, in percent.
        format: Theirs, with groups along K, and no remainder but columns.
    """

    percent: float
    format: Format

    sliceable = True

    def __post_init__(self) -> None:
        other = self.format.remainder is not None and not isinstance(self.format.remainder, Columns)
        if not 0 < self.percent < 100 or self.format.axis != "in" or other:
            raise InputError(f"Expected a share of the columns in a format with groups along K, found {self}.")

    def __str__(self) -> str:
        return f"columns{self.percent:g}:{self.format}"

    def count(self, columns: int) -> int:
        """Number of the columns."""
        return min(columns - 1, max(1, round(columns * self.percent / 100)))

    def inner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], shape[1] - self.count(shape[1])

    def streams(self, shape: tuple[int, ...]) -> list[Stream]:
        held = self.format.streams((shape[0], self.count(shape[1])))
        order = Stream("order", (shape[1],), _index_type(shape[1]), by_row=False)
        return [*(dataclasses.replace(s.packed, name=f"columns_{s.name}") for s in held), order]

    def own(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Codes and parameters of the columns."""
        return {k.removeprefix("columns_"): v for k, v in params.items() if k.startswith("columns_")}

    def decode(self, dense: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        own = self.own(params)
        held = self.format.decode(own.pop("codes"), own)
        return np.concatenate([dense, held], axis=1)[:, params["order"]]


@dataclasses.dataclass(frozen=True)
class Order:
    """Puts columns in order: column k of the weight is column ``order[k]`` of the dense part (act-order of GPTQ)."""

    sliceable = True

    def __str__(self) -> str:
        return "order"

    def inner(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], shape[1]

    def streams(self, shape: tuple[int, ...]) -> list[Stream]:
        return [Stream("order", (shape[1],), _index_type(shape[1]), by_row=False)]

    def decode(self, dense: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return dense[:, params["order"]]


def parse_remainder(text: str, format: Callable[[str], Format]) -> Remainder | None:
    """Reads ``sparse0.45``, ``lowrank16``, ``order`` or ``columns5:int8``; None if it is neither."""
    if text == "order":
        return Order()
    match = re.fullmatch(r"sparse(\d+(?:\.\d+)?)|lowrank(\d+)|columns(\d+(?:\.\d+)?):(.+)", text)
    if match is None:
        return None
    sparse, rank, columns, spelling = match.groups()
    if sparse is not None:
        return Sparse(float(sparse))
    return LowRank(int(rank)) if rank is not None else Columns(float(columns), format(spelling))
