"""Weights in the two forms that integer units of NPUs multiply: 8 or 4 bits with one symmetric scale per channel.

| weight | becomes |
|---|---|
| up to 4 bits, symmetric per row | int4, the same codes and magnitudes of scales |
| up to 8 bits, symmetric per row | int8, likewise |
| any other quantized one (groups, zero points, tables) | int8 per row, encoded anew |
| float | int16 with one scale |

Scales of such units are positive. The sign of a negative one goes into a factor of its output channel,
``y = (x W') * sign``. A table of up to 8 bits with one symmetric scale per row is looked up as codes and scales,
``Gather(codes, i) * Gather(scales, i)``; others get 16 bits together with the values around them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.quant import Affine, QuantizedTensor, Weight, read_weight
from qc.passes.base import Context, Contract, Lossy, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import add_constant, drop_unused, replace
from qc.passes.quantize._ranges import Grid
from qc.passes.quantize._static import pair

__all__ = ["LowerWeights", "decoded_weight"]

_CODES = {4: ir.DataType.INT4, 8: ir.DataType.INT8, 16: ir.DataType.INT16}


@dataclasses.dataclass(frozen=True)
class LowerWeights(Pass):
    """Rewrites ``qc::Linear`` to ``MatMul(x, DequantizeLinear(codes [K, N]))`` [+ ``Add``], and convolutions likewise.

    Exact for the formats that the module's table says so of, else an encoding anew with ``|w - w'| <= s / 2``, s the
    largest magnitude of the row by 127, or of the whole weight by 32767. Left alone: computed weights.
    """

    contract: ClassVar[Contract] = Lossy()

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        sites = []
        held: dict[tuple[ir.Value, bool], _Held] = {}
        tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in tuple(model.graph):
            linear = dialect.is_op(node, "Linear")
            if node.op_type == "Gather" and node.domain == "":
                sites += _look_up(model, node, context, tables)
                continue
            if not linear and not (node.op_type == "Conv" and node.domain == ""):
                continue
            source = node.inputs[1]
            weight = read_weight(source)
            if weight is None:
                sites.append(Site(site_name(node), Outcome.SKIPPED, "its weight is computed"))
                if linear:
                    _product(node, _transposed(model.graph, source, node), None)
                continue
            if (source, linear) not in held:
                held[source, linear] = _decoded(model, weight, context, node, transposed=linear)
            found = held[source, linear]
            details = {"format": str(weight.format or "float"), "codes": found.codes}
            sites.append(Site(site_name(node), Outcome.CHANGED, details=details))
            if linear:
                _product(node, found.decoded, found.signs)
            else:
                node.replace_input_with(1, found.decoded)
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
            dialect.sync_functions(model)
        return result


def _transposed(graph: ir.Graph, weight: ir.Value, before: ir.Node) -> ir.Value:
    node = ir.node("Transpose", [weight], {"perm": [1, 0]})
    node.outputs[0].dtype = weight.dtype
    node.outputs[0].shape = ir.Shape(list(weight.shape)[::-1]) if weight.shape is not None else None
    graph.insert_before(before, node)
    return node.outputs[0]


def decoded_weight(
    model: ir.Model,
    weight: Weight,
    context: Context,
    before: ir.Node,
    *,
    shape: tuple[int, ...],
    divisors: np.ndarray | None = None,
) -> ir.Value:
    """A quantized weight as int8 with one scale per output channel, its first axis, behind a decode node.

    Negative scales become negative codes, -128 becomes 127.

    Args:
        model: The model.
        weight: The weight.
        context: Where the codes are written.
        before: The node that the decode node is put in front of.
        shape: The shape to store it in, in the same order.
        divisors: Positive numbers that its output channels are divided by.
    """
    _, codes, scale = _encode(weight)
    scale = scale if divisors is None else scale / divisors
    codes = np.clip(codes.reshape(weight.matrix) * np.sign(scale)[:, None], -128, 127)
    return _behind_decode(model, f"{weight.name}.npu", codes.reshape(shape), np.abs(scale), context, before, 8, axis=0)


@dataclasses.dataclass(frozen=True)
class _Held:
    """A weight as integer units read it.

    Attributes:
        decoded: Behind its decode node.
        signs: Factors of the output channels, None if all are 1.
        codes: What it is, for the report.
    """

    decoded: ir.Value
    signs: ir.Value | None
    codes: str


def _product(node: ir.Node, decoded: ir.Value, signs: ir.Value | None) -> None:
    x, bias = node.inputs[0], (*node.inputs, None)[2]
    nodes = [ir.node("MatMul", [x, decoded])]
    for op_type, operand in (("Mul", signs), ("Add", bias)):
        if operand is None:
            continue
        product = nodes[-1].outputs[0]
        product.name = f"{node.outputs[0].name}.before_{op_type.lower()}"
        product.dtype, product.shape = node.outputs[0].dtype, node.outputs[0].shape
        nodes.append(ir.node(op_type, [product, operand]))
    replace(node.outputs[0], nodes, like=node)


def _decoded(model: ir.Model, weight: Weight, context: Context, before: ir.Node, *, transposed: bool) -> _Held:
    """A weight behind a decode node that integer units read, in front of its first reader."""
    bits, codes, scale = _encode(weight)
    codes, signs = codes.reshape(weight.shape), None
    if (scale < 0).any() and transposed:
        signs = add_constant(model.graph, f"{weight.name}.signs", ir.tensor(np.sign(scale)))
        scale = np.abs(scale)
    if transposed:
        codes = codes.T
    axis = 1 if transposed else 0
    out = _behind_decode(model, f"{weight.name}.npu", codes, scale, context, before, bits, axis)
    return _Held(out, signs, f"int{bits} per {'channel' if scale.ndim else 'tensor'}")


def _behind_decode(
    model: ir.Model,
    name: str,
    codes: np.ndarray,
    scale: np.ndarray,
    context: Context,
    before: ir.Node,
    bits: int,
    axis: int,
) -> ir.Value:
    graph, dtype = model.graph, _CODES[bits]
    inputs = [
        add_constant(graph, f"{name}.codes", context.store.put(f"{name}.codes", codes.astype(dtype.numpy()), dtype)),
        add_constant(graph, f"{name}.scale", ir.tensor(scale)),
        add_constant(graph, f"{name}.zero_point", ir.tensor(np.zeros(scale.shape, dtype.numpy()), dtype=dtype)),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": axis} if scale.ndim else {})
    out = node.outputs[0]
    out.name, out.dtype, out.shape = f"{name}.decoded", ir.DataType.FLOAT, ir.Shape(codes.shape)
    graph.insert_before(before, node)
    return out


def _look_up(
    model: ir.Model, node: ir.Node, context: Context, tables: dict[ir.Value, tuple[ir.Value, ir.Value]]
) -> list[Site]:
    """Looks up codes and scales of a table instead of its numbers, if it has one scale per row; else does nothing.

    Several nodes that read one table share what `tables` holds of it.
    """
    source, axis = node.inputs[0], node.attributes.get("axis")
    weight = read_weight(source)
    if weight is None or weight.format is None or len(weight.shape) != 2 or (axis is not None and axis.as_int() != 0):
        return []
    tensor = weight.quantized()
    if not _symmetric(tensor):
        return []
    graph, index, out = model.graph, node.inputs[1], node.outputs[0]
    unit = Grid(8, True, np.array(2.0**-7, np.float32), np.array(0))
    if source not in tables:
        name = f"{weight.name}.npu"
        scales = tensor.params["scale"].astype(np.float32).reshape(-1, 1) / unit.scale
        tables[source] = (
            add_constant(graph, f"{name}.codes", context.store.put(f"{name}.codes", tensor.codes.astype(np.int8))),
            add_constant(graph, f"{name}.scales", context.store.put(f"{name}.scales", scales)),
        )
    codes, held = tables[source]
    rows, factors = ir.node("Gather", [ir.Value(), index]), ir.node("Gather", [held, index])
    for row, width in ((rows, weight.shape[1]), (factors, 1)):
        value = row.outputs[0]
        value.dtype, value.shape = ir.DataType.FLOAT, _resized(out.shape, width)
    rows.outputs[0].name, factors.outputs[0].name = f"{out.name}.rows", f"{out.name}.factors"
    narrow = pair(model, rows.outputs[0], unit, f"{out.name}.rows")
    decode = ir.node("DequantizeLinear", [codes, *narrow[0].inputs[1:]])
    decode.outputs[0].name, decode.outputs[0].dtype = f"{out.name}.table", ir.DataType.FLOAT
    decode.outputs[0].shape = ir.Shape(weight.shape)
    rows.replace_input_with(0, decode.outputs[0])
    wide = pair(model, narrow[1].outputs[0], Grid.of(-1.0, 1.0, 16, symmetric=False), f"{out.name}.wide")
    product = ir.node("Mul", [wide[1].outputs[0], factors.outputs[0]])
    replace(out, [decode, rows, *narrow, *wide, factors, product], like=node)
    return [Site(site_name(node), Outcome.CHANGED, details={"format": str(weight.format), "codes": "int8 per row"})]


def _resized(shape: ir.Shape | None, width: int) -> ir.Shape | None:
    """A shape with another last axis."""
    return ir.Shape([*list(shape)[:-1], width]) if shape is not None else None


def _encode(weight: Weight) -> tuple[int, np.ndarray, np.ndarray]:
    """Bits, codes ``[N, K]`` and scales of a weight."""
    rows = weight.matrix[0]
    if weight.format is None:
        whole = weight.numpy().reshape(weight.matrix)
        scale = _scale(np.abs(whole).max(initial=0.0), 16)
        return 16, np.rint(whole / scale), scale
    tensor = weight.quantized()
    if _symmetric(tensor) and (len(weight.shape) == 2 or (tensor.params["scale"] > 0).all()):
        scale = tensor.params["scale"].astype(np.float32).reshape(rows)
        return 4 if tensor.format.values.bits <= 4 else 8, tensor.codes, scale
    whole = tensor.decode()
    scale = _scale(np.abs(whole).max(1), 8)
    return 8, np.rint(whole / scale[:, None]), scale


def _scale(largest: np.ndarray | float, bits: int) -> np.ndarray:
    return np.maximum(np.float32(largest) / (2 ** (bits - 1) - 1), np.float32(1e-30)).astype(np.float32)


def _symmetric(tensor: QuantizedTensor) -> bool:
    """Whether codes are signed, with one scale per row and nothing else."""
    values = tensor.format.values
    signed = isinstance(values, Affine) and values.symmetric and not values.half and set(tensor.params) == {"scale"}
    return signed and tensor.format.per_row
