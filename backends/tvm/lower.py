"""From a lowered model to the program of a library: every node becomes statements, views, or sizes known beforehand."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.cpu_program import CpuProgram
from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.caches import CELLS, Cells
from qc.backends.tvm.logits import behind_head
from qc.backends.tvm.program import C_TYPES, Buffer, Program, Tensor, dense
from qc.backends.tvm.shapes import Dim, Size, c_name, dim, product, spelled
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model
from qc.ir.quant import read_weight
from qc.ir.recurrent import is_stack
from qc.passes.base import site_name
from qc.passes.canonicalize._graph import attribute, stored

__all__ = ["Handler", "Lowering", "is_constant", "lower_to_program", "operator", "supported"]


def is_constant(node: ir.Node) -> bool:
    """Whether a node only says what a constant is; its value is made when it is asked for."""
    if (node.domain == "" and node.op_type == "Constant") or is_stack(node):
        return True
    return all(read_weight(v) is not None for v in node.outputs)


Handler = Callable[["Lowering", ir.Node], None]

_HANDLERS: dict[tuple[str, str], Handler] = {}
_MODULES = (
    "products", "attention", "rows", "elementwise", "movement", "indexed", "images", "resize", "rounding", "recurrent",
)  # fmt: skip
_FEW = 64
"""Integers that are followed as numbers: shapes, axes and positions have no more."""


def operator(*names: str, domain: str = "") -> Callable[[Handler], Handler]:
    """Registers what lowers an operator."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update({(domain, name): handler for name in names})
        return handler

    return register


def supported() -> dict[tuple[str, str], Handler]:
    """What lowers each operator, by domain and name."""
    for module in _MODULES:
        importlib.import_module(f"qc.backends.tvm.ops.{module}")
    return dict(_HANDLERS)


def lower_to_program(model: Model, isa: Isa, *, exact: bool, cells: Cells) -> tuple[Program, Lowering]:
    """Lowers a model.

    Args:
        model: Its operators are standard ones, those of the dialect, and ``GroupQueryAttention``.
        isa: The level of the kernels.
        exact: Whether products with quantized weights keep activations in float.
        cells: What caches of keys and values are stored in.

    Raises:
        UnsupportedError: If an operator, a type or a shape has no kernel; names the node.
    """
    lowering = Lowering(model, CpuProgram(isa), exact, cells)
    lowering.run()
    return lowering.program, lowering


