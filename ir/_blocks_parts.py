"""The division of a graph into parts that run one after another: blocks, and what lies between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from qc.ir._blocks_index import GraphIndex
from qc.ir._blocks_repeat import Repeat, find_repeats
from qc.ir._blocks_spine import Spine, find_spine

__all__ = ["Kind", "Part", "divide"]

Kind = Literal["preamble", "stem", "block", "between", "tail"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Nodes by ascending position, with the meaning of `qc.ir.blocks.Segment`."""

    kind: Kind
    run: int | None
    index: int | None
    nodes: Sequence[int]


def divide(index: GraphIndex) -> tuple[list[Part], frozenset[int]]:
    """Divides all nodes into parts in an order of execution; also returns the nodes that end a link of the chain."""
    ends: set[int] = set()
    parts = _named(_merged(_split(index, range(len(index.nodes)), ends)))
    return parts, frozenset(ends)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Nodes by position. Those of one `repeat` are alike."""

    kind: Literal["preamble", "block", "rest"]
    nodes: Sequence[int]
    repeat: Repeat | None = None


def _split(index: GraphIndex, members: Sequence[int], ends: set[int]) -> Iterator[_Piece]:
    """Divides ascending `members` into pieces that run one after another; adds the nodes that end a unit to `ends`."""
    spine = find_spine(index, members)
    repeats = find_repeats(spine.signatures, spine.weights) if spine is not None else []
    if spine is None or not repeats:
        yield _Piece("rest", members)
        return
    unit_of_interval, unit_repeat = _units(repeats, len(spine.cuts))
    placed: list[list[int]] = [[] for _ in range(len(unit_repeat) + 1)]
    for node, unit in _place(index, members, spine, unit_of_interval).items():
        placed[unit + 1].append(node)
    ends.update(cut for cut, a, b in zip(spine.cuts, unit_of_interval, unit_of_interval[1:], strict=False) if a != b)
    preamble, *units = placed
    inner = list(_split(index, preamble, ends))
    once = "preamble" if any(not index.const[n] for n in preamble) else "rest"
    yield from inner if len(inner) > 1 else [_Piece(once, preamble)]
    for nodes, repeat in zip(units, unit_repeat, strict=True):
        if repeat is None:
            yield from _split(index, nodes, ends)
        else:
            yield _Piece("block", nodes, repeat)


def _units(repeats: Sequence[Repeat], intervals: int) -> tuple[list[int], list[Repeat | None]]:
    """Groups intervals into units, one per block and per gap: the unit of each interval, the repeat of each unit."""
    unit_of_interval: list[int] = []
    unit_repeat: list[Repeat | None] = []
    for repeat in [*repeats, Repeat(intervals, 1, 0)]:
        gap = repeat.start - len(unit_of_interval)
        if gap > 0 or repeat.start == intervals:  # what hangs on nothing needs a last unit, even one without intervals
            unit_of_interval += [len(unit_repeat)] * gap
            unit_repeat.append(None)
        for _ in range(repeat.count):
            unit_of_interval += [len(unit_repeat)] * repeat.period
            unit_repeat.append(repeat)
    return unit_of_interval, unit_repeat


def _place(index: GraphIndex, members: Sequence[int], spine: Spine, unit_of_interval: Sequence[int]) -> dict[int, int]:
    """Assigns each member to a unit, or to -1, the preamble, such that no edge goes backwards.

    On the spine the interval decides. Off it: a node that only one unit needs goes there; one that several need goes as
    early as what it reads allows; one that nothing needs (a cache output) stays with what it reads.
    """
    on_spine = {n: unit_of_interval[i] for n, i in spine.interval.items()}
    needed: dict[int, tuple[int, int]] = {n: (u, u) for n, u in on_spine.items()}
    for n in reversed(members):
        if n not in needed:
            continue
        first, last = needed[n]
        for p in index.preds[n]:
            if p not in on_spine:
                before = needed.get(p, (first, last))
                needed[p] = (min(first, before[0]), max(last, before[1]))
    final = unit_of_interval[-1]
    unit: dict[int, int] = {}
    for n in members:
        earliest = max((unit.get(p, -1) for p in index.preds[n]), default=-1)
        if n not in needed:
            unit[n] = earliest if earliest >= 0 else final
        else:
            first, last = needed[n]
            unit[n] = first if first == last else earliest
    return unit


def _merged(pieces: Iterable[_Piece]) -> list[_Piece]:
    """Joins neighbours that are no blocks. Only the first piece can be a preamble."""
    merged: list[_Piece] = []
    for piece in pieces:
        if not piece.nodes:
            continue
        if piece.kind == "block" or not merged:
            merged.append(piece)
        elif merged[-1].kind == "rest":
            merged[-1] = _Piece("rest", sorted([*merged[-1].nodes, *piece.nodes]))
        else:
            merged.append(_Piece("rest", piece.nodes))
    return merged


def _named(pieces: Sequence[_Piece]) -> list[Part]:
    """Numbers the blocks, and names the other pieces by where they stand."""
    last = max((i for i, p in enumerate(pieces) if p.kind == "block"), default=len(pieces))
    parts: list[Part] = []
    run, at, repeat = -1, 0, None
    for i, piece in enumerate(pieces):
        if piece.kind == "block":
            run, at = (run, at + 1) if piece.repeat is repeat else (run + 1, 0)
            repeat = piece.repeat
            parts.append(Part("block", run, at, piece.nodes))
        elif piece.kind == "preamble":
            parts.append(Part("preamble", None, None, piece.nodes))
        else:
            parts.append(Part("tail" if i > last else "stem" if run < 0 else "between", None, None, piece.nodes))
    return parts
