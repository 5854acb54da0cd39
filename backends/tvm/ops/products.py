"""Products: linear layers on float and on quantized weights, products of two computed values, and table look-ups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.integers import rounded_source
from qc.backends.tvm.kernels.bytes import byte_product, vectors_of
from qc.backends.tvm.kernels.float_products import float_product
from qc.backends.tvm.kernels.products import exact_product, integer_product, quantize_rows
from qc.backends.tvm.kernels.records import Codes
from qc.backends.tvm.lower import Lowering, operator
from qc.backends.tvm.ops.activations import activation_of
from qc.backends.tvm.ops.loops import broadcast, copy, fill
from qc.backends.tvm.ops.rounding import codes_of_rows, rounded_input
from qc.backends.tvm.pack import (
    bytes_of,
    codes_of,
    groups_of,
    pack_bytes,
    pack_columns,
    pack_records,
    record_bytes,
    why_decoded,
)
from qc.backends.tvm.program import Tensor, dense
from qc.backends.tvm.shapes import Dim, Size, dim, divide, product, stride_of
from qc.ir import dialect
from qc.ir.quant import Weight, read_weight

__all__ = [
    "Tail",
    "float_weight",
    "gather",
    "gather_values",
    "last_rows",
    "linear",
    "matmul",
    "matrices",
    "multiply",
    "product_of",
    "quantized_weight",
    "tail_of",
]

_STORED = {ir.DataType.FLOAT: "f32", ir.DataType.BFLOAT16: "bf16", ir.DataType.FLOAT16: "f16"}


@dataclasses.dataclass(frozen=True)
class Tail:
    """What is computed in a product's epilogue: which value it yields in the end."""

    value: ir.Value
    residual: Tensor | None
    activation: str


def tail_of(at: Lowering, node: ir.Node, shape: tuple[Dim, ...]) -> Tail:
    """Takes a residual and an activation that alone read the product into it."""
    value, residual, activation = node.outputs[0], None, "none"
    user = at.sole_user(value)
    if user is not None and user.domain == "" and user.op_type == "Add":
        others = [v for v in user.inputs if v is not value]
        other = at.known(others[0]) if len(others) == 1 else None
        if other is not None and other.shape == shape and other.buffer is not None and other.dtype == ir.DataType.FLOAT:
            residual, value = other, user.outputs[0]
            at.done.add(user)
            user = at.sole_user(value)
    kind = activation_of(user)
    if kind is not None and user is not None and not _gates(at, user):
        activation, value = kind, user.outputs[0]
        at.done.add(user)
    return Tail(value, residual, activation)


def _gates(at: Lowering, node: ir.Node) -> bool:
    """Whether the result of an activation is multiplied with another value, which one kernel does."""
    user = at.sole_user(node.outputs[0])
    return user is not None and user.domain == "" and user.op_type == "Mul"


@operator("Linear", domain=dialect.DOMAIN)
def linear(at: Lowering, node: ir.Node) -> None:
    """``x @ weight.T + bias``, with what follows it."""
    weight = read_weight(node.inputs[1])
    if weight is None or len(weight.shape) != 2:
        raise at.refuse(node, "its weight is computed")
    source, as_bytes = rounded_input(node, weight, exact=at.exact)
    x = at.input(node if source is None else source, 0)
    assert x is not None
    bias = at.input(node, 2)
    rows, columns = weight.shape
    at.program.require_equal(x.shape[-1], columns)
    shape = (*x.shape[:-1], dim(rows))
    tail = tail_of(at, node, shape)
    if as_bytes and source is not None:
        _bytes(at, source, weight, bias, tail, at.result(tail.value, shape))
        return
    x, shape = last_rows(at, tail, x, shape)
    exact = at.exact or (source is None and rounded_source(node.inputs[0]) is not None)  # rounded as wanted already
    multiply(at, x, weight, bias, tail, at.result(tail.value, shape), exact=exact)


def multiply(
    at: Lowering, x: Tensor, weight: Weight, bias: Tensor | None, tail: Tail, y: Tensor, *, exact: bool
) -> None:
    """``y = x @ weight.T + bias``; `exact` keeps x in float also where the weight is quantized."""
    if weight.format is None or why_decoded(weight.format):
        _float(at, x, weight, bias, tail, y)
    else:
        _quantized(at, x, weight, bias, tail, y, exact=exact)


