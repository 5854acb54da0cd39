"""What the numbers of a weight mean: `Format`, `QuantizedTensor`, and how both appear in a graph.

A format has four independent parts: *grouping* (which elements share parameters), *values* (what a code stands for),
*scale* (how the parameters are stored) and, later, a *remainder*. ``Format.decode(codes, params)`` is its definition;
everything else (how codes are chosen, how they lie in bytes, which kernel runs) is somebody else's business.

In a graph, a weight is initializers behind a *decode node*:

* none: the initializer is the float weight itself;
* ``Cast``: a float weight stored in a narrower float type;
* ``DequantizeLinear``: affine codes with scales and, if asymmetric, zero points.

`read_weight` sees through them, `emit` writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.store import Store, release

__all__ = [
    "Affine",
    "Format",
    "QuantizedTensor",
    "Weight",
    "emit",
    "named_formats",
    "read_weight",
    "require_opset",
]

_AFFINE_TYPES = {
    (2, True): ir.DataType.INT2,
    (2, False): ir.DataType.UINT2,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}
_AFFINE_OF_TYPE = {dtype: key for key, dtype in _AFFINE_TYPES.items()}
_SCALE_TYPES = {"f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16}
_CODES = ".codes"
_OPSET_OF_BITS = {2: 25, 4: 21, 8: 21}


@dataclasses.dataclass(frozen=True)
class Affine:
    """The value map ``w = (q - z) * s`` with a per-group scale s and zero point z.

    Attributes:
        bits: Width of a code: 2, 4 or 8.
        symmetric: True: z = 0 and codes in ``[-2^(b-1), 2^(b-1) - 1]``. False: z is a code, both in ``[0, 2^b - 1]``.
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if (self.bits, self.symmetric) not in _AFFINE_TYPES:
            raise InputError(f"Expected affine codes of 2, 4 or 8 bits, found {self.bits}. See `qc formats`.")

    @property
    def dtype(self) -> ir.DataType:
        """ONNX element type of the codes and zero points."""
        return _AFFINE_TYPES[self.bits, self.symmetric]

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """Largest code."""
        return self.low + (1 << self.bits) - 1


