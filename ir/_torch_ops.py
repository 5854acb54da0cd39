"""The table of ONNX operators that the torch executor knows, and what every entry needs: types, attributes, conversion.

An entry is a function ``f(call, *inputs) -> tensor | tuple`` registered by `op` for a domain, a name and the opset from
which its meaning holds. Absent optional inputs are None (or simply not passed, at the end). The entries live in the
``_torch_*`` modules beside this one; `load` imports them all. Only `qc.ir.execute` uses this module.

How values are held: a tensor of the element type, except that 2- and 4-bit integers are unpacked into (u)int8, and
float4 and float6 into float32.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qc.ir.errors import InternalError, UnsupportedError

__all__ = ["Call", "Context", "Op", "integer_range", "load", "lookup", "op", "place", "supported", "to_torch"]

_MODULES = (
    "_torch_elementwise", "_torch_reduce", "_torch_shape", "_torch_nn", "_torch_attention", "_torch_quant",
    "_torch_control",
)  # fmt: skip

_D = ir.DataType
_STORAGE = {
    _D.FLOAT: torch.float32, _D.DOUBLE: torch.float64, _D.FLOAT16: torch.float16, _D.BFLOAT16: torch.bfloat16,
    _D.BOOL: torch.bool, _D.INT8: torch.int8, _D.INT16: torch.int16, _D.INT32: torch.int32, _D.INT64: torch.int64,
    _D.UINT8: torch.uint8, _D.UINT16: torch.uint16, _D.UINT32: torch.uint32, _D.UINT64: torch.uint64,
    _D.INT4: torch.int8, _D.UINT4: torch.uint8, _D.INT2: torch.int8, _D.UINT2: torch.uint8,
    _D.FLOAT8E4M3FN: torch.float8_e4m3fn, _D.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _D.FLOAT8E5M2: torch.float8_e5m2, _D.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz, _D.FLOAT8E8M0: torch.float8_e8m0fnu,
    _D.FLOAT4E2M1: torch.float32, _D.FLOAT6E2M3: torch.float32, _D.FLOAT6E3M2: torch.float32,
    _D.COMPLEX64: torch.complex64, _D.COMPLEX128: torch.complex128,
}  # fmt: skip
_COMPUTE = frozenset({_D.FLOAT, _D.DOUBLE, _D.FLOAT16, _D.BFLOAT16})
_RANGES = {
    _D.UINT2: (0, 3), _D.INT2: (-2, 1), _D.UINT4: (0, 15), _D.INT4: (-8, 7),
    _D.UINT8: (0, 255), _D.INT8: (-128, 127), _D.UINT16: (0, 65535), _D.INT16: (-32768, 32767),
    _D.INT32: (-(2**31), 2**31 - 1),
}  # fmt: skip

_HOST_ELEMENTS = 16
"""Integer vectors up to this length stay on the host: shapes, axes and bounds, which torch takes as Python ints."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What holds for a whole run.

    Attributes:
        device: Where tensors live.
        dtype: The type that replaces every floating type that is computed in, or None to keep each.
        straight_through: Whether rounding to integers passes gradients (codes are then floats that hold integers).
    """

    device: torch.device
    dtype: torch.dtype | None
    straight_through: bool

    def torch_dtype(self, dtype: ir.DataType) -> torch.dtype:
        """The type a value of that ONNX type is held in.

        Raises:
            UnsupportedError: If torch has no such type (strings).
        """
        if dtype in _COMPUTE and self.dtype is not None:
            return self.dtype
        if dtype not in _STORAGE:
            raise UnsupportedError(
                f"The torch executor cannot hold values of type {dtype}. Run this model with ONNX Runtime."
            )
        return _STORAGE[dtype]


@dataclasses.dataclass
class Call:
    """One node as an operator function sees it.

    Attributes:
        node: The node.
        opset: Version of the node's domain.
        context: What holds for the whole run.
        attributes: Attributes by name, references to the attributes of a function already resolved.
        body: Runs a subgraph: ``body(attribute name, inputs) -> outputs``. Set for nodes with subgraphs only.
    """

    node: ir.Node
    opset: int
    context: Context
    attributes: Mapping[str, ir.Attr]
    body: Callable[[str, Sequence[torch.Tensor]], list[torch.Tensor]] | None = None

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or `default` when the node has none."""
        attribute = self.attributes.get(name)
        return default if attribute is None or attribute.value is None else attribute.value

    def ints(self, value: torch.Tensor | None, name: str = "", default: list[int] | None = None) -> list[int] | None:
        """Integers that older opsets give as attribute `name` and newer ones as an input."""
        if value is not None:
            return value.reshape(-1).tolist()
        found = self.attr(name)
        return default if found is None else list(found)

    def type_of(self, index: int, value: torch.Tensor) -> ir.DataType:
        """The ONNX element type of input `index`; falls back to the tensor's when the graph does not say."""
        source = self.node.inputs[index] if index < len(self.node.inputs) else None
        if source is not None and source.const_value is not None:
            return source.const_value.dtype
        if source is not None and source.dtype is not None:
            return source.dtype
        return next(d for d, t in _STORAGE.items() if t == value.dtype)

    def outputs(self) -> int:
        """How many outputs the node has, absent trailing ones not counted."""
        return len(self.node.outputs)


Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Op:
    """An entry of the table.

    Attributes:
        function: What computes it.
        since: The first opset of its domain for which it is right.
        host: Positions of inputs that are read as Python integers and hence are not moved to the device.
    """

    function: Function
    since: int
    host: frozenset[int]


