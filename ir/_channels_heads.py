"""Heads of attention as channels of their own: whole heads may change places, where single channels may not.

With ``r`` query heads per key head, key heads move with all their query heads (queries, keys, values and outputs),
and the query heads of one key head may change places among themselves (queries and outputs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir._channels_solve import Solution
from qc.ir._channels_trace import Limit
from qc.ir._channels_types import ACTIONS, ChannelGroup, Family, Forbidden, Use
from qc.ir._channels_view import dims_of

__all__ = ["head_groups"]

_WHOLE = "RotaryEmbedding:rotated"
"""The one line that forbids permutations of single channels and lets whole heads pass: all heads turn alike."""

_ONLY = Forbidden("Attention", "", "heads only change places")


def head_groups(
    attentions: Sequence[tuple[ir.Node, np.ndarray, np.ndarray, np.ndarray]],
    solution: Solution,
    families: Mapping[int, Family],
    limits: Callable[[int], Sequence[Limit]],
    numbers: tuple[int, int],
) -> Iterator[ChannelGroup]:
    """Yields the groups of heads of every attention whose channels belong to it alone.

    Args:
        attentions: Node, and channels of queries ``[n_q, d]``, keys and values ``[n_kv, d]``.
        solution: Families of the channels.
        families: Families that have weights, by their number in `solution`.
        limits: What the channels of a family met.
        numbers: The first free number of a family and of a group.
    """
    counts: dict[int, int] = {}
    found = []
    for node, queries, keys, values in attentions:
        touched = sorted({int(f) for ids in (queries, keys, values) for f in np.unique(solution.family[ids])})
        for number in touched:
            counts[number] = counts.get(number, 0) + 1
        found.append((node, queries, keys, values, touched))
    family_id, group_id = numbers
    for node, queries, keys, values, touched in found:
        if any(counts[f] > 1 or f not in families for f in touched):
            continue
        if any("permute" in x.rule.forbids and x.key != _WHOLE for f in touched for x in limits(f)) or _masked(node):
            continue
        head_of = {f: _heads(solution, families[f].width, f, (keys, values)) for f in touched}
        if any(h is None for h in head_of.values()):
            continue
        parts = [families[f] for f in touched]
        count, repeat = len(keys), len(queries) // len(keys)
        whole = [_by_head(u, head_of[f]) for f in touched for u in families[f].uses]
        single = [_by_query_head(u, head_of[f], repeat) for f in touched for u in families[f].uses]
        choices = [(count, whole, np.zeros(count, int))]
        if repeat > 1 and all(u is not None for u in single):
            blocks = np.repeat(np.arange(count), repeat)
            choices.append((len(queries), [u for u in single if u.index.max(initial=-1) >= 0], blocks))
        for width, uses, blocks in choices:
            if width < 2 or (len(np.unique(blocks)) == width):
                continue
            yield _group(group_id, family_id, width, uses, blocks, parts)
            family_id, group_id = family_id + 1, group_id + 1


def _group(
    number: int, family: int, width: int, uses: list[Use], blocks: np.ndarray, parts: list[Family]
) -> ChannelGroup:
    forbids = {a: _ONLY for a in ACTIONS if a != "permute"}
    state = tuple(dict.fromkeys(s for part in parts for s in part.state))
    carriers = {v: axes for part in parts for v, axes in part.carriers.items()}
    held = Family(family, width, tuple(uses), blocks, forbids, False, (), carriers, state)
    return ChannelGroup(
        number,
        "heads",
        held,
        tuple(uses),
        np.arange(width),
        frozenset({"permute"}),
        forbids,
        tuple(carriers),
        ("Attention",),
    )


def _masked(node: ir.Node) -> bool:
    """Whether the mask may tell heads apart."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    dims = dims_of(mask)
    if mask is None:
        return False
    return dims is None or (len(dims) > 2 and dims[-3] != 1)


def _heads(solution: Solution, width: int, family: int, heads: Sequence[np.ndarray]) -> np.ndarray | None:
    """Key head of each channel of a family; None if some channel belongs to none or to several."""
    labels = np.full(width, -1)
    for ids in heads:
        mask = solution.family[ids] == family
        head = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)[mask]
        index = solution.index[ids][mask]
        labels[index] = head
        if np.any(labels[index] != head):
            return None
    return labels if labels.min(initial=0) >= 0 else None


def _by_head(use: Use, head_of: np.ndarray) -> Use:
    return dataclasses.replace(use, index=np.where(use.index >= 0, head_of[use.index], -1))


def _by_query_head(use: Use, head_of: np.ndarray, repeat: int) -> Use | None:
    """The use with query heads as channels, if it has some: it holds each channel once per query head."""
    inside = np.flatnonzero(use.index >= 0)
    counts = np.bincount(use.index[inside], minlength=len(head_of))
    index = np.full(len(use.index), -1)
    if np.all(counts == 1):
        return dataclasses.replace(use, index=index)
    if np.any(counts != repeat):
        return None
    order = inside[np.argsort(use.index[inside], kind="stable")].reshape(-1, repeat)
    index[order] = head_of[:, None] * repeat + np.arange(repeat)
    return dataclasses.replace(use, index=index)
