"""The spelling of formats: ``VALUES[:GROUPING][:SCALE][+REMAINDER]``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from qc.ir._quant_affine import Affine
from qc.ir._quant_learned import Clustered, Learned, Nested, Planes, Power, SignedLowRank, Vector
from qc.ir._quant_remainder import parse_remainder
from qc.ir._quant_scales import FloatScale, NoScale, Scale, parse_scale
from qc.ir._quant_tables import SearchedFloat, Select, Table, table_names
from qc.ir._quant_types import ValueMap
from qc.ir.errors import InputError

if TYPE_CHECKING:
    from qc.ir.quant import Format

__all__ = ["STANDARD", "parse"]

STANDARD = {
    "mxfp4": "e2m1:g32:e8m0",
    "mxfp6": "e2m3:g32:e8m0",
    "mxfp8": "e4m3:g32:e8m0",
    "mxint8": "int8:g32:e8m0",
    "nvfp4": "e2m1:g16:e4m3",
    "nf4-dq": "nf4:g64:q8x256",
}
"""Formats that have a name of their own, grouping and scales included."""


def _affine(match: re.Match[str]) -> Affine:
    kind, bits = match.groups()
    return Affine(int(bits), kind in ("int", "mid"), kind == "mid", kind == "zint")


_VALUES: tuple[tuple[str, Callable[[re.Match[str]], ValueMap]], ...] = (
    (r"(int|uint|mid|zint)(\d+)", _affine),
    (r"fpx(\d+)", lambda m: SearchedFloat(int(m[1]))),
    (r"bitmod(\d+)", lambda m: Select(int(m[1]))),
    (r"lut(\d+)c(\d+)", lambda m: Clustered(int(m[1]), int(m[2]))),
    (r"lut(\d+)", lambda m: Learned(int(m[1]))),
    (r"nested(\d+)-(\d+)", lambda m: Nested(int(m[1]), int(m[2]))),
    (r"(vq|aq)(\d+)x(\d+)(?:x(\d+))?", lambda m: Vector(int(m[2]), int(m[3]), int(m[4] or 1), m[1] == "aq")),
    (r"(bin|fdb)(\d+)", lambda m: Planes(int(m[2]), m[1] == "bin")),
    (r"pow(\d+)", lambda m: Power(int(m[1]))),
    (r"bitstack(\d+)x(\d+)", lambda m: SignedLowRank(int(m[1]), int(m[2]))),
    ("|".join([*table_names(), "fp4", "fp6", "fp8"]), lambda m: Table(m[0])),
)
"""What spells which value map."""


def parse(text: str, make: type[Format]) -> Format:
    """Reads a spelling.

    Raises:
        InputError: If it is none.
    """
    spelling, plus, rest = STANDARD.get(text, text).partition("+")
    values, (group, axis), scale = _split(spelling, text)
    remainder = parse_remainder(rest, make.parse) if plus else None
    if plus and remainder is None:
        raise _refused(text)
    return make(values, group, scale, axis, remainder)


def _split(spelling: str, text: str) -> tuple[ValueMap, tuple[int | None, str], Scale]:
    name, *rest = spelling.split(":")
    values = _values_of(name)
    if values is None:
        raise _refused(text)
    grouping, scale = _grouping_of(rest[0]) if rest else None, None
    if grouping is not None:
        rest = rest[1:]
    if rest:
        scale = parse_scale(rest[0])
        rest = rest[1:] if scale is not None else rest
    if rest:
        raise _refused(text)
    default = FloatScale() if values.scaled else NoScale()
    return values, grouping or (None, "in"), scale or default


def _values_of(name: str) -> ValueMap | None:
    for pattern, make in _VALUES:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return make(match)
    return None


def _grouping_of(text: str) -> tuple[int | None, str] | None:
    if text == "tensor":
        return None, "tensor"
    match = re.fullmatch(r"(g|in)(\d+)?", text)
    if match is None or text == "g":
        return None
    return int(match[2]) if match[2] else None, "in" if match[1] == "g" else "out"


def _refused(text: str) -> InputError:
    return InputError(
        f"Expected a format such as int4, uint4:g32 or int8:g128:f16, found {text!r}. `qc formats` lists them."
    )
