"""What the numbers of a weight mean: `Format`, `QuantizedTensor`, and how both appear in a graph.

A format has four independent parts: *grouping* (which elements share parameters), *values* (what a code stands for),
*scale* (how the parameters are stored) and a *remainder* (what is added to the decoded values).
``Format.decode(codes, params)`` is its definition; everything else (how codes are chosen, how they lie in bytes, which
kernel runs) is somebody else's business. An assignment of codes needs `ValueMap.nearest` and `Scale.encode` only, so
any assignment works with any format.

In a graph, a weight is initializers behind a *decode node* (`qc.ir._quant_graph`): `read_weight` sees through them,
`emit` writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from qc.ir._quant_affine import Affine
from qc.ir._quant_body import DECODES
from qc.ir._quant_format import Format, QuantizedTensor
from qc.ir._quant_graph import Weight, emit, read_weight, require_opset
from qc.ir._quant_learned import Clustered, Learned, Nested, Planes, Power, SignedLowRank, Vector, nearest_vectors
from qc.ir._quant_remainder import Columns, LowRank, Order, Remainder, Sparse
from qc.ir._quant_scales import FloatScale, MicroScale, NanoScale, NoScale, Scale, TwoLevel
from qc.ir._quant_spelling import STANDARD
from qc.ir._quant_tables import SearchedFloat, Select, Table, table_names
from qc.ir._quant_types import Param, Stream, ValueMap

__all__ = [
    "DECODES",
    "STANDARD",
    "Affine",
    "Clustered",
    "Columns",
    "FloatScale",
    "Format",
    "Learned",
    "LowRank",
    "MicroScale",
    "NanoScale",
    "Nested",
    "NoScale",
    "Order",
    "Param",
    "Planes",
    "Power",
    "QuantizedTensor",
    "Remainder",
    "Scale",
    "SearchedFloat",
    "Select",
    "SignedLowRank",
    "Sparse",
    "Stream",
    "Table",
    "TwoLevel",
    "ValueMap",
    "Vector",
    "Weight",
    "emit",
    "named_formats",
    "nearest_vectors",
    "read_weight",
    "require_opset",
]


_STORED = (
    "fpx3", "fpx4", "fpx6", "bitmod3", "bitmod4", *(f"pow{b}" for b in range(2, 9)), *(f"lut{b}" for b in range(1, 9)),
    "lut3c16", "lut4c16", "nested3-6", "nested3-8", "bin1", "bin2", "bin3", "fdb2", "vq8x4", "vq8x4:in", "vq12x8:in",
    "aq8x8x2", "bitstack1x16", "bitstack2x16", "bitstack3x16",
)  # fmt: skip
"""Value maps that store more than scales; any other numbers may stand in their names."""


@functools.cache
def named_formats() -> Mapping[str, Format]:
    """The formats that exist by name: value maps, to be combined with a group and a scale, and standard formats."""
    affine = [f"{kind}{bits}" for kind, first in (("int", 2), ("uint", 1), ("mid", 1), ("zint", 2)) for bits in
              range(first, 9)]  # fmt: skip
    return {name: Format.parse(name) for name in (*affine, *table_names(), *_STORED, *STANDARD)}
