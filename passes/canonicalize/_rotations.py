"""Finding rotations of channel pairs, whole or of the first channels only, in the spellings that exporters write."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from qc.passes.canonicalize._graph import attribute, integers, made_by, operands, same_dim, sole_consumer

__all__ = ["Rotation", "enclosing", "rotations"]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """``root = x * cos + rotate(x) * sin``.

    Attributes:
        root: The node that makes the rotated value.
        x: The value that is rotated.
        cos: Factor of x, one entry per channel; per pair if `paired`.
        sin: Likewise.
        interleaved: Whether the pairs are neighbours, not channels of the two halves.
        paired: Whether cos and sin have one entry per pair.
    """

    root: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool = False
    paired: bool = False


def rotations(root: ir.Node) -> Iterator[Rotation]:
    """Yields the ways, one as a rule, to read an Add or Concat as a rotation."""
    yield from _of_whole(root) if root.op_type == "Add" else _of_halves(root)


def _of_halves(concat: ir.Node) -> Iterator[Rotation]:
    """``Concat(a cos - b sin, b cos + a sin)`` for the halves a, b of x."""
    if len(concat.inputs) != 2 or not _is_last(concat, concat.outputs[0]):
        return
    minus, plus = made_by(concat.inputs[0], "Sub"), made_by(concat.inputs[1], "Add")
    products = [made_by(v, "Mul") for n in (minus, plus) if n is not None for v in n.inputs]
    if len(products) != 4 or any(p is None for p in products):
        return
    found = [{id(v) for v in p.inputs} for p in products]
    for a, cos in operands(products[0]):
        for b, sin in operands(products[1]):
            piece = made_by(a, "Slice", "Split")
            if piece is None or found[2:] not in (
                [{id(b), id(cos)}, {id(a), id(sin)}],
                [{id(a), id(sin)}, {id(b), id(cos)}],
            ):
                continue
            x = piece.inputs[0]
            size = x.shape[-1] if x.shape is not None else None
            if not isinstance(size, int):
                continue
            if _part_of(a, x) == range(size // 2) and _part_of(b, x) == range(size // 2, size):
                yield Rotation(concat, x, cos, sin, paired=True)


def _of_whole(add: ir.Node) -> Iterator[Rotation]:
    for straight, turned in operands(add):
        a, b = made_by(straight, "Mul"), made_by(turned, "Mul")
        if a is None or b is None:
            continue
        for x, cos in operands(a):
            for rotated, sin in operands(b):
                interleaved = _is_rotated(rotated, x)
                if interleaved is not None:
                    yield Rotation(add, x, cos, sin, interleaved)


def _is_rotated(value: ir.Value | None, x: ir.Value | None) -> bool | None:
    """False if `value` is x rotated by halves, True if by neighbours, None if it is neither."""
    concat = made_by(value, "Concat")
    if concat is not None:
        return False if _is_last(concat, value) and _pairs(concat.inputs, x, step=1) else None
    reshape = made_by(value, "Reshape")
    concat = made_by(reshape.inputs[0], "Concat") if reshape is not None else None
    if concat is None or not _is_last(concat, reshape.inputs[0]):
        return None
    parts = [made_by(v, "Unsqueeze") for v in concat.inputs]
    if any(p is None for p in parts) or not _same_axes(value, x):
        return None
    return True if _pairs([p.inputs[0] for p in parts], x, step=2) else None


def _is_last(concat: ir.Node, value: ir.Value) -> bool:
    axis = attribute(concat, "axis")
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)


def _same_axes(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is None or b is None or a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(same_dim(i, j) for i, j in zip(a.shape, b.shape, strict=True))


def _pairs(parts: Iterable[ir.Value | None], x: ir.Value | None, step: int) -> bool:
    """Whether `parts` are (-second, first) halves of x's last axis, or with step 2 its (-odd, even) entries."""
    parts = list(parts)
    negated = made_by(parts[0], "Neg") if len(parts) == 2 else None
    if negated is None or x is None or x.shape is None or not isinstance(x.shape[-1], int):
        return False
    size = x.shape[-1]
    halves, neighbours = (range(size // 2, size), range(size // 2)), (range(1, size, 2), range(0, size, 2))
    wanted = neighbours if step == 2 else halves
    found = [_part_of(negated.inputs[0], x), _part_of(parts[1], x)]
    return all(f is not None and f == w for f, w in zip(found, wanted, strict=True))


def _part_of(value: ir.Value | None, x: ir.Value) -> range | None:
    """The entries of x's last axis that `value` (a Slice or Split of x) holds, or None."""
    if x.shape is None or not isinstance(x.shape[-1], int):
        return None
    last, size = len(x.shape) - 1, x.shape[-1]
    piece = made_by(value, "Slice", "Split")
    if piece is None or piece.inputs[0] is not x:
        return None
    if piece.op_type == "Split":
        if attribute(piece, "axis", 0) not in (-1, last):
            return None
        sizes = integers(piece.inputs[1]) if len(piece.inputs) > 1 else None
        sizes = sizes if sizes is not None else [-(-size // len(piece.outputs))] * len(piece.outputs)
        place = piece.outputs.index(value)
        start = sum(sizes[:place])
        return range(start, min(start + sizes[place], size))
    starts, ends = integers(piece.inputs[1]), integers(piece.inputs[2])
    axes = integers(piece.inputs[3]) if len(piece.inputs) > 3 else None
    steps = integers(piece.inputs[4]) if len(piece.inputs) > 4 else [1]
    if starts is None or ends is None or steps is None or len(starts) != 1 or axes not in ([-1], [last]):
        return None
    return range(*slice(starts[0], ends[0], steps[0]).indices(size))


def enclosing(found: Rotation) -> tuple[ir.Node | None, ir.Node | None]:
    """For ``Concat(rotated, rest)``: the node that cuts x from the whole value, and the Concat; else two Nones."""
    cut, concat = made_by(found.x, "Slice", "Split"), sole_consumer(found.root.outputs[0])
    if cut is None or concat is None or concat.op_type != "Concat" or concat.domain != "" or len(concat.inputs) != 2:
        return None, None
    if not _is_last(concat, concat.outputs[0]) or concat.inputs[0] is not found.root.outputs[0]:
        return None, None
    whole = cut.inputs[0]
    first, rest = _part_of(found.x, whole), _part_of(concat.inputs[1], whole)
    if first is None or rest is None or first != range(len(first)) or rest != range(len(first), whole.shape[-1]):
        return None, None
    return cut, concat
