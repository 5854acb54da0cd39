"""Weights in the layout that ``MatMulNBits`` and ``GatherBlockQuantized`` read, computed when they are read."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qc.backends.ort import capability
from qc.backends.ort.packing import pack_codes, pack_tensor
from qc.ir import dialect
from qc.ir.errors import UnsupportedError
from qc.ir.quant import Affine, Format, Weight
from qc.ir.store import release
from qc.passes.canonicalize._graph import add_constant

__all__ = ["Held", "PackedWeights", "consumes_weight", "float_scale", "has_kernel", "kernel_block"]


def has_kernel(format: Format) -> bool:
    """Whether the kernels read codes of this kind; `kernel_block` says whether they are fast for its groups."""
    return isinstance(format.values, Affine) and format.native is not None and format.axis == "in"


def kernel_block(format: Format, columns: int, accuracy_level: int | None) -> int:
    """The block size with which the kernels represent `format` exactly and run fast.

    A group that is itself a legal block is kept. A longer one, or a whole row, is cut into the longest legal blocks
    that divide it, each with a copy of the scale: exact, and 1.4 times as fast as the runtime's own choice of 32 for
    rows. For a row, the longest block that needs least padding wins; 16 is left out, as it is three times slower.

    Args:
        format: The format of the weight.
        columns: K.
        accuracy_level: That of ``MatMulNBits``; None for a table that is only looked up, which any block suits.

    Raises:
        UnsupportedError: If no fast block exists; says what to choose.
    """
    bits = format.values.bits
    group = format.group
    legal = [b for b in capability.MATMUL_BLOCKS if (b > 16 if group is None else group % b == 0)]
    fast = [b for b in legal if accuracy_level is None or capability.matmul_limit(bits, b, accuracy_level) is None]
    if not fast:
        limit = (
            capability.matmul_limit(bits, legal[-1], accuracy_level) if legal and accuracy_level is not None else None
        )
        blocks = ", ".join(map(str, capability.MATMUL_BLOCKS))
        reason = limit.reason if limit else f"blocks have {blocks} columns; choose one of these as the group"
        raise UnsupportedError(f"Expected a format with a fast kernel in ONNX Runtime, found {format}: {reason}.")
    if group is not None:
        return max(fast)
    return min(fast, key=lambda b: (-(-columns // b) * b, -b))


@dataclasses.dataclass
class Held:
    """A weight in the layout of the kernels; `blocks` and `rows` are the same bytes where a table is tied."""

    weight: Weight
    block: int
    scale: ir.Value
    zero_points: ir.Value | None
    blocks: ir.Value | None
    rows: ir.Value | None

    @property
    def values(self) -> Affine:
        return _affine(self.weight)


class PackedWeights:
    """Packs each weight once, whatever the number of its consumers; nothing is read before the model is written."""

    def __init__(self, graph: ir.Graph, accuracy_level: int) -> None:
        self._graph = graph
        self._accuracy_level = accuracy_level
        self._blocks: dict[ir.Value, int] = {}
        self._held: dict[ir.Value, Held] = {}

    def plan(self, weight: Weight) -> None:
        """Chooses the block size.

        Raises:
            UnsupportedError: If there is no fast one.
        """
        assert weight.format is not None
        level = self._accuracy_level if "Linear" in _consumers(weight) else None
        self._blocks[weight.data] = kernel_block(weight.format, weight.shape[1], level)

    def of(self, weight: Weight, first: ir.Node) -> Held:
        """The packed weight; its constants stand in front of `first`, the first node that reads it."""
        if weight.data not in self._held:
            self._held[weight.data] = self._pack(weight, first)
        return self._held[weight.data]

    def _pack(self, weight: Weight, first: ir.Node) -> Held:
        block = self._blocks[weight.data]
        values, (rows, columns), consumers = _affine(weight), weight.shape, _consumers(weight)
        groups = -(-columns // block)
        nodes, scale = float_scale(self._per_block(weight, "scale", block))
        zero_points = None
        if not values.symmetric:
            zero_points = self._zero_points(weight, block, groups)
        blocks = table = None
        if "Linear" in consumers:
            shape = (rows, groups, block * values.bits // 8)
            blocks = self._constant(f"{weight.name}.blocks", weight.data, values, groups * block, shape)
        if "Gather" in consumers and blocks is not None and columns % block == 0:
            shape = ir.tensor(np.array([rows, -1], np.int64), name=f"{weight.name}.rows")
            reshape = ir.node("Reshape", [blocks, add_constant(self._graph, f"{weight.name}.rows", shape)])
            nodes.append(reshape)
            table = reshape.outputs[0]
            table.dtype, table.shape = ir.DataType.UINT8, ir.Shape((rows, columns * values.bits // 8))
        elif "Gather" in consumers:
            shape = (rows, columns * values.bits // 8)
            table = self._constant(f"{weight.name}.table", weight.data, values, columns, shape)
        for node in nodes:
            self._graph.insert_before(first, node)
        return Held(weight, block, scale, zero_points, blocks, table)

    def _constant(self, name: str, source: ir.Value, values: Affine, width: int, shape: tuple[int, ...]) -> ir.Value:
        tensor = source.const_value
        assert tensor is not None

        def read() -> ir.TensorProtocol:
            return ir.tensor(pack_tensor(tensor, values, width).reshape(shape), name=name)

        lazy = ir.LazyTensor(read, dtype=ir.DataType.UINT8, shape=ir.Shape(shape), name=name)
        return add_constant(self._graph, name, lazy)

    def _per_block(self, weight: Weight, which: str, block: int) -> ir.Value:
        """The scales ``[N, K / block]``: as they are stored, or each repeated for the blocks of its group."""
        source, (rows, columns) = weight.params[which], weight.shape
        tensor, groups = source.const_value, -(-columns // block)
        assert tensor is not None
        if tuple(tensor.shape) == (rows, groups):
            return source

        def read() -> ir.TensorProtocol:
            return ir.tensor(_repeated(tensor.numpy().reshape(rows, -1), groups), name=name)

        name = f"{weight.name}.{which}_per_block"
        lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape((rows, groups)), name=name)
        return add_constant(self._graph, name, lazy)

    def _zero_points(self, weight: Weight, block: int, groups: int) -> ir.Value:
        """The zero points packed per row, uint8 ``[N, ceil(groups * bits / 8)]``; all zero where the graph has none."""
        rows, values = weight.shape[0], _affine(weight)
        shape, name = (rows, -(-groups * values.bits // 8)), f"{weight.name}.zero_points"
        source = weight.params.get("zero_point")
        tensor = source.const_value if source is not None else None

        def read() -> ir.TensorProtocol:
            if tensor is None:
                return ir.tensor(np.zeros(shape, np.uint8), name=name)
            codes = _repeated(tensor.numpy().astype(np.uint8).reshape(rows, -1), groups)
            release(tensor)
            return ir.tensor(pack_codes(codes, values.bits), name=name)

        return add_constant(
            self._graph, name, ir.LazyTensor(read, dtype=ir.DataType.UINT8, shape=ir.Shape(shape), name=name)
        )


def _affine(weight: Weight) -> Affine:
    assert weight.format is not None
    assert isinstance(weight.format.values, Affine)
    return weight.format.values


def _repeated(params: np.ndarray, groups: int) -> np.ndarray:
    """Stretches ``[N, G]`` to ``[N, groups]``, each column repeated for the blocks that its group was cut into."""
    times = -(-groups // params.shape[1])
    return np.ascontiguousarray(np.repeat(params, times, axis=1)[:, :groups])


def float_scale(scale: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """`scale` as float32: itself, or behind a Cast that the runtime folds at load."""
    assert scale.const_value is not None
    if scale.const_value.dtype == ir.DataType.FLOAT:
        return [], scale
    cast = ir.node("Cast", [scale], {"to": int(ir.DataType.FLOAT)})
    out = cast.outputs[0]
    out.dtype, out.shape = ir.DataType.FLOAT, ir.Shape(scale.const_value.shape)
    return [cast], out


def _consumers(weight: Weight) -> set[str]:
    """Which kinds of fusable operators read the weight's codes, through whichever decode node."""
    decoded = (out for use in weight.data.uses() for out in use.node.outputs)
    return {use.node.op_type for value in decoded for use in value.uses() if consumes_weight(use.node)}


def consumes_weight(node: ir.Node) -> bool:
    """Whether `node` is of a kind that has a kernel for quantized weights."""
    return dialect.is_op(node, "Linear") or (node.domain == "" and node.op_type == "Gather")