class Lowering:
    """The state of a lowering.

    Attributes:
        program: What was made so far.
        exact: Whether products with quantized weights keep activations in float.
        cells: What caches of keys and values are stored in.
        model: The model.
        done: Nodes that were fused into another.
        quantized: Activations that are quantized already, by where they lie.
        shared: What several nodes use and one of them made, by what it is.
        cached: The caches that attention appends to, by the input of the model that each stands for.
        outputs: Where the outputs of the model lie, in order.
        logits: The values from the product of a head to the logits, if each is computed of the one before it alone.
        repeating: Whether what is lowered now runs in a loop.
    """

    def __init__(self, model: Model, program: Program, exact: bool, cells: Cells = CELLS["float32"]) -> None:
        self.model, self.exact, self.cells = model, exact, cells
        self.program = program
        self.done: set[ir.Node] = set()
        self._tensors: dict[ir.Value, Tensor] = {}
        self.outputs: list[Tensor] = []
        self.cached: dict[ir.Value, Tensor] = {}
        self.shared: dict[object, Tensor] = {}
        self.quantized: dict[object, tuple[Tensor, Tensor, Tensor]] = {}
        self.repeating = False
        self._outputs: dict[ir.Value, int] = {}
        for number, value in enumerate(model.graph.outputs):
            self._outputs.setdefault(value, number)
        self.logits = behind_head(model.graph)
        self._arrays = self._outputs | {v: self._outputs[self.logits[-1]] for v in self.logits if program.overwrites}
        self._inputs()

    @property
    def isa(self) -> Isa:
        """The level."""
        assert isinstance(self.program, CpuProgram)
        return self.program.isa

    def handlers(self) -> Mapping[tuple[str, str], Handler]:
        """What lowers each operator, by domain and name."""
        return supported()

    def run(self) -> None:
        """Lowers every node in order."""
        handlers = self.handlers()
        self._check(handlers)
        for node in self.model.graph:
            if node in self.done or is_constant(node):
                continue
            self.program.label = site_name(node)
            handlers[node.domain, node.op_type](self, node)
        if self.cells.narrow and not self.cached:
            raise UnsupportedError(
                f"Expected a decoder whose cache the library keeps, to store it as {self.cells.name}; found none. "
                "Leave out kv=."
            )
        self._finish()

    def _check(self, handlers: Mapping[tuple[str, str], Handler]) -> None:
        missing: dict[str, str] = {}
        for node in self.model.graph:
            if (node.domain, node.op_type) not in handlers and not is_constant(node):
                name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                missing.setdefault(name, site_name(node))
        if missing:
            listed = ", ".join(f"{op} (at {site})" for op, site in sorted(missing.items()))
            raise UnsupportedError(
                f"The TVM target has no kernel for {listed}. Compile for ort-cpu, which has all standard operators."
            )

    def _inputs(self) -> None:
        for value in self.model.graph.inputs:
            for axis in value.shape or ():
                name = None if isinstance(axis, int) else axis.value
                if name is not None and str(name) not in self.program.dims:
                    self.program.dims[str(name)] = c_name(str(name), self.program.dims.values())
        for number, value in enumerate(self.model.graph.inputs):
            unread = not value.uses() and value not in self._outputs
            if value.shape is None or (value.dtype not in C_TYPES and not unread):
                kind = "an unknown shape" if value.shape is None else value.dtype.name
                raise UnsupportedError(
                    f"Expected inputs of {', '.join(t.name for t in C_TYPES)} and known rank, found {kind} at "
                    f"{value.name!r}. Compile for ort-cpu, or export the model with such inputs."
                )
            shape = tuple(self.dimension(d, value) for d in value.shape)
            size = dim(0) if unread else product(shape) * self.program.bytes_of(value.dtype)
            buffer = Buffer("input", number, size)
            self._tensors[value] = Tensor(buffer, value.dtype, shape, dense(shape))

    def dimension(self, axis: int | ir.SymbolicDim, value: ir.Value) -> Dim:
        """The size of an axis of an input."""
        if isinstance(axis, int):
            return dim(axis)
        if axis.value is None:
            raise UnsupportedError(f"Expected named dimensions, found one without a name at input {value.name!r}.")
        return dim(self.program.dims[str(axis.value)])

    def refuse(self, node: ir.Node, reason: str) -> UnsupportedError:
        """An error that names the node."""
        return UnsupportedError(
            f"The TVM target has no kernel for {node.op_type} at {site_name(node)}: {reason}. Compile for ort-cpu."
        )

    def attribute(self, node: ir.Node, name: str, default: object = None) -> object:
        """The value of an attribute."""
        return attribute(node, name, default)

    def input(self, node: ir.Node, slot: int) -> Tensor | None:
        """The tensor of an input, None if the node does not have it."""
        value = node.inputs[slot] if slot < len(node.inputs) else None
        return None if value is None else self.get(value)

    def get(self, value: ir.Value) -> Tensor:
        """The tensor of a value; a constant becomes one when it is first asked for."""
        if value not in self._tensors:
            self._tensors[value] = self._constant(value)
        return self._tensors[value]

    def _constant(self, value: ir.Value) -> Tensor:
        weight, tensor = read_weight(value), stored(value)
        if weight is None and tensor is None:
            producer = value.producer()
            assert producer is not None
            raise self.refuse(producer, f"its output {value.name!r} is read")
        if weight is None or (weight.format is None and not weight.dtype.is_floating_point()):
            held = tensor if weight is None else weight.tensor
            assert held is not None
            return self._numbers(held, value)
        shape = weight.shape

        def read() -> np.ndarray:
            array = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
            weight.release()
            return array

        return self.program.constant((weight.value, "f32"), read, 4 * math.prod(shape), shape, ir.DataType.FLOAT)

    def _numbers(self, tensor: ir.TensorProtocol, value: ir.Value) -> Tensor:
        """A constant of integers, of truth values, or of a node."""
        dtype, array = tensor.dtype, tensor.numpy()
        if dtype.is_floating_point():
            dtype, array = ir.DataType.FLOAT, array.astype(np.float32)
        if dtype not in C_TYPES:
            raise UnsupportedError(
                f"Expected constants of {', '.join(t.name for t in C_TYPES)}, found {dtype.name} {value.name!r}. "
                "Compile for ort-cpu."
            )
        if array.ndim <= 1 and array.size <= _FEW and dtype in (ir.DataType.INT64, ir.DataType.INT32):
            return self.numbers([int(x) for x in array.ravel()], dtype, scalar=array.ndim == 0)
        return self.program.array(array, dtype)

    def numbers(
        self, values: Sequence[Size], dtype: ir.DataType = ir.DataType.INT64, *, scalar: bool = False
    ) -> Tensor:
        """Integers that the dimensions determine."""
        shape = () if scalar else (dim(len(values)),)
        return Tensor(None, dtype, shape, dense(shape), values=tuple(map(dim, values)))

    def stored(self, tensor: Tensor) -> Tensor:
        """The tensor in a buffer: numbers known beforehand are written into one."""
        if tensor.buffer is not None:
            return tensor
        assert tensor.values is not None
        if all(v.constant is not None for v in tensor.values):
            numbers = np.array([v.constant for v in tensor.values], tensor.dtype.numpy())
            return self.program.array(numbers.reshape([s.constant for s in tensor.shape]), tensor.dtype)
        made = self.program.tensor(tensor.shape, tensor.dtype)
        self.program.write(made, tensor.values)
        return made

    def set(self, value: ir.Value, tensor: Tensor) -> None:
        """Says where the value of an output of a node lies."""
        shape = self._sizes(value, tensor.shape)
        strides = dense(shape) if tensor.contiguous else tensor.strides
        self._tensors[value] = dataclasses.replace(tensor, shape=shape, strides=strides)

    def spelled(self, value: ir.Value, axis: int) -> Dim | None:
        """The size of an axis as the graph spells it, None if it does not in terms of the sizes of inputs."""
        shape = value.shape
        if shape is None or axis >= len(shape):
            return None
        size = shape[axis]
        if isinstance(size, int):
            return dim(size)
        return None if size.value is None else spelled(str(size.value), self.program.dims)

    def _sizes(self, value: ir.Value, shape: Sequence[Dim]) -> tuple[Dim, ...]:
        """Sizes that it takes a function to compute, as the graph spells them: else they grow from layer to layer."""
        found = []
        for axis, size in enumerate(shape):
            short = self.spelled(value, axis) if size.calls and len(shape) == len(value.shape or ()) else None
            if short is not None:
                self.program.require_equal(size, short)
            found.append(size if short is None else short)
        return tuple(found)

    def result(self, value: ir.Value, shape: Sequence[Size], dtype: ir.DataType = ir.DataType.FLOAT) -> Tensor:
        """A tensor for the output of a node: the caller's array if it is, or becomes, an output of the model."""
        sizes = self._sizes(value, tuple(map(dim, shape)))
        self.program.require_sizes(sizes)
        if value in self._arrays and dtype in C_TYPES:
            buffer = Buffer("output", self._arrays[value], product(sizes) * self.program.bytes_of(dtype))
            tensor = Tensor(buffer, dtype, sizes, dense(sizes))
        else:
            tensor = self.program.tensor(sizes, dtype)
        self.set(value, tensor)
        return tensor

    @contextlib.contextmanager
    def repeated(self, loop: str) -> Iterator[None]:
        """What is lowered in here runs in a C loop; what is quantized in it has other numbers in each turn."""
        assert isinstance(self.program, CpuProgram)
        before, self.repeating = dict(self.quantized), True
        with self.program.repeated(loop):
            yield
        self.quantized, self.repeating = before, False

    def rows(self, tensor: Tensor) -> tuple[Tensor, Dim, Dim, Dim]:
        """A tensor as rows whose elements are neighbours: with the number of rows, their length and their distance."""
        shape = tensor.shape or (dim(1),)
        strides = tensor.strides or (dim(1),)
        steady = strides[-1] == dim(1) or shape[-1] == dim(1)
        kept = [(n, s) for n, s in zip(shape[:-1], strides[:-1], strict=True) if n != dim(1)]
        for (_, outer), (n, inner) in itertools.pairwise(kept):
            steady = steady and outer == inner * n
        if not steady:
            tensor = self.contiguous(tensor)
            return tensor, product(shape[:-1]), shape[-1], shape[-1]
        return tensor, product(shape[:-1]), shape[-1], kept[-1][1] if kept else shape[-1]

    def contiguous(self, tensor: Tensor) -> Tensor:
        """The tensor without gaps, copied if it has any."""
        from qc.backends.tvm.ops.loops import copy

        tensor = self.stored(tensor)
        return tensor if tensor.contiguous else copy(self, tensor, self.program.tensor(tensor.shape, tensor.dtype))

    def sole_user(self, value: ir.Value) -> ir.Node | None:
        """The one node that reads a value, if it is one and the value is no output."""
        uses = value.uses()
        return uses[0].node if len(uses) == 1 and value not in self._outputs else None

    def known(self, value: ir.Value | None) -> Tensor | None:
        """The tensor of a value if it is computed already."""
        return None if value is None else self._tensors.get(value)

    def _finish(self) -> None:
        """Copies outputs that are views, inputs, constants or others once more into the caller's arrays."""
        from qc.backends.tvm.ops.loops import copy

        for number, value in enumerate(self.model.graph.outputs):
            self.program.label = f"output {value.name}"
            tensor = self.get(value)
            if value.dtype is not None and value.dtype not in C_TYPES:
                raise UnsupportedError(
                    f"Expected outputs of {', '.join(t.name for t in C_TYPES)}, found {value.dtype.name} at "
                    f"{value.name!r}. Compile for ort-cpu."
                )
            self.outputs.append(tensor)
            if tensor.buffer is not None and tensor.buffer.kind == "cache":
                continue
            if tensor.buffer is None or (tensor.buffer.kind, tensor.buffer.index) != ("output", number):
                tensor = self.stored(tensor)
                buffer = Buffer("output", number, tensor.elements * self.program.bytes_of(tensor.dtype))
                copy(self, tensor, Tensor(buffer, tensor.dtype, tensor.shape, dense(tensor.shape)))