def last_rows(at: Lowering, tail: Tail, x: Tensor, shape: tuple[Dim, ...]) -> tuple[Tensor, tuple[Dim, ...]]:
    """Leaves out the logits that a caller does not ask for: ``qc_skip`` tokens of the one text that is fed."""
    if tail.value not in at.logits or tail.residual is not None or len(shape) != 3 or not at.cached:
        return x, shape
    skip, (batch, tokens, rows) = dim("qc_skip"), shape
    x, m, n, ld = at.rows(x)
    return x.view((m - skip, n), (ld, dim(1)), ld * skip), (batch, tokens - skip, rows)


def _epilogue(at: Lowering, bias: Tensor | None, tail: Tail) -> tuple[list[Tensor], Dim]:
    """The pointers of an epilogue behind y, and the distance of the rows of the residual."""
    extra, distance = [], dim(0)
    if bias is not None:
        extra.append(at.contiguous(bias))
    if tail.residual is not None:
        residual, _, _, distance = at.rows(tail.residual)
        extra.append(residual)
    return extra, distance


def _float(at: Lowering, x: Tensor, weight: Weight, bias: Tensor | None, tail: Tail, y: Tensor) -> None:
    rows, columns = weight.shape
    wide = at.isa.tile[1]
    if rows % (wide * at.isa.lanes) and not rows % (2 * at.isa.lanes):
        wide = 2
    packed = float_weight(at, weight, wide)
    product_of(at, x, packed, _stored(weight), wide, columns, bias, tail, y)


def _stored(weight: Weight) -> str:
    return "f32" if weight.format is not None else _STORED[weight.dtype]


