"""Decoding in standard operators: the body of ``qc.Decode``, made from a format and a shape.

It follows `Format.decode` step by step: unpack bytes, look values up, multiply by scales. Any ONNX runtime executes
it; the tests compare it with `Format.decode` for every format.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir._quant_affine import Affine
from qc.ir._quant_format import Format
from qc.ir._quant_learned import Clustered, Learned, Nested, Planes, Power, SignedLowRank, Vector
from qc.ir._quant_packing import TRITS, row_bytes, slices
from qc.ir._quant_remainder import Columns, LowRank, Remainder, Sparse
from qc.ir._quant_scales import MicroScale, NanoScale, NoScale, Scale, TwoLevel
from qc.ir._quant_tables import SearchedFloat, Select, Table
from qc.ir._quant_types import Stream
from qc.ir.errors import InternalError

__all__ = ["DECODES", "decode_function", "parse_signature", "signature"]

DECODES = "qc.decodes"
"""Metadata key of every node of a body, also where it was inlined: the format that it helps to decode."""

_FLOAT = int(ir.DataType.FLOAT)
_INT32 = int(ir.DataType.INT32)
_INT64 = int(ir.DataType.INT64)


def signature(format: Format, shape: Sequence[int]) -> str:
    """The overload of the node that decodes a weight: ``nf4:g64@1024x384``."""
    rows, columns = shape
    return f"{format}@{rows}x{columns}"


def parse_signature(overload: str) -> tuple[Format, tuple[int, int]]:
    """The inverse of `signature`."""
    spelling, _, shape = overload.rpartition("@")
    rows, _, columns = shape.partition("x")
    return Format.parse(spelling), (int(rows), int(columns))


def decode_function(overload: str, opset: int) -> ir.Function:
    """The function whose inputs are the streams of a format, in order, and whose output is the weight."""
    format, shape = parse_signature(overload)
    body = _Body()
    streams = format.streams(shape)
    inputs = [ir.Value(name=s.name) for s in streams]
    held = {s.name: body.unpack(value, s) for s, value in zip(streams, inputs, strict=True)}
    out = _decode(body, format, shape, held)
    out.name = "weight"
    for node in body.nodes:
        node.metadata_props[DECODES] = str(format)
    graph = ir.Graph(inputs, [out], nodes=body.nodes, opset_imports={"": opset})
    return ir.Function("qc", "Decode", overload, graph=graph, attributes=[])


class _Body:
    """Collects nodes; every operation returns its value."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(
        self, op_type: str, *inputs: ir.Value | np.ndarray, **attributes: int | str | list[int] | ir.TensorProtocol
    ) -> ir.Value:
        operands = [self.constant(i) if isinstance(i, np.ndarray) else i for i in inputs]
        node = ir.node(op_type, operands, attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(array)})
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def filled(self, count: int, number: int) -> ir.Value:
        """So many times the same integer: a constant would be stored, and be as large as the weight."""
        value = ir.tensor(np.array([number], np.int64))
        return self.op("ConstantOfShape", np.array([count], np.int64), value=value)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", x, np.array(shape, np.int64))

    def columns(self, x: ir.Value, start: int, end: int) -> ir.Value:
        """Part of the last axis."""
        return self.op("Slice", x, *(np.array([n], np.int64) for n in (start, end, -1)))

    def cast(self, x: ir.Value, to: int = _FLOAT) -> ir.Value:
        return self.op("Cast", x, to=to)

    def unpack(self, packed: ir.Value, stream: Stream) -> ir.Value:
        """A stream as `Stream.unpack` gives it: packed codes as int32, anything else as it is."""
        if stream.bits is None:
            return packed
        *rest, count = stream.shape
        if stream.bits == TRITS:
            split = self.op("Div", self.op("Unsqueeze", self.cast(packed, _INT32), np.array([-1])),
                            np.array([81, 27, 9, 3, 1], np.int32))  # fmt: skip
            digits = self.reshape(self.op("Mod", split, np.array(3, np.int32)), *rest, -1)
            return self.columns(digits, 0, count)
        total, shift, start = None, 0, 0
        for width in slices(stream.bits):
            end = start + row_bytes(count, width)
            part = packed if len(slices(stream.bits)) == 1 else self.columns(packed, start, end)
            codes = self.cast(self._unpack_slice(part, width, rest, count), _INT32)
            if shift:
                codes = self.op("Mul", codes, np.array(1 << shift, np.int32))
            total = codes if total is None else self.op("Add", total, codes)
            shift, start = shift + width, end
        assert total is not None
        return total

    def _unpack_slice(self, packed: ir.Value, width: int, rest: list[int], count: int) -> ir.Value:
        if width == 8:
            return packed
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        spread = self.op("BitShift", self.op("Unsqueeze", packed, np.array([-1])), shifts, direction="RIGHT")
        codes = self.op("BitwiseAnd", spread, np.array((1 << width) - 1, np.uint8))
        codes = self.reshape(codes, *rest, -1)
        return codes if count % len(shifts) == 0 else self.columns(codes, 0, count)


