"""A model as a C library sees it: buffers, and statements that read and write them, in order."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.shapes import Dim, Size, dim, product
from qc.ir.errors import UnsupportedError

__all__ = ["C_TYPES", "Blob", "Buffer", "Program", "Statement", "Tensor", "buffers_of", "dense"]

C_TYPES = {
    ir.DataType.FLOAT: ("float", 4),
    ir.DataType.INT64: ("int64_t", 8),
    ir.DataType.INT32: ("int32_t", 4),
    ir.DataType.BOOL: ("uint8_t", 1),
    ir.DataType.UINT8: ("uint8_t", 1),
    ir.DataType.INT8: ("int8_t", 1),
}
"""Element types that values of a library may have."""

_LINE = 64


@dataclasses.dataclass(eq=False)
class Buffer:
    """Where values lie.

    Attributes:
        kind: ``arena`` (planned memory), ``input``, ``output``, ``cache``, ``weight``, or ``status`` (of a GPU).
        index: Number within its kind; the offset in bytes of a weight that a processor reads.
        bytes: Its size.
    """

    kind: str
    index: int
    bytes: Dim

    @property
    def c(self) -> str:
        """Its address in C."""
        return {
            "arena": "A",
            "input": "I",
            "output": "O",
            "cache": "K",
            "weight": "W",
            "status": "S",
        }[self.kind] + f"({self.index})"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a buffer.

    Attributes:
        buffer: Where it lies; None if only its numbers are known (`values`).
        dtype: Element type.
        shape: Sizes of its axes.
        strides: Elements from one index of an axis to the next; 0 where it repeats.
        offset: Elements in front of the first.
        values: Its numbers, if it is an integer or a short list of them that the dimensions determine.
    """

    buffer: Buffer | None
    dtype: ir.DataType
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = dim(0)  # noqa: RUF009 - immutable
    values: tuple[Dim, ...] | None = None

    @property
    def c(self) -> str:
        """The address of its first element in C."""
        assert self.buffer is not None
        kind = C_TYPES[self.dtype][0]
        start = "" if self.offset.constant == 0 else f" + {self.offset.c}"
        return f"({kind} *){self.buffer.c}{start}"

    @property
    def elements(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether its elements follow each other."""
        return self.strides == dense(self.shape)

    def view(self, shape: Sequence[Size], strides: Sequence[Size], offset: Size = 0) -> Tensor:
        """Another view of the same buffer, `offset` elements further."""
        return dataclasses.replace(
            self,
            shape=tuple(map(dim, shape)),
            strides=tuple(map(dim, strides)),
            offset=self.offset + offset,
            values=None,
        )

    def along(self, axes: Sequence[int], offset: Size = 0) -> Tensor:
        """A view of these axes, in this order, `offset` elements further."""
        return self.view([self.shape[i] for i in axes], [self.strides[i] for i in axes], offset)

    def with_last(self, axis: int) -> Tensor:
        """A view in which an axis comes behind the others."""
        return self.along([*(i for i in range(len(self.shape)) if i != axis), axis])

    def with_last_at(self, axis: int) -> Tensor:
        """A view in which the last axis comes in this place: the inverse of `with_last`."""
        axes = list(range(len(self.shape) - 1))
        return self.along([*axes[:axis], len(axes), *axes[axis:]])


def dense(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Strides of a tensor without gaps; those of axes of size 1 are what they would be otherwise."""
    found, step = [], dim(1)
    for size in reversed(shape):
        found.append(step)
        step = step * size
    return tuple(reversed(found))


@dataclasses.dataclass(frozen=True)
class Statement:
    """A few lines of C.

    Attributes:
        text: The C code.
        reads: Buffers that it reads.
        writes: Buffers that it writes.
        label: What it stands for, as a comment.
    """

    text: str
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    label: str


@dataclasses.dataclass(frozen=True)
class Blob:
    """A constant in the weights file.

    Attributes:
        offset: Bytes in front of it.
        bytes: Its size.
        make: Yields its bytes.
    """

    offset: int
    bytes: int
    make: Callable[[], np.ndarray]


class Program:
    """The statements of a library under construction, with everything that they need.

    What a statement says depends on who computes: see `qc.backends.tvm.cpu_program`, `qc.backends.tvm.gpu.program`.

    Attributes:
        statements: In order.
        arena: Planned buffers.
        caches: Buffers of the cache, kept between runs.
        blobs: The content of the weights file.
        kernels: By name: generator, arguments, number of pointers, number of integers.
        functions: C functions by name, for what no kernel does.
        streamed: Constants that kernels read whole.
        dims: Names in C of the symbolic dimensions, by their names in the model.
        conditions: What must hold of the dimensions of a run, in C.
        overwrites: Whether a statement may write what it reads, element by element.
    """

    overwrites = False

    def __init__(self) -> None:
        self.statements: list[Statement] = []
        self.arena: list[Buffer] = []
        self.caches: list[Buffer] = []
        self.blobs: list[Blob] = []
        self.kernels: dict[str, tuple[Any, tuple[Any, ...], int, int]] = {}
        self.functions: dict[str, str] = {}
        self.dims: dict[str, str] = {}
        self.conditions: dict[str, None] = {}
        self._blobs: dict[object, Tensor] = {}
        self._end = 0
        self.streamed: list[Buffer] = []
        self.label = ""

    def bytes_of(self, dtype: ir.DataType) -> int:
        """Bytes of an element in the library's memory."""
        return C_TYPES[dtype][1]

    def tensor(self, shape: Sequence[Size], dtype: ir.DataType = ir.DataType.FLOAT) -> Tensor:
        """A new planned tensor."""
        if dtype not in C_TYPES:
            raise UnsupportedError(
                f"Expected values of {', '.join(t.name for t in C_TYPES)}, found {dtype.name} at {self.label}. "
                "The TVM target computes in float32."
            )
        sizes = tuple(map(dim, shape))
        self.require_sizes(sizes)
        buffer = Buffer("arena", len(self.arena), product(sizes) * self.bytes_of(dtype))
        self.arena.append(buffer)
        return Tensor(buffer, dtype, sizes, dense(sizes))

    def cache(self, shape: Sequence[Size], dtype: ir.DataType) -> Tensor:
        """A new tensor that keeps its content between runs."""
        sizes = tuple(map(dim, shape))
        self.caches.append(Buffer("cache", len(self.caches), product(sizes) * self.bytes_of(dtype)))
        return Tensor(self.caches[-1], dtype, sizes, dense(sizes))

    def constant(
        self, key: object, make: Callable[[], np.ndarray], size: int, shape: Sequence[int], dtype: ir.DataType
    ) -> Tensor:
        """A constant of `size` bytes; the same `key` is stored once. `make` is called when the file is written."""
        if key not in self._blobs:
            offset = -(-self._end // _LINE) * _LINE
            self.blobs.append(Blob(offset, size, make))
            self._end = offset + size
            sizes = tuple(map(dim, shape))
            self._blobs[key] = Tensor(
                Buffer("weight", self.weight_index(offset), dim(size)), dtype, sizes, dense(sizes)
            )
        return self._blobs[key]

    def weight_index(self, offset: int) -> int:
        """How the last constant, at this offset of the file, is called in the code."""
        return offset

    def array(self, array: np.ndarray, dtype: ir.DataType | None = None) -> Tensor:
        """A small constant that is known now."""
        array = np.ascontiguousarray(array)
        kind = dtype or ir.DataType.from_numpy(array.dtype)
        key = (array.tobytes(), array.shape, kind)
        return self.constant(key, lambda: array, array.nbytes, array.shape, kind)

    @property
    def weight_bytes(self) -> int:
        """Size of all constants with what aligns them."""
        return self._end

    def require_equal(self, a: Size, b: Size) -> None:
        """Two sizes must be the same; where only a run knows them, it is refused if they are not."""
        self._require(_is_zero(dim(a) - b), f"{dim(a).c} == {dim(b).c}")

    def require_spread(self, size: Size, to: Size) -> None:
        """An axis must have one element, or as many as the one that it is repeated along."""
        size, to = dim(size), dim(to)
        self._require(_is_zero((size - to) * (size - 1)), f"({size.c} == 1 || {size.c} == {to.c})")

    def require_within(self, size: Size, of: Size) -> None:
        """A size must not exceed another."""
        left = dim(of) - size
        holds = None if left.constant is None else left.constant >= 0
        self._require(holds, f"{dim(size).c} <= {dim(of).c}")

    def require_sizes(self, sizes: Sequence[Dim]) -> None:
        """No size may be negative."""
        for size in sizes:
            if "-" in size.c:
                self._require(None if size.constant is None else False, f"{size.c} >= 0")

    def _require(self, holds: bool | None, condition: str) -> None:
        if holds is None:
            self.conditions[condition] = None
        elif not holds:
            raise UnsupportedError(f"Expected sizes that fit together at {self.label}, found that not {condition}.")

    def kernel(self, stem: str, generator: Any, *arguments: Any, pointers: int, integers: int) -> str:
        """Registers a kernel and returns its name, the same for the same arguments."""
        digest = hashlib.sha256(repr((generator.__qualname__, arguments)).encode()).hexdigest()[:8]
        name = f"qck_{stem}_{digest}"
        self.kernels[name] = (generator, arguments, pointers, integers)
        return name

    def add(self, text: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Adds a statement."""
        self.statements.append(Statement(text, buffers_of(reads), buffers_of(writes), self.label))


def _is_zero(size: Dim) -> bool | None:
    """None if only a run knows."""
    return None if size.constant is None else size.constant == 0


def buffers_of(tensors: Sequence[Tensor]) -> tuple[Buffer, ...]:
    """Where tensors lie."""
    return tuple(t.buffer for t in tensors if t.buffer is not None)
