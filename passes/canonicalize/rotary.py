"""Rotary position embeddings written out in elementary operators become RotaryEmbedding with constant tables."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._evaluate import Piece
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    drop_unused,
    made_by,
    main_nodes,
    replace,
    same_dim,
    too_old,
)
from qc.passes.canonicalize._rotations import Rotation, enclosing, rotations

__all__ = ["RecogniseRotary"]

_POSITIONS = 4096  # table rows for a model whose provenance does not say how many positions it knows
_SWAP = (0, 2, 1, 3)  # between [batch, sequence, heads, channels] and the operator's [batch, heads, sequence, channels]
_ULP = 2e-6  # cos and sin of equal arguments may differ by a rounding between vector and scalar code


@dataclasses.dataclass(frozen=True)
class RecogniseRotary(Pass):
    """Rewrites ``x * cos + rotate(x) * sin`` to ``RotaryEmbedding(x, cos_table, sin_table, position_ids)``.

    ``rotate`` is either of (-second half, first half), written on x or on its halves, and (-odd, even) interleaved. How
    cos and sin are computed is not matched but *evaluated*: the subgraph must depend on one integer value, the
    positions, and on nothing else but constants and shapes. It is run at ``0 .. positions - 1``, which gives the table,
    and again on other batches, lengths and orders; unless these give rows of that table, the site is left alone (a
    scaling that depends on the length, for example). Scale factors on cos and sin end up in the table. A rotation of
    the first channels only, followed by a Concat with the rest, becomes ``rotary_embedding_dim``. A value with the
    sequence before the heads is transposed, and back.

    Exact for positions below the number of table rows; a runtime refuses larger ones.

    Attributes:
        positions: Rows of the table; 0 takes the model's ``max_positions``, or 4096 if it does not say.
    """

    contract: ClassVar[Contract] = Exact(1e-4)
    positions: int = 0

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        if (note := too_old(model)) is not None:
            return Result(model, False, [], [note])
        sites = [Site(site_name(n), Outcome.MATCHED) for n in main_nodes(model, "RotaryEmbedding")]
        known = int(model.metadata_props.get("qc.max_positions", 0))
        tables = _Tables(model.graph, self.positions or known or _POSITIONS, context)
        for node in main_nodes(model, "Add", "Concat"):
            for rotation in rotations(node):
                try:
                    sites.append(_rewrite(rotation, tables))
                except Decline as reason:
                    sites.append(Site(site_name(node), Outcome.SKIPPED, str(reason)))
                break
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


def _rewrite(found: Rotation, tables: _Tables) -> Site:
    if found.x.shape is None or len(found.x.shape) != 4:
        raise Decline("the rotated value does not have 4 axes (batch, heads, sequence, channels)")
    name, out, x = site_name(found.root), found.root.outputs[0], found.x
    cos, sin, positions, heads_first = tables.of(found)
    cut, concat = enclosing(found)
    if cut is not None:
        x, out = cut.inputs[0], concat.outputs[0]
    before = [] if heads_first else [ir.node("Transpose", [x], {"perm": _SWAP})]
    node = ir.node(
        "RotaryEmbedding",
        [before[0].outputs[0] if before else x, cos, sin, _per_row(found.root, x, positions)],
        {"interleaved": int(found.interleaved), "rotary_embedding_dim": 0 if cut is None else found.x.shape[-1]},
        name=found.root.name,
    )
    after = [] if heads_first else [ir.node("Transpose", [node.outputs[0]], {"perm": _SWAP})]
    for made in (*before, node) if before else ():
        made.outputs[0].type, made.outputs[0].shape = x.type, ir.Shape([x.shape[i] for i in _SWAP])
    replace(out, [*before, node, *after], like=found.root)
    rows = cos.shape[0]
    return Site(name, Outcome.CHANGED, details={"rows": rows, "channels": found.x.shape[-1], "table": cos.name})


def _per_row(root: ir.Node, x: ir.Value, positions: ir.Value) -> ir.Value:
    """The positions as int64 ``[batch of x, sequence]``, which is what the operator takes."""
    if len(positions.shape) == 2 and same_dim(positions.shape[0], x.shape[0]) and positions.dtype == ir.DataType.INT64:
        return positions
    graph = root.graph
    nodes = [ir.node("Shape", [x], {"start": 0, "end": 1})]
    one = add_constant(graph, f"{positions.name}_one", ir.tensor(np.array([1], np.int64)))
    nodes.append(ir.node("Concat", [nodes[0].outputs[0], one], {"axis": 0}))
    nodes.append(ir.node("Expand", [positions, nodes[1].outputs[0]]))
    if positions.dtype != ir.DataType.INT64:
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": ir.DataType.INT64}))
    graph.insert_before(root, nodes)
    made = nodes[-1].outputs[0]
    made.type = ir.TensorType(ir.DataType.INT64)
    made.shape = ir.Shape([x.shape[0], positions.shape[-1]])
    return made


class _Tables:
    """Evaluates cos and sin subgraphs, each pair once, and keeps one constant per distinct table."""

    def __init__(self, graph: ir.Graph, rows: int, context: Context | None) -> None:
        self._graph = graph
        self._store = context.store if context is not None else None
        self._rows = rows
        self._read: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, ir.Value, bool] | Decline] = {}
        self._kept: dict[tuple[object, ...], ir.Value] = {}

    def of(self, found: Rotation) -> tuple[ir.Value, ir.Value, ir.Value, bool]:
        """The constants ``[rows, channels / 2]``, the positions, and whether the heads axis comes before the sequence.

        Raises:
            Decline: If cos or sin are not a function of the position alone.
        """
        key = (id(found.cos), id(found.sin))
        if key not in self._read:
            try:
                self._read[key] = self._evaluate(found)
            except Decline as reason:
                self._read[key] = reason
        read = self._read[key]
        if isinstance(read, Decline):
            raise Decline(str(read))
        cos, sin, positions, heads_first = read
        halves = [_half(table, found) for table in (cos, sin)]
        named = zip(("rotary_cos", "rotary_sin"), halves, strict=True)
        return *(self._constant(name, table) for name, table in named), positions, heads_first

    def _constant(self, name: str, table: np.ndarray) -> ir.Value:
        key = (name, table.shape, table.tobytes())
        if key not in self._kept:
            # A table of 128k positions is as large as a weight: where there is a store, it goes to disk.
            tensor = ir.tensor(table) if self._store is None else self._store.put(name, table)
            self._kept[key] = add_constant(self._graph, name, tensor)
        return self._kept[key]

    def _evaluate(self, found: Rotation) -> tuple[np.ndarray, np.ndarray, ir.Value, bool]:
        positions = _positions(found.cos)
        if _positions(found.sin) is not positions:
            raise Decline("cos and sin come from different positions")
        piece = Piece(self._graph, [found.cos, found.sin], cut=[positions])
        others = [v.name for v in piece.reads if v is not positions]
        if others:
            raise Decline(f"cos and sin depend on {', '.join(others)} beside the positions")
        cos, sin = self._run(piece, positions, np.arange(self._rows)[None])
        heads_first = cos.shape[-2] == self._rows
        tables = [t.reshape(-1, t.shape[-1]) for t in (cos, sin)]
        if any(len(t) != self._rows for t in tables):
            raise Decline("cos and sin have more than one entry per position")
        top = self._rows - 1
        for sample in ([[0]], [[min(1, top)]], [[top]], [[3 % self._rows, 0, top, 1, 1]], [[1, 2], [0, top]]):
            array = np.array(sample)
            if len(array) > 1 and len(positions.shape) < 2:
                continue
            for values, table in zip(self._run(piece, positions, array), tables, strict=True):
                expected = table[array].reshape(values.shape) if values.size == table[array].size else None
                if expected is None or np.abs(values - expected).max() > _ULP:
                    raise Decline("cos and sin depend on more than each position (a scaling by length, for example)")
        return *tables, positions, heads_first

    def _run(self, piece: Piece, positions: ir.Value, sample: np.ndarray) -> list[np.ndarray]:
        """Runs cos and sin on positions ``[batch, sequence]``."""
        fed = sample if len(positions.shape) == 2 else sample[0]
        sizes = {str(d.value): n for d, n in zip(positions.shape, fed.shape, strict=True) if not isinstance(d, int)}
        for value in piece.shapes:
            # Where a batch or length is read off another input, its two leading axes are those of the positions.
            # Any other size differs from run to run, so that a dependence on it shows.
            named = [(i, str(d.value)) for i, d in enumerate(value.shape or ()) if not isinstance(d, int)]
            sizes |= {n: sample.shape[i] if i < 2 else 1 + sample.size % 7 for i, n in named if n not in sizes}
        return piece.run({positions: fed.astype(positions.dtype.numpy())}, sizes)


def _positions(value: ir.Value) -> ir.Value:
    """The integer value, of at most two axes, that the position arithmetic behind cos or sin starts from.

    Raises:
        Decline: If there is none.
    """
    pending, seen = [value], set()
    while pending:
        value = pending.pop(0)
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and not _is_fixed(value):
            while (step := made_by(value, *_RESHAPERS)) is not None:
                value = step.inputs[0]
            if value.shape is None or not 1 <= len(value.shape) <= 2:
                raise Decline("the positions behind cos and sin have neither one nor two axes")
            return value
        node = value.producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        pending.extend(v for v in node.inputs[: 1 if node.op_type in _RESHAPERS else None] if v is not None)
    raise Decline("cos and sin are not computed from integer positions")


_RESHAPERS = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Tile")


def _is_fixed(value: ir.Value) -> bool:
    """Whether `value` depends on no graph input."""
    node = value.producer()
    return not value.is_graph_input() if node is None else all(v is None or _is_fixed(v) for v in node.inputs)


def _half(table: np.ndarray, found: Rotation) -> np.ndarray:
    """One entry per rotated pair.

    Raises:
        Decline: If the two channels of a pair have different angles.
    """
    size = found.x.shape[-1]
    if found.paired:
        size //= 2
    if table.shape[-1] != size:
        raise Decline(f"cos has {table.shape[-1]} channels, expected {size}")
    if found.paired:
        return table
    if found.interleaved:
        first, second = table[:, 0::2], table[:, 1::2]
    else:
        first, second = table[:, : size // 2], table[:, size // 2 :]
    if not np.array_equal(first, second):
        raise Decline("the two channels of a rotated pair have different angles")
    return np.ascontiguousarray(first)