def _decode(body: _Body, format: Format, shape: tuple[int, int], held: Mapping[str, ir.Value]) -> ir.Value:
    values = format.values
    inner = shape if format.remainder is None else format.remainder.inner(shape)
    rows, columns = inner if format.axis != "out" else inner[::-1]
    groups, width = format.groups(columns), format.width(columns)
    per_group, count = width // values.tile * values.books, columns // values.tile * values.books
    codes = held["codes"]
    if groups * per_group != count:
        codes = body.op("Pad", codes, np.array([0, 0, 0, groups * per_group - count]))
    codes = body.reshape(codes, rows * groups, per_group)
    params = {}
    for param in values.params:
        array = held[param.name]
        if param.scope == "group":
            array = body.reshape(array, -1, *param.shape)
        elif param.scope == "row" and groups > 1:
            wide = body.op("Unsqueeze", array, np.array([1]))
            wide = body.op("Expand", wide, np.array([rows, groups, *param.shape], np.int64))
            array = body.reshape(wide, rows * groups, *param.shape)
        params[param.name] = array
    units = _units(values, body, codes, params)
    if not isinstance(format.scale, NoScale):
        scale = body.op("Unsqueeze", _scale(format.scale, body, held, format.grid(inner)), np.array([-1]))
        units = body.op("Mul", body.reshape(units, rows, groups, width), scale)
    dense = body.reshape(units, rows, groups * width)
    if groups * width != columns:
        dense = body.columns(dense, 0, columns)
    dense = body.op("Transpose", dense) if format.axis == "out" else dense
    return body.op("Identity", _remainder(format.remainder, body, dense, shape, held))


