"""Values that are stored with the weight: free tables, vector codebooks, sums of binary planes, powers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qc.ir._quant_tables import nearest_in
from qc.ir._quant_types import Param
from qc.ir.errors import InputError

__all__ = ["Clustered", "Learned", "Nested", "Planes", "Power", "SignedLowRank", "Vector"]

_HALF = ir.DataType.FLOAT16
_LONG = 512
"""Groups of at least this many elements are projected one after the other, shorter ones value by value."""

_CHUNK = 1 << 22
"""Distances to centroids that are held at a time."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """The value map ``w = table[q]`` with a table of half-precision values per group, or per row without groups.

    SqueezeLLM (arXiv 2306.07629), FLUTE (arXiv 2407.10960); with 1 bit the binary part of PB-LLM (arXiv 2310.00034),
    with 2 bits the zones and residual planes of BiLLM (arXiv 2402.04291): their values are four numbers per group.

    Attributes:
        bits: Width of a code, 1 to 8.
    """

    bits: int

    low = 0
    tile = books = 1
    scaled = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"Expected tables of 1 to 8 bits, found {self.bits}.")

    def __str__(self) -> str:
        return f"lut{self.bits}"

    @property
    def about(self) -> str:
        return f"a free table of {1 << self.bits} values per row or group (SqueezeLLM)"

    @property
    def params(self) -> tuple[Param, ...]:
        return (Param("table", "group", (1 << self.bits,), _HALF),)

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        table = params["table"].astype(np.float32)
        return table.min(axis=1, keepdims=True), table.max(axis=1, keepdims=True)

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _look_up(params["table"], codes)

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _nearest_by_group(units, params["table"])


@dataclasses.dataclass(frozen=True)
class Clustered:
    """The value map ``w = s * table_c[q]`` with a few tables per weight, each for a cluster of rows (or groups).

    JLCM (arXiv 2309.17361): neurons whose weights are distributed alike share a codebook. The cluster c of each row is
    stored, so rows need not be reordered. With one table it is a learned table of the whole weight.

    Attributes:
        bits: Width of a code, 1 to 8.
        tables: Number of tables, 1 to 256.
    """

    bits: int
    tables: int

    low = 0
    tile = books = 1
    scaled = True

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= 8 and 1 <= self.tables <= 256):
            raise InputError(f"Expected 1 to 256 tables of 1 to 8 bits, found {self}.")

    def __str__(self) -> str:
        return f"lut{self.bits}c{self.tables}"

    @property
    def about(self) -> str:
        return f"{self.tables} tables of {1 << self.bits} values, each for rows that are distributed alike (JLCM)"

    @property
    def params(self) -> tuple[Param, ...]:
        index = max(1, (self.tables - 1).bit_length())
        table = Param("table", "tensor", (self.tables, 1 << self.bits), _HALF)
        return table, Param("cluster", "group", bits=index)

    def chosen(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The table of each group, float32 ``[G, 2^bits]``."""
        return params["table"].astype(np.float32)[0][params["cluster"]]

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return Learned(self.bits).reach({"table": self.chosen(params)})

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _look_up(self.chosen(params), codes)

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _nearest_by_group(units, self.chosen(params))