@dataclasses.dataclass(frozen=True)
class Format:
    """The meaning of a quantized weight ``[N, K]`` (output channels first).

    Attributes:
        values: The value map of a code.
        group: Number of consecutive elements along K that share parameters; None: the whole row (per channel).
        scale: Storage type of the scales.
    """

    values: Affine
    group: int | None = None
    scale: ir.DataType = ir.DataType.FLOAT

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise InputError(f"Expected a group of at least 1 element, or none for per channel; found {self.group}.")
        if self.scale not in _SCALE_TYPES.values():
            raise InputError(f"Expected scales in {sorted(_SCALE_TYPES)}, found {self.scale.name}.")

    @classmethod
    def parse(cls, text: str) -> Format:
        """Reads the spelling that `str` writes: ``int4``, ``uint4:g32``, ``int8:g128:f16``.

        ``int`` is symmetric, ``uint`` asymmetric; ``gN`` the group, absent for per channel; ``f16`` half-precision
        scales.

        Raises:
            InputError: If `text` is not such a spelling.
        """
        match = re.fullmatch(r"(u?)int(\d+)(?::g(\d+))?(?::(f16|f32))?", text)
        if match is None:
            raise InputError(
                f"Expected a format such as int4, uint4:g32 or int8:g128:f16, found {text!r}. `qc formats` lists them."
            )
        unsigned, bits, group, scale = match.groups()
        return cls(Affine(int(bits), not unsigned), int(group) if group else None, _SCALE_TYPES[scale or "f32"])

    def __str__(self) -> str:
        name = f"{'' if self.values.symmetric else 'u'}int{self.values.bits}"
        group = "" if self.group is None else f":g{self.group}"
        return name + group + ("" if self.scale == ir.DataType.FLOAT else ":f16")

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` elements; the last one may be shorter."""
        return 1 if self.group is None else -(-columns // self.group)

    def decode(self, codes: np.ndarray, params: dict[str, np.ndarray]) -> np.ndarray:
        """The definition of the format.

        Args:
            codes: ``[N, K]`` integers.
            params: ``scale`` ``[N, groups]``, and ``zero_point`` ``[N, groups]`` if asymmetric.

        Returns:
            The weight, float32 ``[N, K]``.
        """
        columns = codes.shape[1]
        width = columns if self.group is None else self.group

        def spread(param: np.ndarray) -> np.ndarray:
            return np.repeat(param.astype(np.float32), width, axis=1)[:, :columns]

        offset = codes.astype(np.float32)
        if not self.values.symmetric:
            offset -= spread(params["zero_point"])
        return offset * spread(params["scale"])

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """All bits that a weight of that shape occupies as initializers: codes, scales, zero points, byte padding."""
        rows, columns = shape
        groups = rows * self.groups(columns)
        streams = [(rows * columns, self.values.bits), (groups, self.scale.bitwidth)]
        if not self.values.symmetric:
            streams.append((groups, self.values.bits))
        return sum(-(-count * width // 8) * 8 for count, width in streams)


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight, outside of any graph.

    Attributes:
        format: What the codes mean.
        codes: ``[N, K]``, int8 or uint8, one code per element.
        params: ``scale`` and perhaps ``zero_point``, each ``[N, groups]``, in their stored precision.
    """

    format: Format
    codes: np.ndarray
    params: dict[str, np.ndarray]

    def decode(self) -> np.ndarray:
        """The weight that the codes stand for, float32 ``[N, K]``."""
        return self.format.decode(self.codes, self.params)

    @property
    def stored_bits(self) -> int:
        """All stored bits; equals the bytes of the initializers times 8."""
        return self.format.stored_bits(self.codes.shape)  # type: ignore[arg-type]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        return self.stored_bits / self.codes.size


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant weight as a graph holds it.

    Attributes:
        value: What the consumer reads.
        data: The initializer with the numbers or codes.
        params: The other initializers of the decode node: ``scale``, ``zero_point``.
        format: The format if quantized, None if the weight is float (perhaps stored narrower).
    """

    value: ir.Value
    data: ir.Value
    params: dict[str, ir.Value]
    format: Format | None

    @property
    def name(self) -> str:
        """Name of the weight: of the initializer with the numbers, without what `emit` adds to that of codes."""
        return (self.data.name or "").removesuffix(_CODES)

    @property
    def shape(self) -> tuple[int, ...]:
        """Static shape."""
        return tuple(self.tensor.shape.numpy())

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
        return self.quantized().decode()

    def quantized(self) -> QuantizedTensor:
        """Reads the codes and parameters of a quantized weight ``[N, K]``: copies, so that no file stays mapped.

        Raises:
            ValueError: If the weight is float.
        """
        if self.format is None:
            raise ValueError(f"Expected a quantized weight, found {self.name!r} in {self.dtype.name}.")
        code_type = np.int8 if self.format.values.symmetric else np.uint8
        rows = self.shape[0]
        params = {"scale": np.array(_tensor(self.params["scale"]).numpy()).reshape(rows, -1)}
        if not self.format.values.symmetric:
            zero_point = self.params.get("zero_point")
            params["zero_point"] = (
                _tensor(zero_point).numpy().astype(np.uint8).reshape(rows, -1)
                if zero_point is not None
                else np.zeros_like(params["scale"], dtype=np.uint8)
            )
        codes = self.tensor.numpy().astype(code_type)
        self.release()
        return QuantizedTensor(self.format, codes, params)

    @functools.cached_property
    def tensor(self) -> ir.TensorProtocol:
        """The stored numbers or codes, not read."""
        return _tensor(self.data)


def read_weight(value: ir.Value | None) -> Weight | None:
    """Describes the constant weight that `value` carries, or returns None if it is not one.

    No numbers are read. A quantized weight is recognised if it is rank 2 with groups along its last axis or one group
    per row; any other constant ``DequantizeLinear`` is not a weight in a format of ours.
    """
    if value is None:
        return None
    if value.const_value is not None and value.is_initializer() and not value.is_graph_input():
        return Weight(value, value, {}, None)
    node = value.producer()
    if node is None or node.domain != "" or not node.inputs or not _is_constant(node.inputs[0]):
        return None
    data = node.inputs[0]
    assert data is not None
    if node.op_type == "Cast" and value.dtype == ir.DataType.FLOAT and _tensor(data).dtype.is_floating_point():
        return Weight(value, data, {}, None)
    if node.op_type != "DequantizeLinear":
        return None
    params = dict(zip(("scale", "zero_point"), node.inputs[1:], strict=False))
    params = {k: v for k, v in params.items() if v is not None}
    if not all(_is_constant(v) for v in params.values()):
        return None
    format = _format_of(node, data, params)
    return None if format is None else Weight(value, data, params, format)


def _format_of(node: ir.Node, data: ir.Value, params: dict[str, ir.Value]) -> Format | None:
    tensor, scale = _tensor(data), _tensor(params["scale"])
    if tensor.dtype not in _AFFINE_OF_TYPE or len(tensor.shape) != 2 or scale.dtype not in _SCALE_TYPES.values():
        return None
    values = Affine(*_AFFINE_OF_TYPE[tensor.dtype])
    if values.symmetric and "zero_point" in params and np.any(_tensor(params["zero_point"]).numpy()):
        return None
    rows, columns = tensor.shape.numpy()
    axis, block = (
        node.attributes[k].as_int() if k in node.attributes else d for k, d in (("axis", 1), ("block_size", 0))
    )
    axis %= 2
    if block and axis == 1 and tuple(scale.shape) == (rows, -(-columns // block)):
        return Format(values, block, scale.dtype)
    if not block and axis == 0 and tuple(scale.shape) == (rows,):
        return Format(values, None, scale.dtype)
    return None


def emit(tensor: QuantizedTensor, like: ir.Value, store: Store) -> ir.Node:
    """Builds the decode node of a quantized weight, its initializers written to `store`.

    The initializers are named after `like` and not yet registered: the caller inserts the node into its graph and calls
    ``graph.register_initializer`` on each of the node's inputs.

    Args:
        tensor: ``[N, K]``.
        like: The value that the node's output will replace; gives name, type and shape.
        store: Where codes and parameters are written.
    """
    format, name = tensor.format, like.name or "weight"
    rows = tensor.codes.shape[0]

    def constant(suffix: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        held = store.put(name + suffix, array, dtype)
        value = ir.Value(name=name + suffix, const_value=held, shape=ir.Shape(held.shape.numpy()))
        value.dtype = held.dtype
        return value

    flat = (rows,) if format.group is None else (rows, format.groups(tensor.codes.shape[1]))
    inputs = [
        constant(_CODES, tensor.codes, format.values.dtype),
        constant(".scale", tensor.params["scale"].reshape(flat), format.scale),
    ]
    if not format.values.symmetric:
        inputs.append(constant(".zero_point", tensor.params["zero_point"].reshape(flat), format.values.dtype))
    attributes = {"axis": 0} if format.group is None else {"axis": 1, "block_size": format.group}
    if format.scale != ir.DataType.FLOAT:
        attributes["output_dtype"] = int(ir.DataType.FLOAT)
    node = ir.node("DequantizeLinear", inputs, attributes)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = f"{name}.decoded", ir.DataType.FLOAT, ir.Shape(tensor.codes.shape)
    return node


def require_opset(model: ir.Model, format: Format) -> None:
    """Raises the model's default opset to the first that expresses `format` (25 for 2-bit codes).

    From 23 on, the operators of our canonical form only gained element types, so raising changes no meaning.
    """
    needed = _OPSET_OF_BITS[format.values.bits]
    model.graph.opset_imports[""] = max(model.graph.opset_imports.get("", 0), needed)


def named_formats() -> dict[str, Format]:
    """The formats that exist by name, each to be combined with a group and a scale type (`Format.parse`)."""
    formats = (Format(Affine(bits, symmetric)) for bits, symmetric in _AFFINE_TYPES)
    return {str(f): f for f in formats}


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.is_graph_input()


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None, "read_weight only describes constants"
    return tensor
