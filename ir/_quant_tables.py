"""Fixed tables of values: minifloats, quantiles of the normal distribution, powers of two."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from qc.ir._quant_types import Param
from qc.ir.errors import InputError

__all__ = ["SearchedFloat", "Select", "Table", "minifloat", "nearest_in", "table_names"]

_MINIFLOATS = {"e2m1": (2, 1), "e3m0": (3, 0), "e1m2": (1, 2), "e2m3": (2, 3), "e3m2": (3, 2), "e4m3": (4, 3),
               "e5m2": (5, 2)}  # fmt: skip
_ALIASES = {"fp4": "e2m1", "fp6": "e2m3", "fp8": "e4m3"}
_BITSANDBYTES_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
"""In twelfths, by code; negative from code 8 on. Not the E2M1 of the OCP."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""As every implementation stores it; `_normal_float` reproduces it to 1e-6."""

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of llama.cpp's format of this name."""

_SPECIAL = {3: ((0, 1, 2, 4), (3, -3, 6, -6)), 4: ((0, 1, 2, 3, 4, 6, 8, 12), (10, -10, 16, -16))}
"""BitMoD (arXiv 2411.11745): magnitudes by bits, and what takes the place of the second zero."""


_ABOUT = {
    "nf": "quantiles of the normal distribution",
    "bnb4": "the 4-bit float of bitsandbytes",
    "iq4nl": "the non-linear table of llama.cpp's IQ4_NL",
    "shift": "powers of two of either sign, without a zero (DenseShift)",
    "ternary": "-1, 0, 1, five codes to a byte",
}


def table_names() -> list[str]:
    """Names of the fixed tables."""
    return [
        *_MINIFLOATS,
        *(f"nf{b}" for b in range(2, 9)),
        "bnb4",
        "iq4nl",
        *(f"shift{b}" for b in (2, 3, 4)),
        "ternary",
    ]


