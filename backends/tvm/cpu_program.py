"""A model as C statements and calls of kernels for processors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.tvm.c_loops import (
    GRID_PADDING,
    RESIZE_PLACES,
    RESIZE_VALUES,
    copy_function,
    indexed_function,
    loop_function,
    reduce_function,
)
from qc.backends.tvm.host import template
from qc.backends.tvm.isa import Isa
from qc.backends.tvm.kernels.attention import Heads, attend_few, attend_many, rotate
from qc.backends.tvm.kernels.caches import Cells, append
from qc.backends.tvm.program import C_TYPES, Program, Statement, Tensor, buffers_of
from qc.backends.tvm.shapes import Dim, Size, dim, listed, product
from qc.backends.tvm.windows import Window

__all__ = ["CpuProgram"]

_FEW = 3
"""Up to so many queries stream through the keys; more are worth transposing them."""


class CpuProgram(Program):
    """A program whose statements are C.

    Attributes:
        isa: The level that kernels are made for.
    """

    overwrites = True

    def __init__(self, isa: Isa) -> None:
        super().__init__()
        self.isa = isa

    def use(self, name: str, kind: str = "") -> None:
        """Takes a C function of ``host/`` in, its ``@`` replaced by `kind`."""
        self.functions[name + kind] = template(f"{name}.c").replace("@", kind).rstrip()

    def call(
        self,
        kernel: str,
        pointers: Sequence[Tensor | str],
        integers: Sequence[Size],
        units: Size,
        *,
        writes: Sequence[Tensor],
        grain: int = 1,
    ) -> None:
        """Adds a call of a kernel on `units` units, of which a thread gets multiples of `grain`."""
        _, _, count, sizes = self.kernels[kernel]
        assert (len(pointers), len(integers)) == (count, sizes), (kernel, len(pointers), len(integers), count, sizes)
        addresses = ", ".join(p if isinstance(p, str) else p.c for p in pointers)
        numbers = ", ".join(dim(i).c for i in integers) or "0"
        text = f"CALL({kernel}, {count}, {sizes}, PTRS({addresses}), INTS({numbers}), {dim(units).c}, {grain});"
        held = [p for p in pointers if isinstance(p, Tensor)]
        self.streamed += [b for b in buffers_of(held) if b.kind == "weight"]
        self.add(text, held, writes)

    @contextlib.contextmanager
    def repeated(self, loop: str) -> Iterator[None]:
        """What is added in here runs in a C loop: one statement, so all that it needs lives until the last turn."""
        outer, self.statements = self.statements, []
        yield
        inner, self.statements = self.statements, outer
        lines = "\n    ".join([f"{loop} {{", *(s.text for s in inner)])
        reads = dict.fromkeys(b for s in inner for b in s.reads)
        writes = dict.fromkeys(b for s in inner for b in s.writes)
        self.statements.append(Statement(f"{lines}\n  }}", tuple(reads), tuple(writes), self.label))

    def map(
        self,
        expression: str,
        inputs: Sequence[Tensor],
        strides: Sequence[Sequence[Dim]],
        y: Tensor,
        shape: Sequence[Dim],
    ) -> None:
        """``y = expression(a, b, ...)`` on `shape`: inputs with these strides, y without gaps."""
        name, text = loop_function(expression, [C_TYPES[x.dtype][0] for x in inputs], C_TYPES[y.dtype][0], len(shape))
        self.functions[name] = text
        pointers = ", ".join([*(x.c for x in inputs), y.c])
        jumps = listed([s for held in strides for s in held])
        self.add(f"{name}({pointers}, {listed(shape)}, {jumps});", inputs, [y])

    def scatter(self, x: Tensor, strides: Sequence[Dim], y: Tensor) -> None:
        """Copies x, with these strides, to y, which has gaps."""
        name, text = copy_function(C_TYPES[x.dtype][0], len(y.shape))
        self.functions[name] = text
        places = f"{listed(y.shape)}, {listed(strides)}, {listed(y.strides)}"
        self.add(f"{name}({x.c}, {y.c}, {places});", [x], [y])

    def reduce(self, kind: str, x: Tensor, kept: int, y: Tensor) -> None:
        """One number of the axes behind the first `kept`."""
        name, text = reduce_function(kind, C_TYPES[x.dtype][0], kept, len(x.shape))
        self.functions[name] = text
        self.add(f"{name}({x.c}, {y.c}, {listed(x.shape)}, {listed(x.strides)});", [x], [y])

    def gather(self, table: Tensor, indices: Tensor, y: Tensor, outer: Dim, n: Dim, inner: Dim) -> None:
        """``y[o, j, i] = table[o, indices[j], i]``."""
        kind = "64" if indices.dtype == ir.DataType.INT64 else "32"
        self.use("gather", kind)
        size = f"{inner.c} * {self.bytes_of(table.dtype)}"
        places = f"{outer.c}, {n.c}, {indices.elements.c}, {size}"
        self.add(f"TRY(gather{kind}({table.c}, {indices.c}, {y.c}, {places}));", [table, indices], [y])

    def gather_nd(self, x: Tensor, indices: Tensor, y: Tensor, sizes: Sequence[Dim], width: Dim) -> None:
        """Slices of `width` elements, by tuples of indices into axes of these sizes."""
        self._slices("gather", x, indices, y, sizes, width)

    def scatter_nd(
        self, step: str, x: Tensor, indices: Tensor, y: Tensor, sizes: Sequence[Dim], width: Dim
    ) -> None:  # fmt: skip
        """Brings slices of `width` elements to where tuples of indices say, in order."""
        self._slices(step, x, indices, y, sizes, width)

    def _slices(
        self, step: str, x: Tensor, indices: Tensor, y: Tensor, sizes: Sequence[Dim], width: Dim
    ) -> None:  # fmt: skip
        name, text = indexed_function("slices", step, C_TYPES[x.dtype][0])
        self.functions[name] = text
        places = f"{product(indices.shape[:-1]).c}, {len(sizes)}, {listed(sizes)}, {width.c}"
        self.add(f"TRY({name}({x.c}, {indices.c}, {y.c}, {places}));", [x, indices], [y])

    def gather_elements(self, x: Tensor, indices: Tensor, y: Tensor, axis: int) -> None:
        """One element along an axis for each index."""
        self._elements("gather", x, indices, y, axis, x)

    def scatter_elements(self, step: str, x: Tensor, indices: Tensor, y: Tensor, axis: int) -> None:
        """Brings one element along an axis for each index, in order."""
        self._elements(step, x, indices, y, axis, y)

    def _elements(self, step: str, x: Tensor, indices: Tensor, y: Tensor, axis: int, indexed: Tensor) -> None:
        name, text = indexed_function("elements", step, C_TYPES[x.dtype][0])
        self.functions[name] = text
        sizes = f"{indexed.shape[axis].c}, {listed(indices.shape)}, {listed(indexed.strides)}"
        places = f"{len(indexed.shape)}, {axis}, {sizes}"
        self.add(f"TRY({name}({x.c}, {indices.c}, {y.c}, {places}));", [x, indices], [y])

    def top_k(self, x: Tensor, y: Tensor, places: Tensor, count: Dim, *, largest: bool) -> None:
        """The first `count` of each row in order, with their places, the first of equals first."""
        kind = C_TYPES[x.dtype][0]
        self.use("top_k", kind)
        sizes = ", ".join(s.c for s in (product(x.shape[:-1]), x.shape[-1], count))
        self.add(f"top_k_{kind}({x.c}, {y.c}, {places.c}, {sizes}, {int(largest)});", [x], [y, places])

    def cum_sum(self, x: Tensor, y: Tensor, axis: int) -> None:
        """Running sums of an axis."""
        kind = C_TYPES[x.dtype][0]
        self.use("cum_sum", kind)
        sizes = ", ".join(s.c for s in (product(x.shape[:axis]), x.shape[axis], product(x.shape[axis + 1 :])))
        self.add(f"cum_sum_{kind}({x.c}, {y.c}, {sizes});", [x], [y])

    def pool(self, kind: str, window: Window, x: Tensor, y: Tensor) -> None:
        """One number of each window: the ``largest``, or the mean of what is ``inside`` or ``padded`` with zeros."""
        self.use("reach")
        self.use("pool")
        number = ("inside", "largest", "padded").index(kind)
        sizes = f"{product(x.shape[:2]).c}, {listed(x.shape[2:])}, {listed(y.shape[2:])}"
        self.add(f"pool({number}, {x.c}, {y.c}, {sizes}, {window.c});", [x], [y])

    def resize(self, x: Tensor, y: Tensor, axis: int, scale: float | None, place: str, value: str) -> None:
        """One axis in another size, by a scale or that of the sizes: `value` of the elements at `place`."""
        self.use("resize")
        n, m = x.shape[axis].c, y.shape[axis].c
        sizes = f"{product(x.shape[:axis]).c}, {n}, {m}, {product(x.shape[axis + 1 :]).c}"
        factor = f"(float){m} / (float){n}" if scale is None else f"{scale!r}f"
        rules = f"{factor}, {RESIZE_PLACES.index(place)}, {RESIZE_VALUES.index(value)}"
        self.add(f"resize({x.c}, {y.c}, {sizes}, {rules});", [x], [y])

    def grid_sample(self, x: Tensor, grid: Tensor, y: Tensor, *, nearest: bool, padding: str, aligned: bool) -> None:
        """Images at the places of a grid."""
        self.use("grid_sample")
        sizes = ", ".join(s.c for s in (*x.shape, product(y.shape[2:])))
        rules = f"{int(nearest)}, {GRID_PADDING.index(padding)}, {int(aligned)}"
        self.add(f"grid_sample({x.c}, {grid.c}, {y.c}, {sizes}, {rules});", [x, grid], [y])

    def count(self, y: Tensor, first: Dim, every: Dim) -> None:
        """``y[i] = first + i * every``."""
        kind = C_TYPES[y.dtype][0]
        body = f"p[i] = ({kind})({first.c} + i * {every.c});"
        self.add(f"{{ {kind} *p = {y.c}; for (int64_t i = 0; i < {y.elements.c}; i++) {body} }}", [], [y])

    def write(self, y: Tensor, values: Sequence[Dim]) -> None:
        """Writes numbers that the dimensions determine."""
        kind = C_TYPES[y.dtype][0]
        lines = " ".join(f"p[{i}] = ({kind}){v.c};" for i, v in enumerate(values))
        self.add(f"{{ {kind} *p = {y.c}; {lines} }}", [], [y])

    def rotate(
        self, x: Tensor, y: Tensor, tables: list[Tensor], positions: Tensor, width: int, rotated: int,
        interleaved: bool, *, before: Tensor | None,
    ) -> None:  # fmt: skip
        """Rotates heads into `y`; into a cache behind what it holds if `before` tells how much that is."""
        if rotated:
            self.use("check_range")
            rows = tables[0].shape[0]
            self.add(f"TRY(check_range({positions.c}, {positions.elements.c}, {rows.c}));", [positions], [])
        batch, heads, s, _ = x.shape
        kernel = self.kernel("rotate", rotate, width, rotated, interleaved, before is not None, pointers=5, integers=9)
        target = y.view(y.shape, y.strides)
        integers: list[Size] = [heads, s, positions.strides[0]]
        integers += [x.strides[0], x.strides[1], x.strides[2], y.strides[0], y.strides[1], y.strides[2]]
        self.call(kernel, [x, target, *tables, positions], integers, batch * s, writes=[y])

    def append(self, x: Tensor, y: Tensor, positions: Tensor, width: int, cells: Cells) -> None:
        """Stores heads in a cache of bytes, at their positions."""
        batch, heads, s, _ = x.shape
        kernel = self.kernel("append", append, width, cells, pointers=3, integers=9)
        integers: list[Size] = [heads, s, positions.strides[0], *x.strides[:3], *y.strides[:3]]
        self.call(kernel, [x, y, positions], integers, batch * s, writes=[y])

    def attend(
        self, shape: Heads, q: Tensor, k: Tensor, v: Tensor, y4: Tensor, y: Tensor, before: Tensor | None,
        keys: Dim, bias: tuple[Tensor, list[Dim]] | None, kv: int,
    ) -> None:  # fmt: skip
        """Calls the kernel that fits the number of queries."""
        batch, _, s, _ = q.shape
        units = batch * kv
        past = before if before is not None else self.array(np.zeros(1, np.int32))
        strides = [t for x in (q, k, v, y4) for t in (x.strides[0], x.strides[1], x.strides[2])]
        extra, more = ([], []) if bias is None else ([bias[0]], bias[1])
        room = dim(f"qc_up({keys.c}, {2 * self.isa.lanes})")
        per_key, _ = shape.scratch(self.isa, True, 0)
        work = self.tensor((units * room * max(per_key, shape.share),))
        pointers, integers = 6 + len(extra), 16 + len(more)
        many = self.kernel("attend_many", attend_many, shape, pointers=pointers, integers=integers)
        names = [many]
        if shape.fits_few(self.isa):
            names.insert(0, self.kernel("attend_few", attend_few, shape, pointers=pointers, integers=integers))
        addresses = ", ".join(t.c for t in (q, k, v, y4, work, past, *extra))
        numbers = ", ".join(dim(i).c for i in (kv, s, keys, room, *strides, *more))
        lines = [f"CALL({n}, {pointers}, {integers}, PTRS({addresses}), INTS({numbers}), {units.c}, 1);" for n in names]
        text = lines[0] if len(lines) == 1 else f"if ({s.c} <= {_FEW}) {{ {lines[0]} }} else {{ {lines[1]} }}"
        self.add(text, [q, k, v, past, work, *extra], [y, work])
