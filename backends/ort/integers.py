"""Products of 8-bit activations with 8-bit weights, on the runtime's integer kernels."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.integers import code_bits, rounded_source
from qc.backends.ort._lowering import MICROSOFT, finish
from qc.backends.ort.packed import float_scale
from qc.ir import dialect
from qc.ir.quant import Weight, read_weight
from qc.passes.base import Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import add_constant, made_by, replace, stored

__all__ = ["LowerIntegerLinear", "LowerIntegerMatMul"]

_BYTE = 8

_SMALLEST_SCALE = 1e-30


@dataclasses.dataclass(frozen=True)
class LowerIntegerLinear(Pass):
    """Fuses a Linear with an 8-bit per-channel weight and an input of at most 8 bits into ``MatMulIntegerToFloat``.

    With codes q of the input, ``x' = r (q - z) s`` for scalars z and s and perhaps a factor r of each token,
    ``Linear(x', W) = r * MatMulIntegerToFloat(q, W, s, z)``, plus the bias:

    | input | q, s, z | r |
    |---|---|---|
    | ``DequantizeLinear(DynamicQuantizeLinear(x))`` | its outputs | none |
    | ``DequantizeLinear(QuantizeLinear(x, s, z))``, 4 or 8 bits per tensor | ``QuantizeLinear(x, s, z)`` | none |
    | ``qc.DynamicQuantize``, per tensor | ``QuantizeLinear(x / s)`` with s, z found in the same way | none |
    | ``qc.DynamicQuantize``, per token, symmetric | ``QuantizeLinear(x / r)``, 1, 128 | ``max|x| / (h - 1)`` |

    All Linears on one x share the codes. Exact up to the rounding of the float scales. Symmetric codes are shifted to
    unsigned ones, which x86 multiplies faster.

    Other weights are left to `LowerQuantizedWeights`, whose kernel quantizes activations itself, per block, and
    asymmetric grids per token to the operator's body: their zero points differ by row, which no kernel takes. On x86
    without VNNI the runtime adds pairs of u8 x s8 products in 16 bits, which saturate for the largest weights; such a
    machine needs weights of 7 bits.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites: list[Site] = []
        known: dict[ir.Node, _Codes | None] = {}
        turned: dict[ir.Value, ir.Value] = {}
        for node in [n for n in model.graph if dialect.is_op(n, "Linear")]:
            source, weight = rounded_source(node.inputs[0]), read_weight(node.inputs[1])
            if source is None or weight is None or weight.format is None:
                continue
            reason = _why_not(weight)
            if reason is None:
                same = next((s for s in known if _equal(s, source)), source)
                if same not in known:
                    known[same] = _codes(model.graph, same)
                codes = known[same]
                if codes is not None:
                    if weight.data not in turned:
                        turned[weight.data] = _turned(model.graph, weight)
                    _fuse(node, codes, weight, turned[weight.data])
                    details = {"kernel": "MatMulIntegerToFloat", "format": str(weight.format)}
                    sites.append(Site(site_name(node), Outcome.CHANGED, details=details))
                    continue
                reason = "no integer kernel takes this grid of its input"
            sites.append(Site(site_name(node), Outcome.SKIPPED, reason))
        return finish(model, sites)


@dataclasses.dataclass(frozen=True)
class LowerIntegerMatMul(Pass):
    """Fuses a ``MatMul`` of two activations on static grids, each with one scale, into ``MatMulIntegerToFloat``.

    ``MatMul((p - y) r, (q - z) s) = MatMulIntegerToFloat(p, q, r, s, y, z)``. Exact up to the rounding of the scales.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: object = None) -> Result:
        sites = []
        for node in [n for n in model.graph if n.domain == "" and n.op_type == "MatMul"]:
            held = [_decoded_codes(v) for v in node.inputs]
            if held[0] is None or held[1] is None:
                continue
            (p, r, y), (q, s, z) = held
            replace(node.outputs[0], [ir.node("MatMulIntegerToFloat", [p, q, r, s, y, z], domain=MICROSOFT)], node)
            sites.append(Site(site_name(node), Outcome.CHANGED, details={"kernel": "MatMulIntegerToFloat"}))
        return finish(model, sites)


def _decoded_codes(x: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Codes, scale and zero point of an activation in bytes on one static grid; None if x is anything else."""
    decode = made_by(x, "DequantizeLinear")
    codes, scale, zero = (*decode.inputs, None, None)[:3] if decode is not None else (None, None, None)
    step, start = stored(scale), stored(zero)
    if codes is None or scale is None or zero is None or step is None or start is None or stored(codes) is not None:
        return None
    one = step.size == 1 and step.dtype == ir.DataType.FLOAT and start.dtype in (ir.DataType.UINT8, ir.DataType.INT8)
    return (codes, scale, zero) if one else None


@dataclasses.dataclass(frozen=True)
class _Codes:
    """An input as ``factor * (codes - zero) * scale``; the factor is one of each token, or absent."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value
    factor: ir.Value | None = None


def _why_not(weight: Weight) -> str | None:
    format = weight.format
    assert format is not None
    fits = format.native in (ir.DataType.INT8, ir.DataType.UINT8) and format.per_row
    return None if fits else f"the integer product needs int8 per channel, not {format}"


def _equal(a: ir.Node, b: ir.Node) -> bool:
    """Whether both round the same value in the same way."""
    values = [{k: v.value for k, v in n.attributes.items()} for n in (a, b)]
    return a.op_identifier() == b.op_identifier() and a.inputs[0] is b.inputs[0] and values[0] == values[1]


def _codes(graph: ir.Graph, source: ir.Node) -> _Codes | None:
    """The codes of an input, with the nodes that make them in front of `source`; None if they do not fit 8 bits."""
    if source.op_type == "DynamicQuantizeLinear":
        return _Codes(*source.outputs)
    if source.op_type == "QuantizeLinear":
        return _static_codes(graph, source)
    bits, granularity, symmetric = _grid(source)
    if bits > _BYTE or (granularity == "token" and not symmetric):
        return None
    build = _Builder(graph, source)
    return build.symmetric(bits, granularity == "token") if symmetric else build.asymmetric(bits)


def _static_codes(graph: ir.Graph, source: ir.Node) -> _Codes | None:
    """Codes on a constant grid as unsigned bytes; signed ones and their zero point are shifted."""
    x, scale, zero = (*source.inputs, None)[:3]
    step, start = stored(scale), stored(zero)
    if x is None or scale is None or zero is None or step is None or start is None:
        return None
    if step.size != 1 or step.dtype != ir.DataType.FLOAT or start.dtype.bitwidth > _BYTE:
        return None
    if start.dtype == ir.DataType.UINT8:
        return _Codes(source.outputs[0], scale, zero)
    bits, signed = start.dtype.bitwidth, start.dtype.is_signed()
    low = 128 - (1 << (bits - 1)) if signed else 0
    build = _Builder(graph, source)
    shifted = build.byte("zero_point", int(start.numpy().astype(np.int64).reshape(())) + (128 if signed else 0))
    return _Codes(build.codes(scale, shifted, bits, low), scale, shifted)


def _grid(source: ir.Node) -> tuple[int, str, bool]:
    granularity, _, symmetry = source.overload.partition("_")
    return code_bits(source), granularity, symmetry == "symmetric"


class _Builder:
    """Writes the nodes that find a grid and the codes on it, as the bodies in `qc.ir.dialect` do."""

    def __init__(self, graph: ir.Graph, source: ir.Node) -> None:
        self._graph, self._source = graph, source
        x = source.inputs[0]
        assert x is not None
        self._x = x

    @property
    def _clip(self) -> float:
        return self._source.attributes["clip"].as_float()

    def symmetric(self, bits: int, token: bool) -> _Codes:
        half = 1 << (bits - 1)
        size = self._node("Abs", [self._x])
        axes = [self._constant("axes", np.array([-1], np.int64))] if token else []
        largest = self._node("ReduceMax", [size, *axes], keepdims=int(token))
        scale = self._node("Mul", [largest, self._float("unit", self._clip / (half - 1))])
        scale = self._node("Max", [scale, self._float("smallest", _SMALLEST_SCALE)])
        zero = self.byte("zero_point", 128)
        codes = self.codes(scale, zero, bits, 128 - half)
        return _Codes(codes, self._float("one", 1.0), zero, scale) if token else _Codes(codes, scale, zero)

    def asymmetric(self, bits: int) -> _Codes:
        top = (1 << bits) - 1
        clip, nothing = self._float("clip", self._clip), self._float("nothing", 0.0)
        low = self._node("Mul", [clip, self._node("Min", [self._reduced("ReduceMin"), nothing])])
        high = self._node("Mul", [clip, self._node("Max", [self._reduced("ReduceMax"), nothing])])
        scale = self._node("Div", [self._node("Sub", [high, low]), self._float("top", top)])
        scale = self._node("Max", [scale, self._float("smallest", _SMALLEST_SCALE)])
        zero = self._node("Round", [self._node("Div", [self._node("Neg", [low]), scale])])
        zero = self._node("Cast", [zero], ir.DataType.UINT8, to=int(ir.DataType.UINT8))
        return _Codes(self.codes(scale, zero, bits, 0), scale, zero)

    def _reduced(self, op_type: str) -> ir.Value:
        return self._node(op_type, [self._x], keepdims=0)

    def codes(self, scale: ir.Value, zero: ir.Value, bits: int, low: int) -> ir.Value:
        """Unsigned bytes ``clamp(round(x / scale) + zero, low, low + 2^bits - 1)``."""
        inputs = [self._x, scale, zero]
        if stored(scale) is None and self._source.overload.startswith("token"):
            inputs = [self._node("Div", [self._x, scale]), self._float("one", 1.0), zero]
        codes = self._node("QuantizeLinear", inputs, ir.DataType.UINT8)
        if bits == _BYTE:
            return codes
        ends = [self.byte("low", low), self.byte("high", low + (1 << bits) - 1)]
        return self._node("Clip", [codes, *ends], ir.DataType.UINT8)

    def byte(self, name: str, number: int) -> ir.Value:
        """A constant of type uint8."""
        return self._constant(name, np.array(number, np.uint8))

    def _node(self, op: str, inputs: list[ir.Value], dtype: ir.DataType = ir.DataType.FLOAT, **kw: int) -> ir.Value:
        node = ir.node(op, inputs, kw)
        node.outputs[0].dtype = dtype
        node.metadata_props.update(self._source.metadata_props)
        self._graph.insert_before(self._source, node)
        return node.outputs[0]

    def _float(self, name: str, number: float) -> ir.Value:
        return self._constant(name, np.array(number, np.float32))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_constant(self._graph, f"{self._x.name}.{name}", ir.tensor(array))


def _fuse(node: ir.Node, codes: _Codes, weight: Weight, turned: ir.Value) -> None:
    """Replaces a Linear by the product of the codes of its input with those of its weight."""
    format = weight.format
    assert format is not None
    nodes, weight_scale = float_scale(weight.params["scale"])
    zero_point = weight.params.get("zero_point") if format.native == ir.DataType.UINT8 else None
    bias = (*node.inputs, None)[2]
    operands = [codes.codes, turned, codes.scale, weight_scale, codes.zero, zero_point]
    if codes.factor is None:
        operands.append(bias)
    while operands[-1] is None:
        operands.pop()
    nodes.append(ir.node("MatMulIntegerToFloat", operands, domain=MICROSOFT))
    if codes.factor is not None:
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], codes.factor]))
        if bias is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias]))
    replace(node.outputs[0], nodes, like=node)


def _turned(graph: ir.Graph, weight: Weight) -> ir.Value:
    """The 8-bit codes of a weight as ``[K, N]``, transposed when they are read."""
    tensor, (rows, columns) = weight.data.const_value, weight.shape
    assert tensor is not None
    name = f"{weight.name}.transposed"

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name)

    return add_constant(
        graph, name, ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape((columns, rows)), name=name)
    )