@functools.singledispatch
def _units(values: object, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    """`ValueMap.decode` of codes int32 ``[G, n]``."""
    raise InternalError(f"Bug: no operators decode the values {values}")


@_units.register
def _(values: Affine, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    units = body.cast(codes)
    offset = values.low + (0.5 if values.half else 0)
    if offset:
        units = body.op("Add", units, np.array(offset, np.float32))
    if values.symmetric:
        return units
    return body.op("Sub", units, body.op("Unsqueeze", body.cast(params["zero_point"]), np.array([-1])))


@_units.register
def _(values: Table, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    return body.op("Gather", values.values, codes)


@_units.register
def _(values: Select, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    first = body.op("Mul", params["kind"], np.array(1 << values.bits, np.int32))
    index = body.op("Add", codes, body.op("Unsqueeze", first, np.array([-1])))
    return body.op("Gather", values.values.reshape(-1), index)


@_units.register
def _(values: SearchedFloat, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    first = body.op("Mul", params["kind"], np.array(1 << values.bits, np.int32))
    return body.op("Gather", values.values.reshape(-1), body.op("Add", codes, first))


@_units.register
def _(values: Learned, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    return body.op("GatherElements", body.cast(params["table"]), codes, axis=1)


@_units.register
def _(values: Clustered, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    first = body.op("Mul", params["cluster"], np.array(1 << values.bits, np.int32))
    index = body.op("Add", codes, body.op("Unsqueeze", first, np.array([-1])))
    return body.op("Gather", body.reshape(body.cast(params["table"]), -1), index)


@_units.register
def _(values: Nested, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    return body.op("GatherElements", body.cast(params[f"table{values.bits}"]), codes, axis=1)


@_units.register
def _(values: Planes, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    tables = body.op("MatMul", body.cast(params["plane_scale"]), np.ascontiguousarray(values.signs.T))
    return body.op("GatherElements", tables, codes, axis=1)


@_units.register
def _(values: Vector, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    books = body.reshape(body.cast(params["codebooks"]), -1, values.tile)
    first = np.arange(values.books, dtype=np.int32) * np.int32(1 << values.bits)
    index = body.op("Add", body.reshape(codes, -1, values.books), first)
    total = None
    for c in range(values.books):
        part = body.op("Gather", books, body.columns(index, c, c + 1))
        total = part if total is None else body.op("Add", total, part)
    assert total is not None
    return total


@_units.register
def _(values: Power, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    table = np.arange(values.low, -values.low).astype(np.float64)
    inverse = body.op("Div", np.array(1, np.float64), body.cast(params["exponent"], int(ir.DataType.DOUBLE)))
    sizes = body.op("Mul", np.sign(table), body.op("Pow", np.abs(table), inverse))
    return body.op("Gather", body.cast(sizes), codes)


@_units.register
def _(values: SignedLowRank, body: _Body, codes: ir.Value, params: Mapping[str, ir.Value]) -> ir.Value:
    left = body.op("Transpose", body.cast(params["left"]), perm=[1, 0, 2])
    right = body.op("Squeeze", body.cast(params["right"]), np.array([0]))
    sizes = body.op("Transpose", body.op("MatMul", left, right), perm=[1, 2, 0])
    signs = body.op("Sub", body.op("Mul", body.cast(codes), np.array(2, np.float32)), np.array(1, np.float32))
    shape = body.op("Shape", sizes)
    terms = body.op("Mul", body.op("Reshape", signs, shape), sizes)
    return body.op("ReduceSum", terms, np.array([-1]), keepdims=0)


def _remainder(
    remainder: Remainder | None, body: _Body, dense: ir.Value, shape: tuple[int, int], held: Mapping[str, ir.Value]
) -> ir.Value:
    """`Remainder.decode`."""
    if isinstance(remainder, LowRank):
        return body.op(
            "Add", dense, body.op("MatMul", body.cast(held["lowrank_left"]), body.cast(held["lowrank_right"]))
        )
    if isinstance(remainder, Sparse):
        return _add_sparse(body, dense, remainder.count(shape), shape, held)
    if remainder is None:
        return dense
    if isinstance(remainder, Columns):
        own = _decode(body, remainder.format, (shape[0], remainder.count(shape[1])), remainder.own(held))  # type: ignore[arg-type]
        dense = body.op("Concat", dense, own, axis=1)
    return body.op("Gather", dense, body.cast(held["order"], _INT32), axis=1)


def _add_sparse(
    body: _Body, dense: ir.Value, count: int, shape: tuple[int, int], held: Mapping[str, ir.Value]
) -> ir.Value:
    """Rows from their counts: a one where each row but the first begins, added up."""
    ends = body.op("CumSum", body.cast(held["sparse_counts"], _INT64), np.array(0, np.int64))
    starts = body.op("Slice", ends, np.array([0]), np.array([shape[0] - 1]))
    ones, none = body.filled(shape[0] - 1, 1), body.filled(count + 1, 0)
    steps = body.op("ScatterElements", none, starts, ones, axis=0, reduction="add")
    rows = body.op("Slice", body.op("CumSum", steps, np.array(0, np.int64)), np.array([0]), np.array([count]))
    flat = body.op("Add", body.op("Mul", rows, np.array(shape[1], np.int64)), body.cast(held["sparse_columns"], _INT64))
    values = body.cast(held["sparse_values"])
    added = body.op("ScatterElements", body.reshape(dense, -1), flat, values, axis=0, reduction="add")
    return body.reshape(added, *shape)


def _scale(scale: Scale, body: _Body, held: Mapping[str, ir.Value], grid: tuple[int, int]) -> ir.Value:
    """`Scale.decode`: float32 ``[rows, groups]``."""
    codes = body.cast(held["scale"])
    if isinstance(scale, MicroScale):
        exponents = MicroScale().decode({"scale": np.arange(256)})
        return body.op("Gather", exponents, body.cast(held["scale"], _INT32))
    if isinstance(scale, NanoScale):
        return body.op("Mul", codes, held["scale_unit"])
    if not isinstance(scale, TwoLevel):
        return codes
    if scale.signed:
        codes = body.op("Sub", codes, np.array(1 << (scale.bits - 1), np.float32))
    rows, groups = grid
    unit = body.cast(held["scale_unit"])
    if scale.run is not None:
        runs = -(-groups // scale.run)
        wide = body.op("Expand", body.op("Unsqueeze", unit, np.array([-1])), np.array([rows, runs, scale.run]))
        unit = body.columns(body.reshape(wide, rows, -1), 0, groups)
    return body.op("Mul", codes, unit)
