"""Quantized weights in graphs: decode nodes, read and written.

| decode node | what it carries |
|---|---|
| none | the initializer is the float weight itself |
| ``Cast`` | a float weight stored in a narrower float type |
| ``DequantizeLinear`` | codes that ONNX has an element type for, with scales and, if asymmetric, zero points |
| ``qc.Decode`` | every other format: packed codes and parameters in the order of `Format.streams` |

The overload of a ``qc.Decode`` node is the format's spelling and the shape, ``nf4:g64@1024x384``, so a node says what
it is, and the body of its function (`qc.ir._quant_body`) is made from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import onnx_ir as ir

from qc.ir._quant_affine import AFFINE_TYPES, Affine
from qc.ir._quant_body import parse_signature, signature
from qc.ir._quant_format import Format, QuantizedTensor
from qc.ir._quant_scales import FloatScale
from qc.ir._quant_tables import Table
from qc.ir._quant_types import Stream
from qc.ir.dialect import DOMAIN, is_op
from qc.ir.store import Store, release

__all__ = ["Weight", "emit", "read_weight", "require_opset"]

_AFFINE_OF_TYPE = {dtype: key for key, dtype in AFFINE_TYPES.items()}
_TABLE_OF_TYPE = {ir.DataType.FLOAT8E4M3FN: "e4m3", ir.DataType.FLOAT8E5M2: "e5m2"}
_SCALE_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_CODES = ".codes"
_OPSETS = {ir.DataType.INT2: 25, ir.DataType.UINT2: 25}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant weight as a graph holds it.

    Attributes:
        value: What the consumer reads.
        data: The initializer with the numbers or codes.
        params: The other initializers of the decode node: ``scale``, ``zero_point``...
        format: The format if quantized, None if the weight is float (perhaps stored narrower).
        shape: Static shape; that of a convolution has a kernel, ``[N, K, ...]``.
    """

    value: ir.Value
    data: ir.Value
    params: dict[str, ir.Value]
    format: Format | None
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the weight: of the initializer with the numbers, without what `emit` adds to that of codes."""
        return (self.data.name or "").removesuffix(_CODES)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as a matrix ``[N, K]``: a row has all that makes one output channel."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the stored numbers or codes."""
        return self.tensor.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its initializers."""
        return sum(_tensor(v).nbytes for v in (self.data, *self.params.values()))

    def raw(self) -> np.ndarray:
        """The stored numbers or codes as they are: a view of the file where the element type allows, never decoded.

        Hold the result and convert slices of it: a tensor that is computed when read is computed by each call. Drop it
        and call `release` when done.
        """
        return self.tensor.numpy()

    def release(self) -> None:
        """Unmaps the files of its initializers, so that pages once read stop counting as memory of this process.

        They are mapped again when read again. A file of which somebody still holds a view stays mapped.
        """
        for value in (self.data, *self.params.values()):
            release(_tensor(value))

    def numpy(self) -> np.ndarray:
        """Reads and decodes the weight: a new float32 array, or a read-only view of the file if stored in float32."""
        if self.format is None:
            return np.asarray(self.tensor.numpy(), dtype=np.float32)
        return self.quantized().decode().reshape(self.shape)

    def quantized(self) -> QuantizedTensor:
        """Reads the codes and parameters of a quantized weight ``[N, K]``: copies, so that no file stays mapped.

        Raises:
            ValueError: If the weight is float.
        """
        if self.format is None:
            raise ValueError(f"Expected a quantized weight, found {self.name!r} in {self.dtype.name}.")
        found = {}
        for stream in self.format.streams(self.matrix):
            value = self.data if stream.name == "codes" else self.params.get(stream.name)
            # Codes without a zero point have one of 0.
            found[stream.name] = _read(stream, value, self.format) if value is not None else np.zeros(stream.shape)
        codes = found.pop("codes")
        self.release()
        if self.format.native is not None:
            codes = codes.astype(np.int8 if self.format.values.low else np.uint8)
            found = {k: v.astype(np.uint8) if k == "zero_point" else v for k, v in found.items()}
        return QuantizedTensor(self.format, codes, found)

    @functools.cached_property
    def tensor(self) -> ir.TensorProtocol:
        """The stored numbers or codes, not read."""
        return _tensor(self.data)


def read_weight(value: ir.Value | None) -> Weight | None:
    """Describes the constant weight that `value` carries, or returns None if it is not one.

    No numbers are read. Behind a ``DequantizeLinear``, a weight is recognised if it is rank 2 with groups along one of
    its axes, one group per row or column, or one scale, or that of a convolution with one scale per output channel or
    one in all; any other constant one is not a weight in a format of ours.
    """
    if value is None:
        return None
    if value.const_value is not None and value.is_initializer() and not value.is_graph_input():
        return Weight(value, value, {}, None, _shape(value))
    node = value.producer()
    if node is None or not node.inputs or not all(v is None or _is_constant(v) for v in node.inputs):
        return None
    data = node.inputs[0]
    if data is None:
        return None
    if is_op(node, "Decode"):
        format, shape = parse_signature(node.overload)
        names = [s.name for s in format.streams(shape)]
        params = {name: v for name, v in zip(names, node.inputs, strict=True) if v is not None and v is not data}
        return Weight(value, data, params, format, shape)
    if node.domain != "":
        return None
    if node.op_type == "Cast" and value.dtype == ir.DataType.FLOAT and _tensor(data).dtype.is_floating_point():
        return Weight(value, data, {}, None, _shape(data))
    if node.op_type != "DequantizeLinear":
        return None
    params = {k: v for k, v in zip(("scale", "zero_point"), node.inputs[1:], strict=False) if v is not None}
    format = _format_of(node, data, params)
    return None if format is None else Weight(value, data, params, format, _shape(data))


def _format_of(node: ir.Node, data: ir.Value, params: dict[str, ir.Value]) -> Format | None:
    tensor, scale = _tensor(data), _tensor(params["scale"])
    if len(tensor.shape) < 2 or scale.dtype not in _SCALE_TYPES:
        return None
    zeros = "zero_point" in params and np.any(_tensor(params["zero_point"]).numpy())
    if tensor.dtype in _TABLE_OF_TYPE:
        values = Table(_TABLE_OF_TYPE[tensor.dtype])
    elif tensor.dtype in _AFFINE_OF_TYPE:
        values = Affine(*_AFFINE_OF_TYPE[tensor.dtype])
        zeros = zeros and values.symmetric
    else:
        return None
    grouping = None if zeros else _grouping_of(node, tensor.shape.numpy(), tuple(scale.shape.numpy()))
    return None if grouping is None else Format(values, grouping[0], FloatScale(scale.dtype), grouping[1])


def _grouping_of(node: ir.Node, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int | None, str] | None:
    axis, block = (
        node.attributes[k].as_int() if k in node.attributes else d for k, d in (("axis", 1), ("block_size", 0))
    )
    axis %= len(shape)
    along = len(shape) > 2 and axis > 0  # the one scale of an axis of size 1 that is not that of the output channels
    if not block and scale in ((), (1,)) and (shape[axis] > 1 or along):
        return None, "tensor"
    if len(shape) > 2:
        return (None, "in") if not block and axis == 0 and scale == shape[:1] else None
    groups = -(-shape[axis] // block) if block else 1
    blocked = (shape[0], groups) if axis == 1 else (groups, shape[1])
    if block and scale == blocked:
        return block, "in" if axis == 1 else "out"
    if not block and scale == (shape[axis],):
        return None, "out" if axis == 1 else "in"
    return None


def emit(tensor: QuantizedTensor, like: ir.Value, store: Store) -> ir.Node:
    """Builds the decode node of a quantized weight, its initializers written to `store`.

    The initializers are named after `like` and not yet registered: the caller inserts the node into its graph and calls
    ``graph.register_initializer`` on each of the node's inputs.

    Args:
        tensor: The codes.
        like: The value that the node's output will replace; gives name, and the shape if that is no matrix.
        store: Where codes and parameters are written.
    """
    format, name, shape = tensor.format, like.name or "weight", tensor.shape
    whole = tuple(like.shape.numpy()) if like.shape is not None else shape

    def constant(stream: Stream) -> ir.Value:
        array = tensor.codes if stream.name == "codes" else tensor.params[stream.name]
        array = stream.pack(array)
        if format.native is not None:
            array = _as_dequantized(array, stream.name, format)
            array = array.reshape(whole) if stream.name == "codes" else array
        held = store.put(f"{name}.{stream.name}", array, stream.dtype or ir.DataType.UINT8)
        value = ir.Value(name=f"{name}.{stream.name}", const_value=held, shape=ir.Shape(held.shape.numpy()))
        value.dtype = held.dtype
        return value

    inputs = [constant(stream) for stream in format.streams(shape)]
    if format.native is None:
        node = ir.Node(DOMAIN, "Decode", inputs, overload=signature(format, shape))
    else:
        node = ir.node("DequantizeLinear", inputs, _attributes(format))
    out = node.outputs[0]
    out.name, out.dtype, out.shape = f"{name}.decoded", ir.DataType.FLOAT, ir.Shape(whole)
    return node


def _attributes(format: Format) -> dict[str, int]:
    axes = {"in": (0, 1), "out": (1, 0), "tensor": (1, 1)}[format.axis]
    attributes = {"axis": axes[0]} if format.group is None else {"axis": axes[1], "block_size": format.group}
    if format.axis == "tensor":
        attributes = {}
    if format.scale != FloatScale():
        attributes["output_dtype"] = int(ir.DataType.FLOAT)
    return attributes


def _as_dequantized(array: np.ndarray, name: str, format: Format) -> np.ndarray:
    """An array of `QuantizedTensor` as ``DequantizeLinear`` reads it."""
    if name != "codes":
        if format.axis == "tensor":
            return array.reshape(())
        array = array[:, 0] if format.group is None else array
    elif format.native is not None and format.native.is_floating_point():
        return array.view(format.native.numpy())
    return array.T if format.axis == "out" else array


def _read(stream: Stream, value: ir.Value, format: Format) -> np.ndarray:
    """The inverse of what `emit` does to one stream: a copy."""
    stored = _tensor(value).numpy()
    if format.native is None:
        return np.array(stream.unpack(stored))
    if stream.name == "codes" and format.native.is_floating_point():
        stored = stored.view(np.uint8)
    if format.axis == "out" and stored.ndim == 2:
        stored = stored.T
    return np.array(stored).reshape(stream.shape)


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(_tensor(value).shape.numpy())


def require_opset(model: ir.Model, format: Format) -> None:
    """Raises the model's default opset to the first that expresses `format` (25 for 2-bit element types).

    From 23 on, the operators of our canonical form only gained element types, so raising changes no meaning.
    """
    needed = _OPSETS.get(format.native, 21)
    model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), needed)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.is_graph_input()


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None, "read_weight only describes constants"
    return tensor