def minifloat(exponent: int, mantissa: int) -> np.ndarray:
    """Values of a float of 1 + `exponent` + `mantissa` bits by code ``sign | exponent | mantissa``.

    Subnormals are linear; there are no infinities below 8 bits. E4M3 has NaN in its last code of either sign, E5M2 is
    that of IEEE (OCP Microscaling Formats 1.0, table 5.3.1 and on); both are NaN here where they are no numbers.
    """
    bias = 1 if exponent == 1 else (1 << (exponent - 1)) - 1
    codes = np.arange(1 << (exponent + mantissa))
    power, fraction = codes >> mantissa, (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
    values = np.where(power == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (power - bias))
    if (exponent, mantissa) == (4, 3):
        values[-1] = np.nan
    if (exponent, mantissa) == (5, 2):
        values[power == power[-1]] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def _normal_float(bits: int) -> np.ndarray:
    """Quantiles of the normal distribution, zero among them (QLoRA, arXiv 2305.14314, appendix E)."""
    edge, half = 1 - (1 / 32 + 1 / 30) / 2, 1 << (bits - 1)
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(edge, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(edge, 0.5, half)[:-1]]
    values = np.array(sorted([*positive, 0.0, *negative]))
    return (values / values.max()).astype(np.float32)


def _make(name: str) -> np.ndarray | None:
    if name in _MINIFLOATS:
        return minifloat(*_MINIFLOATS[name])
    if name == "nf4":
        return np.array(_NF4, np.float32)
    if name == "ternary":
        return np.array([-1, 0, 1], np.float32)
    if name == "bnb4":
        half = np.array(_BITSANDBYTES_FP4, np.float32) / np.float32(12)
        return np.concatenate([half, -half])
    if name == "iq4nl":
        return np.array(_IQ4_NL, np.float32)
    match = re.fullmatch(r"(nf|shift)([2-8])", name)
    if match is None:
        return None
    bits = int(match[2])
    if match[1] == "nf":
        return _normal_float(bits)
    if bits > 4:
        return None
    powers = (2.0 ** np.arange(1 << (bits - 1))).astype(np.float32)
    return np.concatenate([powers, -powers])


def _order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.flatnonzero(np.isfinite(values))
    rising, first = np.unique(values[finite], return_index=True)
    return rising, finite[first].astype(np.uint8)


def nearest_in(units: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """Index of the nearest of `rising` values, the lower one where two are equally near."""
    return np.searchsorted((rising[1:] + rising[:-1]) / 2, units)


@dataclasses.dataclass(frozen=True)
class Table:
    """The value map ``w = table[q] * s`` with a table that never changes.

    Attributes:
        name: One of `table_names`, or fp4, fp6, fp8.
    """

    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _ALIASES.get(self.name, self.name))
        if _make(self.name) is None:
            raise InputError(f"Expected a table among {', '.join(table_names())}; found {self.name!r}.")

    def __str__(self) -> str:
        return self.name

    low = 0
    tile = books = 1
    scaled = True
    params: tuple[Param, ...] = ()

    @property
    def bits(self) -> int:
        return 0 if self.name == "ternary" else (len(self.values) - 1).bit_length()

    @property
    def about(self) -> str:
        if self.name in _MINIFLOATS:
            exponent, mantissa = _MINIFLOATS[self.name]
            return f"float of {exponent} exponent and {mantissa} mantissa bits"
        return next(about for start, about in _ABOUT.items() if self.name.startswith(start))

    @functools.cached_property
    def values(self) -> np.ndarray:
        """Units by code, float32; NaN for codes that stand for no number."""
        found = _make(self.name)
        assert found is not None
        return found

    @functools.cached_property
    def _rising(self) -> tuple[np.ndarray, np.ndarray]:
        return _order(self.values)

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        rising, _ = self._rising
        return rising[None, :1], rising[None, -1:]

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.values[codes]

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Minifloats round half to the even code, others half down."""
        rising, codes = self._rising
        index = nearest_in(units, rising)
        if self.name in _MINIFLOATS:
            upper = np.minimum(index + 1, len(rising) - 1)
            tie = (units == (rising[index] + rising[upper]) / 2) & (codes[index] % 2 == 1)
            index = np.where(tie, upper, index)
        return codes[index]


@dataclasses.dataclass(frozen=True)
class Select:
    """One of four tables per group: a minifloat whose second zero is another value (BitMoD, arXiv 2411.11745).

    Attributes:
        bits: 3 or 4.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in _SPECIAL:
            raise InputError(f"Expected bitmod3 or bitmod4, found bitmod{self.bits}.")

    def __str__(self) -> str:
        return f"bitmod{self.bits}"

    low = 0
    tile = books = 1
    scaled = True
    params = (Param("kind", "group", bits=2),)
    about = "BitMoD: a float table with one of four special values per group"

    @functools.cached_property
    def values(self) -> np.ndarray:
        """Units ``[4, 2^bits]``, by kind and code; the special value has the code of the second zero."""
        magnitudes, special = _SPECIAL[self.bits]
        half = np.array(magnitudes, np.float32)
        tables = np.tile(np.concatenate([half, -half]), (len(special), 1))
        tables[:, len(half)] = special
        return tables

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        tables = self.values[params["kind"]]
        return tables.min(axis=1, keepdims=True), tables.max(axis=1, keepdims=True)

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.values[params["kind"][:, None], codes]

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        codes = np.empty(units.shape, np.uint8)
        for kind, table in enumerate(self.values):
            chosen = np.flatnonzero(params["kind"] == kind)
            rising, order = _order(table)
            codes[chosen] = order[nearest_in(units[chosen], rising)]
        return codes


@dataclasses.dataclass(frozen=True)
class SearchedFloat:
    """A float whose bits are split between exponent and mantissa as suits the weight (LLM-FP4, arXiv 2310.16836).

    The real exponent bias of the paper is the scale: ``2^-bias``.

    Attributes:
        bits: Width of a code, 3 to 6.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 6:
            raise InputError(f"Expected floats of 3 to 6 bits, found {self.bits}.")

    def __str__(self) -> str:
        return f"fpx{self.bits}"

    low = 0
    tile = books = 1
    scaled = True
    params = (Param("kind", "tensor", bits=3),)
    about = "a float whose exponent bits are searched for each weight (LLM-FP4)"

    @functools.cached_property
    def values(self) -> np.ndarray:
        """Units ``[kinds, 2^bits]``: with 1 exponent bit, with 2, ..."""
        return np.stack([minifloat(e, self.bits - 1 - e) for e in range(1, self.bits)])

    def _table(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.values[int(params["kind"].reshape(-1)[0])]

    def reach(self, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        table = self._table(params)
        return np.full((1, 1), table.min()), np.full((1, 1), table.max())

    def decode(self, codes: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._table(params)[codes]

    def nearest(self, units: np.ndarray, params: Mapping[str, np.ndarray]) -> np.ndarray:
        rising, codes = _order(self._table(params))
        return codes[nearest_in(units, rising)]