@dataclasses.dataclass(frozen=True)
class Nested:
    """Tables of every width, such that the codes of a width are the upper bits of those of the next (Any-Precision).

    One set of codes is read at any width b (arXiv 2402.10517): ``w = table_b[q >> (bits - b)]``. The meaning of the
    tensor itself is that of its full width; `narrowed` gives the others.

    Attributes:
        first: The lowest width.
        bits: The full width.
    """

    first: int
    bits: int

    low = 0
    tile = books = 1
    scaled = False

    def __post_init__(self) -> None:
        if not 1 <= self.first < self.bits <= 8:
            raise InputError(f"Expected widths in rising order within 1 to 8, found {self}.")

    def __str__(self) -> str:
        return f"nested{self.first}-{self.bits}"

    @property
    def about(self) -> str:
        return f"nested tables: one set of codes, read at {self.first} to {self.bits} bits (Any-Precision)"

    @property
    def params(self) -> tuple[Param, ...]:
        return tuple(Param(f"table{b}", "group", (1 << b,), _HALF) for b in range(self.first, self.bits + 1))

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return Learned(self.bits).reach({"table": params[f"table{self.bits}"]})

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _look_up(params[f"table{self.bits}"], codes)

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _nearest_by_group(units, params[f"table{self.bits}"])

    def narrowed(
        self, bits: int, codes: np.ndarray, params: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Codes and parameters of the same weight as `Learned` of fewer bits."""
        return codes >> (self.bits - bits), {"table": params[f"table{bits}"]}


@dataclasses.dataclass(frozen=True)
class Vector:
    """The value map ``w = s * sum_c book_c[q_c]`` of `tile` neighbouring elements, with codebooks of the weight.

    One book without scales is vector quantization (VPTQ, arXiv 2409.17066, whose vectors lie along N: grouping ``in``);
    several with a scale per row are additive codebooks (AQLM, arXiv 2401.06118).

    Attributes:
        bits: Width of a code, 1 to 16.
        tile: Elements of a vector.
        books: Number of codebooks.
        scaled: Whether there are scales.
    """

    bits: int
    tile: int
    books: int = 1
    scaled: bool = False

    low = 0

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= 16 and self.tile >= 1 and self.books >= 1):
            raise InputError(f"Expected codes of 1 to 16 bits for vectors of at least 1 element, found {self}.")

    def __str__(self) -> str:
        return f"{'aq' if self.scaled else 'vq'}{self.bits}x{self.tile}" + (f"x{self.books}" if self.books > 1 else "")

    @property
    def about(self) -> str:
        kind = f"sums from {self.books} codebooks" if self.books > 1 else "a codebook"
        return f"{kind} of {1 << self.bits} vectors of {self.tile} elements" + (", scaled" if self.scaled else "")

    @property
    def params(self) -> tuple[Param, ...]:
        return (Param("codebooks", "tensor", (self.books, 1 << self.bits, self.tile), _HALF),)

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        books = params["codebooks"].astype(np.float32)[0]
        ends = books.min(axis=(1, 2)).sum(), books.max(axis=(1, 2)).sum()
        return np.full((1, 1), ends[0]), np.full((1, 1), ends[1])

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        books = params["codebooks"].astype(np.float32)[0]
        indices = codes.reshape(len(codes), -1, self.books)
        total = books[0][indices[..., 0]]
        for c in range(1, self.books):
            total += books[c][indices[..., c]]
        return total.reshape(len(codes), -1)

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The nearest vector; of several books, one after the other on what is left, then each once more in turn."""
        books = params["codebooks"].astype(np.float32)[0]
        vectors = units.reshape(-1, self.tile).astype(np.float32)
        codes = np.zeros((len(vectors), self.books), np.uint8 if self.bits <= 8 else np.uint16)
        left = vectors.copy()
        for turn in range(1 if self.books == 1 else 2):
            for c, book in enumerate(books):
                if turn:
                    left += book[codes[:, c]]
                codes[:, c] = nearest_vectors(left, book)
                left -= book[codes[:, c]]
        return codes.reshape(len(units), -1)


@dataclasses.dataclass(frozen=True)
class Planes:
    """The value map ``w = sum_c a_c b_c`` of binary planes with a half-precision scale each per group.

    Attributes:
        bits: Number of planes.
        signed: Whether a bit stands for -1 and 1 (residual binarization) or for 0 and 1 (FDB of DB-LLM,
            arXiv 2402.11960).
    """

    bits: int
    signed: bool = True

    low = 0
    tile = books = 1
    scaled = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise InputError(f"Expected 1 to 4 planes, found {self.bits}.")

    def __str__(self) -> str:
        return f"{'bin' if self.signed else 'fdb'}{self.bits}"

    @property
    def about(self) -> str:
        return f"sum of {self.bits} binary planes of {'-1 and 1' if self.signed else '0 and 1'}"

    @property
    def params(self) -> tuple[Param, ...]:
        return (Param("plane_scale", "group", (self.bits,), _HALF),)

    @property
    def signs(self) -> np.ndarray:
        """What the bits of every code stand for, ``[2^bits, bits]``."""
        planes = (np.arange(1 << self.bits)[:, None] >> np.arange(self.bits) & 1).astype(np.float32)
        return 2 * planes - 1 if self.signed else planes

    def tables(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The values of all codes per group, ``[G, 2^bits]``."""
        return params["plane_scale"].astype(np.float32) @ self.signs.T

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return Learned(self.bits).reach({"table": self.tables(params)})

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _look_up(self.tables(params), codes)

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return _nearest_by_group(units, self.tables(params))


@dataclasses.dataclass(frozen=True)
class Power:
    """The value map ``w = s * sign(q) |q|^(1/a)`` with one exponent a per weight (PowerQuant, arXiv 2301.09858).

    Attributes:
        bits: Width of a code, 2 to 8.
    """

    bits: int

    tile = books = 1
    scaled = True
    params = (Param("exponent", "tensor", (), ir.DataType.FLOAT),)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"Expected powers of 2 to 8 bits, found {self.bits}.")

    def __str__(self) -> str:
        return f"pow{self.bits}"

    @property
    def about(self) -> str:
        return f"powers of integers of {self.bits} bits, the exponent is searched (PowerQuant)"

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    def table(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Values by code, from the lowest on."""
        codes = np.arange(self.low, -self.low)
        inverse = 1 / np.float64(params["exponent"].reshape(())[()])
        return (np.sign(codes) * np.abs(codes) ** inverse).astype(np.float32)

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        table = self.table(params)
        return table[None, :1], table[None, -1:]

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.table(params)[codes.astype(np.int16) - self.low]

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return (nearest_in(units, self.table(params)) + self.low).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class SignedLowRank:
    """The value map ``w = sum_i S_i * (U_i V_i)`` of signs times low-rank matrices (BitStack, arXiv 2410.23918).

    The sum over the first blocks only is a coarser form of the same weight.

    Attributes:
        books: Number of blocks.
        rank: Rank of a block's magnitudes.
    """

    books: int
    rank: int = 16

    bits = 1
    low = 0
    tile = 1
    scaled = False

    def __post_init__(self) -> None:
        if self.books < 1 or self.rank < 1:
            raise InputError(f"Expected at least one block of at least rank 1, found {self}.")

    def __str__(self) -> str:
        return f"bitstack{self.books}x{self.rank}"

    @property
    def about(self) -> str:
        return f"{self.books} blocks of signs times matrices of rank {self.rank} (BitStack)"

    @property
    def params(self) -> tuple[Param, ...]:
        shape = (self.books, self.rank)
        return Param("left", "row", shape, _HALF), Param("right", "column", shape, _HALF)

    def magnitudes(self, block: int, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """``U_i V_i``, float32 ``[N, K]``."""
        return params["left"][:, block].astype(np.float32) @ params["right"][0, block].astype(np.float32)

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        top = sum(np.abs(self.magnitudes(i, params)).max(axis=1, keepdims=True) for i in range(self.books))
        return -top, np.asarray(top)

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        signs = codes.reshape(len(codes), -1, self.books)
        total = np.zeros(signs.shape[:2], np.float32)
        for i in range(self.books):
            total += (2 * signs[..., i].astype(np.float32) - 1) * self.magnitudes(i, params)
        return total

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The sign of what earlier blocks left, block by block."""
        left = units.astype(np.float32)
        codes = np.empty((*left.shape, self.books), np.uint8)
        for i in range(self.books):
            size = self.magnitudes(i, params)
            codes[..., i] = (left >= 0) == (size >= 0)
            left = left - (2 * codes[..., i].astype(np.float32) - 1) * size
        return codes.reshape(len(units), -1)


def nearest_vectors(vectors: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Index of the nearest row of ``book [k, v]`` for each of ``vectors [n, v]``."""
    half = np.einsum("kv,kv->k", book, book) / 2
    found = np.empty(len(vectors), np.int32)
    step = max(1, _CHUNK // len(book))
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        found[part] = np.argmin(half - vectors[part] @ book.T, axis=1)
    return found


def _look_up(tables: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.take_along_axis(tables.astype(np.float32), codes.astype(np.int64), axis=1)


def _nearest_by_group(units: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Codes of the nearest values, each group in a table of its own: the lower value where two are equally near."""
    tables = tables.astype(np.float32)
    order = np.argsort(tables, axis=1, kind="stable")
    rising = np.take_along_axis(tables, order, axis=1)
    if units.shape[1] >= _LONG:
        index = np.stack([nearest_in(row, values) for row, values in zip(units, rising, strict=True)])
    else:
        middles = (rising[:, 1:] + rising[:, :-1]) / 2
        index = np.zeros(units.shape, np.int64)
        for j in range(middles.shape[1]):
            index += units > middles[:, j : j + 1]
    return np.take_along_axis(order, index, axis=1).astype(np.uint8)