def float_weight(at: Lowering, weight: Weight, wide: int) -> Tensor:
    """A float weight ``[N, K]`` packed for units of `wide` vectors, in the precision that it is stored in."""
    rows, columns = weight.shape
    unit = wide * at.isa.lanes
    count = -(-rows // unit) * unit * columns
    size = 4 if _stored(weight) == "f32" else 2

    def make() -> np.ndarray:
        packed = pack_columns(weight.raw() if weight.format is None else weight.numpy(), unit)
        weight.release()
        return packed

    return at.program.constant((weight.value, unit), make, size * count, (count,), ir.DataType.UINT8)


def product_of(
    at: Lowering, x: Tensor, packed: Tensor, stored: str, wide: int, columns: Size, bias: Tensor | None, tail: Tail,
    y: Tensor,
) -> None:  # fmt: skip
    """Calls the float product."""
    x, m, _, ldx = at.rows(x)
    extra, ldr = _epilogue(at, bias, tail)
    options = (stored, wide, bias is not None, tail.residual is not None, tail.activation, at.repeating)
    name = at.program.kernel("float", float_product, *options, pointers=3 + len(extra), integers=6)
    n = y.shape[-1]
    units = divide(n + (wide * at.isa.lanes - 1), wide * at.isa.lanes)
    at.program.call(name, [x, packed, y, *extra], [m, n, columns, ldx, n, ldr], units, writes=[y])


def _quantized(
    at: Lowering, x: Tensor, weight: Weight, bias: Tensor | None, tail: Tail, y: Tensor, *, exact: bool
) -> None:
    assert weight.format is not None
    rows, columns = weight.shape
    codes = codes_of(weight.format, columns, at.isa, exact=exact)
    groups = groups_of(codes, columns)
    padded = groups * codes.block * codes.blocks
    packed = quantized_weight(at, weight, codes)
    x, m, _, ldx = at.rows(x)
    extra, ldr = _epilogue(at, bias, tail)
    options = (codes, bias is not None, tail.residual is not None, tail.activation, at.repeating)
    n = y.shape[-1]
    units = -(-rows // at.isa.lanes)
    grain = at.isa.int_tile[1]
    if exact:
        if columns != padded:
            wide = at.program.tensor((m, padded))
            fill(at, wide, "0.0f")
            copy(at, x.view((m, columns), (ldx, 1)), wide.view((m, columns), (padded, 1)))
            x, ldx = wide, dim(padded)
        name = at.program.kernel("exact", exact_product, *options, pointers=3 + len(extra), integers=6)
        at.program.call(name, [x, packed, y, *extra], [m, n, groups, ldx, n, ldr], units, writes=[y], grain=grain)
        return
    q, s, z = _quantize(at, x, m, ldx, columns, padded, codes.block)
    integers = [m, n, groups, n, ldr, *_tiles(at)]
    name = at.program.kernel("int", integer_product, *options, pointers=5 + len(extra), integers=len(integers))
    at.program.call(name, [q, s, z, packed, y, *extra], integers, units, writes=[y], grain=grain)


def _tiles(at: Lowering) -> list[Dim]:
    """What kernels of a level with tiles take last."""
    return [dim("q->model->tiles")] if at.isa.tiles else []


def _bytes(at: Lowering, source: ir.Node, weight: Weight, bias: Tensor | None, tail: Tail, y: Tensor) -> None:
    """Bytes times bytes."""
    codes, (rows, columns) = codes_of_rows(at, source), weight.shape
    unit, padded = vectors_of(at.isa) * at.isa.lanes, codes.q.shape[1]
    size = bytes_of(rows, columns, unit)

    def make() -> np.ndarray:
        return pack_bytes(weight.quantized(), unit, at.isa)

    packed = at.program.constant((weight.data, "bytes", unit), make, size, (size,), ir.DataType.UINT8)
    extra, ldr = _epilogue(at, bias, tail)
    zero = [codes.zero] if codes.zero is not None else []
    options = (bool(zero), bias is not None, tail.residual is not None, tail.activation)
    pointers = [codes.q, codes.scale, codes.total, *zero, packed, y, *extra]
    n = y.shape[-1]
    integers = [codes.rows, n, padded, n, ldr, *_tiles(at)]
    name = at.program.kernel("bytes", byte_product, *options, pointers=len(pointers), integers=len(integers))
    at.program.call(name, pointers, integers, -(-rows // unit), writes=[y])


def _quantize(
    at: Lowering, x: Tensor, m: Dim, ldx: Dim, columns: int, padded: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of the activations; the same rows are quantized once."""
    key = (x.buffer, x.offset, m, ldx, columns, padded, block)
    if key not in at.quantized:
        blocks = padded // block
        q = at.program.tensor((blocks, m, block), ir.DataType.INT8)
        s = at.program.tensor((blocks, m))
        z = at.program.tensor((blocks, m), ir.DataType.INT32)
        name = at.program.kernel("quantize", quantize_rows, block, pointers=4, integers=4)
        at.program.call(name, [x, q, s, z], [m, ldx, columns, padded], m, writes=[q, s, z])
        at.quantized[key] = (q, s, z)
    return at.quantized[key]


def quantized_weight(at: Lowering, weight: Weight, codes: Codes) -> Tensor:
    """A quantized weight in records."""
    rows, columns = weight.shape
    size = record_bytes(codes, rows, columns, at.isa)

    def make() -> np.ndarray:
        return pack_records(weight.quantized(), codes, at.isa)

    return at.program.constant((weight.data, "records", codes), make, size, (size,), ir.DataType.UINT8)


@operator("MatMul")
def matmul(at: Lowering, node: ir.Node) -> None:
    """A product of two computed values: the second is packed, one matrix at a time, and multiplied as a weight is."""
    a, b, y = matrices(at, node)
    *lead, m, n = y.shape
    k = a.shape[-1]
    if a.strides[-1] != dim(1):
        a = at.contiguous(a)
    wide, unit = at.isa.tile[1], at.isa.tile[1] * at.isa.lanes
    units = divide(n + (unit - 1), unit)
    packed = at.program.tensor((units * k * unit,))
    name = at.program.kernel("float", float_product, "f32", wide, False, False, "none", False, pointers=3, integers=6)
    steps = [_batch_step(t, lead) for t in (a, b)]
    at.program.use("pack_b")
    at.program.add(
        f"for (int64_t i = 0; i < {product(lead).c}; i++) {{ int64_t r = i, pa = 0, pb = 0; "
        + " ".join(
            f"{{ int64_t j = r % {size.c}; r /= {size.c}; pa += j * {sa.c}; pb += j * {sb.c}; }}"
            for size, sa, sb in zip(reversed(lead), reversed(steps[0]), reversed(steps[1]), strict=True)
        )
        + f" pack_b({b.c} + pb, {packed.c}, {k.c}, {n.c}, {b.strides[-2].c}, {b.strides[-1].c}, {unit}); "
        f"CALL({name}, 3, 6, PTRS({a.c} + pa, {packed.c}, {y.c} + i * {(m * n).c}), "
        f"INTS({m.c}, {n.c}, {k.c}, {a.strides[-2].c}, {n.c}, 0), {units.c}, 1); }}",
        [a, b, packed],
        [y, packed],
    )


def matrices(at: Lowering, node: ir.Node) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of a product and its result as matrices: a first vector is a row of one, a second a column."""
    a, b = (at.stored(at.get(v)) for v in node.inputs if v is not None)
    if a.dtype != ir.DataType.FLOAT:
        raise at.refuse(node, f"it multiplies {a.dtype.name}")
    row, column = len(a.shape) == 1, len(b.shape) == 1
    a = a.view((1, *a.shape), (a.shape[0] * a.strides[0], *a.strides)) if row else a
    b = b.view((*b.shape, 1), (*b.strides, 1)) if column else b
    lead = broadcast(at, [a.shape[:-2], b.shape[:-2]])
    at.program.require_equal(a.shape[-1], b.shape[-2])
    m, n = a.shape[-2], b.shape[-1]
    y = at.result(node.outputs[0], (*lead, *([] if row else [m]), *([] if column else [n])))
    shape = (*lead, m, n)
    return a, b, y.view(shape, dense(shape))


def _batch_step(tensor: Tensor, lead: Sequence[Dim]) -> list[Dim]:
    """Strides of the leading axes of an operand, as many as the result has, 0 where it repeats."""
    missing = len(lead) - (len(tensor.shape) - 2)
    steps = [dim(0)] * missing
    for size, stride in zip(tensor.shape[:-2], tensor.strides[:-2], strict=True):
        steps.append(stride_of(size, stride))
    return steps


@operator("Gather")
def gather(at: Lowering, node: ir.Node) -> None:
    """Rows of a table, or of any axis."""
    axis = int(at.attribute(node, "axis", 0))  # type: ignore[call-overload]
    weight = read_weight(node.inputs[0])
    if weight is not None and weight.format is not None and axis == 0 and not why_decoded(weight.format):
        indices = at.input(node, 1)
        assert indices is not None
        _gather_quantized(at, node, weight, at.contiguous(indices))
        return
    gather_values(at, node)


def gather_values(at: Lowering, node: ir.Node) -> None:
    """Rows of a table of numbers, perhaps of numbers that are known beforehand."""
    axis, table, indices = int(at.attribute(node, "axis", 0)), at.input(node, 0), at.input(node, 1)  # type: ignore[call-overload]
    assert table is not None
    assert indices is not None
    axis %= len(table.shape)
    if table.values is not None and indices.values is not None:
        picked = [table.values[int(i.constant)] for i in indices.values if i.constant is not None]  # type: ignore[arg-type]
        at.set(node.outputs[0], at.numbers(picked, table.dtype, scalar=not indices.shape))
        return
    if indices.values is not None and not indices.shape and indices.values[0].constant is not None:
        _select(at, node, at.stored(table), axis, indices.values[0].constant)
        return
    table, indices = at.contiguous(table), at.contiguous(indices)
    y = at.result(node.outputs[0], (*table.shape[:axis], *indices.shape, *table.shape[axis + 1 :]), table.dtype)
    outer, inner = product(table.shape[:axis]), product(table.shape[axis + 1 :])
    at.program.gather(table, indices, y, outer, table.shape[axis], inner)


def _select(at: Lowering, node: ir.Node, table: Tensor, axis: int, index: int) -> None:
    """One index of an axis: a view."""
    start = table.strides[axis] * (index if index >= 0 else table.shape[axis] + index)
    keep = [i for i in range(len(table.shape)) if i != axis]
    view = table.along(keep, start)
    at.set(node.outputs[0], view)


def _gather_quantized(at: Lowering, node: ir.Node, weight: Weight, indices: Tensor) -> None:
    """Decodes the rows that are read, out of the same records that a product reads."""
    assert weight.format is not None
    rows, columns = weight.shape
    c = codes_of(weight.format, columns, at.isa, exact=at.exact)
    packed = quantized_weight(at, weight, c)
    y = at.result(node.outputs[0], (*indices.shape, columns))
    kind = "64" if indices.dtype == ir.DataType.INT64 else "32"
    at.program.use("decode_rows", kind)
    L = at.isa.lanes
    facts = (
        rows, columns, groups_of(c, columns), L, c.bits, c.block, c.blocks, c.per_record, c.record_bytes(L),
        int(c.half), int(c.zeros), c.zero, int(c.signed(at.isa)), c.entry, int(c.by_group),
    )  # fmt: skip
    table = "NULL" if c.table is None else f"(const uint8_t[]){{{', '.join(map(str, c.table))}}}"
    numbers = ", ".join([*map(str, facts), table])
    at.program.add(
        f"TRY(decode_rows{kind}({packed.c}, {indices.c}, {y.c}, {indices.elements.c}, {numbers}));", [indices], [y]
    )