_TABLE: dict[tuple[str, str], list[Op]] = {}


def op(*names: str, domain: str = "", since: int = 1, host: Sequence[int] = ()) -> Callable[[Function], Function]:
    """Registers a function for operators of `domain` from opset `since` on.

    Raises:
        InternalError: If one is registered already.
    """

    def register(function: Function) -> Function:
        for name in names:
            entries = _TABLE.setdefault((domain, name), [])
            if any(entry.since == since for entry in entries):
                raise InternalError(f"operator {domain or 'ai.onnx'}::{name} is registered twice for opset {since}")
            entries.append(Op(function, since, frozenset(host)))
            entries.sort(key=lambda entry: entry.since)
        return function

    return register


def load() -> None:
    """Imports every module that registers operators."""
    for name in _MODULES:
        importlib.import_module(f"qc.ir.{name}")


def lookup(domain: str, name: str, opset: int) -> Op | None:
    """The entry for an operator at an opset, or None."""
    entries = _TABLE.get(("" if domain == "ai.onnx" else domain, name), ())
    return next((entry for entry in reversed(entries) if entry.since <= opset), None)


def supported() -> frozenset[tuple[str, str]]:
    """Every (domain, name) in the table."""
    return frozenset(_TABLE)


def integer_range(dtype: ir.DataType) -> tuple[int, int] | None:
    """Smallest and largest value of an integer type, or None for any other type."""
    return _RANGES.get(dtype)


def place(value: torch.Tensor, context: Context) -> torch.Tensor:
    """Moves `value` to the device, unless it is a scalar or a short integer vector, which is read on the host."""
    short = not value.is_floating_point() and value.dim() <= 1 and value.numel() <= _HOST_ELEMENTS
    if short or value.dim() == 0 or value.device == context.device:
        return value
    return value.to(context.device)


def to_torch(array: Any, context: Context) -> torch.Tensor:
    """Converts a numpy array, a torch tensor or an ``onnx_ir`` tensor, without a copy where type and device allow.

    A memory-mapped array stays mapped: its bytes are read when an operator touches them.

    Raises:
        UnsupportedError: If torch has no such element type.
    """
    if isinstance(array, torch.Tensor):
        wanted = context.dtype if context.dtype is not None and array.dtype in _FLOATS else array.dtype
        return array.to(wanted)
    array = np.asarray(array.numpy() if isinstance(array, ir.TensorProtocol) else array)
    if array.dtype.kind in "OUS":
        raise UnsupportedError("The torch executor cannot hold strings. Run this model with ONNX Runtime.")
    dtype = _D.from_numpy(array.dtype)
    target = context.torch_dtype(dtype)
    if not (array.flags.c_contiguous and array.flags.aligned):
        array = array.copy()
    if dtype in _UNPACKED:
        array = array.astype(_UNPACKED[dtype])
    bits = _BIT_VIEWS.get(dtype)
    with warnings.catch_warnings():
        # A mapped file is read-only, and no operator writes into its inputs.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array if bits is None else array.view(bits))
    return (tensor if bits is None else tensor.view(_STORAGE[dtype])).to(target)


_FLOATS = frozenset(_STORAGE[d] for d in _COMPUTE)
_UNPACKED = {
    _D.INT4: np.int8, _D.UINT4: np.uint8, _D.INT2: np.int8, _D.UINT2: np.uint8,
    _D.FLOAT4E2M1: np.float32, _D.FLOAT6E2M3: np.float32, _D.FLOAT6E3M2: np.float32,
}  # fmt: skip
_BIT_VIEWS = {
    _D.BFLOAT16: np.uint16, _D.FLOAT8E4M3FN: np.uint8, _D.FLOAT8E4M3FNUZ: np.uint8, _D.FLOAT8E5M2: np.uint8,
    _D.FLOAT8E5M2FNUZ: np.uint8, _D.FLOAT8E8M0: np.uint8,
}  # fmt: skip
