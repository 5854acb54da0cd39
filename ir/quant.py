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

from qc.ir._quant_affine import Affine
from qc.ir._quant_body import DECODES
from qc.ir._quant_format import Format, QuantizedTensor
from qc.ir._quant_graph import Weight, emit, read_weight, require_opset
from qc.ir._quant_scales import FloatScale, MicroScale, NanoScale, NoScale, Scale, TwoLevel
from qc.ir._quant_spelling import STANDARD
from qc.ir._quant_tables import Select, Table, table_names
from qc.ir._quant_types import Param, Stream, ValueMap

__all__ = [
    "DECODES",
    "STANDARD",
    "Affine",
    "FloatScale",
    "Format",
    "MicroScale",
    "NanoScale",
    "NoScale",
    "Param",
    "QuantizedTensor",
    "Scale",
    "Select",
    "Stream",
    "Table",
    "TwoLevel",
    "ValueMap",
    "Weight",
    "emit",
    "named_formats",
    "read_weight",
    "require_opset",
]


def named_formats() -> dict[str, Format]:
    """The formats that exist by name: value maps, to be combined with a group and a scale, and standard formats."""
    affine = [f"{kind}{bits}" for kind, first in (("int", 2), ("uint", 1), ("mid", 1), ("zint", 2)) for bits in
              range(first, 9)]  # fmt: skip
    return {name: Format.parse(name) for name in (*affine, *table_names(), "bitmod3", "bitmod4", *STANDARD)}
