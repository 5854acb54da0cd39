"""A model as launches of GPU kernels, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.gpu import caches, images, lookups, order
from qc.backends.tvm.gpu import kernels as gpu
from qc.backends.tvm.kernels import rows
from qc.backends.tvm.kernels.attention import Heads
from qc.backends.tvm.kernels.bytes import row_ranges
from qc.backends.tvm.kernels.caches import Cells
from qc.backends.tvm.program import Buffer, Program, Statement, Tensor, dense
from qc.backends.tvm.shapes import Dim, Size, dim, product
from qc.backends.tvm.windows import Window
from qc.ir.errors import UnsupportedError

__all__ = ["GpuProgram", "Launch"]

_WORD = 4

_KERNELS = {
    row_ranges: gpu.row_ranges,
    rows.activation: gpu.activation,
    rows.gated: gpu.gated,
    rows.normalize: gpu.normalize,
    rows.softmax: gpu.softmax,
}
"""What computes here what a kernel for processors computes there, from the same parameters."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A call of a kernel.

    Attributes:
        kernel: Its name.
        buffers: What it reads and writes, in the order of its generator.
        integers: Its integers, in that order.
        when: A C condition under which it is called; always if empty.
    """

    kernel: str
    buffers: tuple[Buffer, ...]
    integers: tuple[Dim, ...]
    when: str


class GpuProgram(Program):
    """A program whose statements are launches.

    Every element takes 4 bytes on the device: integers and truth values are ``int32``, which every language has. The
    host converts what goes in and out; integers beyond 32 bits become the nearest.

    Attributes:
        launches: In order, one per statement.
        status: Where kernels note an index outside of its table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.status = Tensor(Buffer("status", 0, dim(_WORD)), ir.DataType.INT32, (dim(1),), (dim(1),))

    def bytes_of(self, dtype: ir.DataType) -> int:
        """Four, whatever it is."""
        return _WORD

    def weight_index(self, offset: int) -> int:
        """Weights are buffers of their own, by number."""
        return len(self.blobs) - 1

    def array(self, array: np.ndarray, dtype: ir.DataType | None = None) -> Tensor:
        """A small constant that is known now."""
        kind = dtype or ir.DataType.from_numpy(array.dtype)
        if array.dtype.kind in "biu":
            ends = np.iinfo(np.int32)
            array = np.clip(array.astype(np.int64), ends.min, ends.max).astype(np.int32)
        return super().array(array, kind)

    def kernel(self, stem: str, generator: Any, *arguments: Any, pointers: int, integers: int) -> str:
        """Registers the kernel that stands here for one for processors."""
        if generator not in _KERNELS:
            raise self._missing()
        return super().kernel(stem, _KERNELS[generator], *arguments, pointers=pointers, integers=integers)

    def call(
        self, kernel: str, pointers: Sequence[Tensor | str], integers: Sequence[Size], units: Size, *,
        writes: Sequence[Tensor], grain: int = 1,
    ) -> None:  # fmt: skip
        """Adds a call of a kernel on `units` units."""
        self._launch(kernel, [p for p in pointers if isinstance(p, Tensor)], [*integers, units], writes)

    def launch(
        self, stem: str, generator: Any, arguments: Sequence[Any], tensors: Sequence[Tensor], integers: Sequence[Size],
        writes: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Adds a call of a kernel of `qc.backends.tvm.gpu.kernels`."""
        name = super().kernel(stem, generator, *arguments, pointers=len(tensors), integers=len(integers))
        self._launch(name, tensors, integers, writes)

    def multiply(
        self, stem: str, generator: Any, arguments: Sequence[Any], tensors: Sequence[Tensor], integers: Sequence[Size],
        writes: Sequence[Tensor], when: str = "",
    ) -> None:  # fmt: skip
        """Adds a call of a product of `qc.backends.tvm.gpu.products`, whose operands lie at the start of a buffer."""
        name = super().kernel(stem, generator, *arguments, pointers=len(tensors), integers=len(integers))
        assert all(t.offset.constant == 0 and t.contiguous for t in tensors), name
        self.streamed += [t.buffer for t in tensors if t.buffer is not None and t.buffer.kind == "weight"]
        self._add(name, tensors, integers, writes, when)

    def map(
        self, expression: str, inputs: Sequence[Tensor], strides: Sequence[Sequence[Dim]], y: Tensor,
        shape: Sequence[Dim],
    ) -> None:  # fmt: skip
        """``y = expression(a, b, ...)`` on `shape`: inputs with these strides, y without gaps."""
        self._map(expression, inputs, strides, y.view(shape, dense(shape)))

    def scatter(self, x: Tensor, strides: Sequence[Dim], y: Tensor) -> None:
        """Copies x, with these strides, to y, which has gaps."""
        self._map("{a}", [x], [strides], y)

    def count(self, y: Tensor, first: Dim, every: Dim) -> None:
        """``y[i] = first + i * every``."""
        self._map("{p} + {i} * {q}", [], [], y, first, every)

    def write(self, y: Tensor, values: Sequence[Dim]) -> None:
        """Writes numbers that the dimensions determine."""
        for i, value in enumerate(values):
            self._map("{p}", [], [], y.view((1,), (1,), i), value)

    def reduce(self, kind: str, x: Tensor, kept: int, y: Tensor) -> None:
        """One number of the axes behind the first `kept`."""
        arguments = (kind, _kind(x), kept, len(x.shape))
        self.launch("reduce", gpu.reduce_axes, arguments, [x, y], [*x.shape, *x.strides, y.elements], [y])

    def gather(self, table: Tensor, indices: Tensor, y: Tensor, outer: Dim, n: Dim, inner: Dim) -> None:
        """``y[o, j, i] = table[o, indices[j], i]``."""
        tensors = [table, indices, y, self.status]
        self.launch("gather", lookups.gather, (_kind(table),), tensors, [outer, n, indices.elements, inner], [y])

    def rotate(
        self, x: Tensor, y: Tensor, tables: list[Tensor], positions: Tensor, width: int, rotated: int,
        interleaved: bool, *, before: Tensor | None,
    ) -> None:  # fmt: skip
        """Rotates heads into `y`; into a cache behind what it holds if `before` tells how much that is."""
        batch, heads, s, _ = x.shape
        rows = tables[0].shape[0] if rotated else dim("qc_room")
        tables = tables if rotated else [x, x]
        strides = [t.strides[i] for t in (x, y) for i in range(3)]
        tensors = [x, y, *tables, positions, self.status]
        integers = [heads, s, positions.strides[0], *strides, rows, batch * s]
        self.launch("rotate", gpu.rotate, (width, rotated, interleaved, before is not None), tensors, integers, [y])

    def append(self, x: Tensor, y: Tensor, positions: Tensor, width: int, cells: Cells) -> None:
        """Stores heads in a cache of codes, at their positions."""
        batch, heads, s, _ = x.shape
        strides = [t.strides[i] for t in (x, y) for i in range(3)]
        integers = [heads, s, positions.strides[0], *strides, dim("qc_room"), batch * s]
        self.launch("append", caches.append, (width, cells), [x, y, positions, self.status], integers, [y])

    def attend(
        self, shape: Heads, q: Tensor, k: Tensor, v: Tensor, y4: Tensor, y: Tensor, before: Tensor | None, keys: Dim,
        bias: tuple[Tensor, list[Dim]] | None, kv: int,
    ) -> None:  # fmt: skip
        """Attention of all heads."""
        past = before if before is not None else self.array(np.zeros(1, np.int32))
        extra, more = ([], []) if bias is None else ([bias[0]], bias[1])
        integers = [kv, q.shape[2], keys, *(t.strides[i] for t in (q, k, v, y4) for i in range(3)), *more, q.shape[0]]
        self.launch("attend", gpu.attend, (shape,), [q, k, v, y4, past, *extra], integers, [y])

    def gather_nd(self, x: Tensor, indices: Tensor, y: Tensor, sizes: Sequence[Dim], width: Dim) -> None:
        """Slices of `width` elements, by tuples of indices into axes of these sizes."""
        integers = [*sizes, product(indices.shape[:-1]), width]
        self.launch("gather_nd", lookups.gather_nd, (_kind(x), len(sizes)), [x, indices, y, self.status], integers, [y])

    def scatter_nd(
        self, step: str, x: Tensor, indices: Tensor, y: Tensor, sizes: Sequence[Dim], width: Dim
    ) -> None:  # fmt: skip
        """Brings slices of `width` elements to where tuples of indices say, in order."""
        arguments, tensors = (_kind(x), step, len(sizes)), [x, indices, y, self.status]
        integers = [*sizes, product(indices.shape[:-1]), width]
        self.launch("scatter_nd", lookups.scatter_nd, arguments, tensors, integers, [y])

    def gather_elements(self, x: Tensor, indices: Tensor, y: Tensor, axis: int) -> None:
        """One element along an axis for each index."""
        arguments, tensors = (_kind(x), len(x.shape), axis), [x, indices, y, self.status]
        integers = [x.shape[axis], *indices.shape, *x.strides]
        self.launch("gather_elements", lookups.gather_elements, arguments, tensors, integers, [y])

    def scatter_elements(self, step: str, x: Tensor, indices: Tensor, y: Tensor, axis: int) -> None:
        """Brings one element along an axis for each index, in order."""
        arguments, tensors = (_kind(x), step, len(x.shape), axis), [x, indices, y, self.status]
        integers = [y.shape[axis], *indices.shape, *y.strides]
        self.launch("scatter_elements", lookups.scatter_elements, arguments, tensors, integers, [y])

    def top_k(self, x: Tensor, y: Tensor, places: Tensor, count: Dim, *, largest: bool) -> None:
        """The first `count` of each row in order, with their places, the first of equals first."""
        integers = [x.shape[-1], count, product(x.shape[:-1])]
        self.launch("top_k", order.top_k, (_kind(x), largest), [x, y, places], integers, [y, places])

    def cum_sum(self, x: Tensor, y: Tensor, axis: int) -> None:
        """Running sums of an axis."""
        integers = [product(x.shape[:axis]), x.shape[axis], product(x.shape[axis + 1 :])]
        self.launch("cum_sum", order.cum_sum, (_kind(x),), [x, y], integers, [y])

    def pool(self, kind: str, window: Window, x: Tensor, y: Tensor) -> None:
        """One number of each window: the ``largest``, or the mean of what is ``inside`` or ``padded`` with zeros."""
        integers = [x.shape[0] * x.shape[1], *x.shape[2:], *y.shape[2:]]
        self.launch("pool", images.pool, (kind, window), [x, y], integers, [y])

    def resize(self, x: Tensor, y: Tensor, axis: int, scale: float | None, place: str, value: str) -> None:
        """One axis in another size, by a scale or that of the sizes: `value` of the elements at `place`."""
        integers = [product(x.shape[:axis]), x.shape[axis], y.shape[axis], product(x.shape[axis + 1 :])]
        self.launch("resize", images.resize, (scale, place, value), [x, y], integers, [y])

    def grid_sample(self, x: Tensor, grid: Tensor, y: Tensor, *, nearest: bool, padding: str, aligned: bool) -> None:
        """Images at the places of a grid."""
        arguments, integers = (nearest, padding, aligned), [*x.shape, product(y.shape[2:])]
        self.launch("grid_sample", images.grid_sample, arguments, [x, grid, y], integers, [y])

    def use(self, name: str, kind: str = "") -> None:
        """There are no C functions here."""
        raise self._missing()

    def add(self, text: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """There is no C here."""
        raise self._missing()

    def _missing(self) -> UnsupportedError:
        return UnsupportedError(f"The GPU targets have no kernel for {self.label}. Compile for tvm-cpu or ort-cpu.")

    def _map(
        self, expression: str, inputs: Sequence[Tensor], strides: Sequence[Sequence[Dim]], y: Tensor,
        p: Size = 0, q: Size = 0,
    ) -> None:  # fmt: skip
        y = y if y.shape else y.view((1,), (1,))
        kinds = tuple(_kind(x) for x in inputs)
        steps = [s for held in strides for s in held]
        integers = [*y.shape, *steps, *y.strides, p, q]
        self.launch("map", gpu.map_elements, (expression, kinds, _kind(y), len(y.shape)), [*inputs, y], integers, [y])

    def _launch(self, name: str, tensors: Sequence[Tensor], integers: Sequence[Size], writes: Sequence[Tensor]) -> None:
        self._add(name, tensors, [*integers, *(t.offset for t in tensors)], writes, "")

    def _add(
        self, name: str, tensors: Sequence[Tensor], integers: Sequence[Size], writes: Sequence[Tensor], when: str
    ) -> None:
        buffers = tuple(t.buffer for t in tensors if t.buffer is not None)
        launch = Launch(name, buffers, tuple(map(dim, integers)), when)
        places = ", ".join(b.c for b in buffers)
        numbers = ", ".join(f"(int32_t)({i.c})" for i in launch.integers) or "0"
        text = f"TRY(launch(q, K_{name}, BUFFERS({places}), INTS({numbers})));"
        text = f"if ({when}) {text}" if when else text
        written = tuple(t.buffer for t in writes if t.buffer is not None)
        self.launches.append(launch)
        self.statements.append(Statement(text, buffers, written, self.label))

    def table(self) -> list[Mapping[str, Any]]:
        """The launches as data."""
        return [
            {
                "node": statement.label,
                "kernel": launch.kernel,
                "buffers": [f"{b.kind}:{b.index}" for b in launch.buffers],
                "integers": [i.c for i in launch.integers],
                **({"when": launch.when} if launch.when else {}),
            }
            for launch, statement in zip(self.launches, self.statements, strict=True)
        ]


def _kind(tensor: Tensor) -> str:
    return "float32" if tensor.dtype == ir.DataType.FLOAT else "int32"
