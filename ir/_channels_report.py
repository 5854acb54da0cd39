"""Channel groups for people: rows of a table, coverage, a drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from qc.ir._channels_types import ACTIONS, ChannelGroup, Input, Use

if TYPE_CHECKING:
    from qc.ir.channels import ChannelGroups

_LISTED = 6
"""Names that the drawing spells out per box."""


def describe(groups: ChannelGroups) -> list[dict]:
    """One row per group; the keys below are a contract."""
    return [
        {
            "id": g.id,
            "kind": g.kind,
            "width": g.width,
            "family": g.family.id,
            "structure": structure(g),
            "producers": [_use(u) for u in g.producers],
            "consumers": [_use(u) for u in g.consumers],
            "parameters": [_use(u) for u in g.parameters],
            "interior": list(g.interior),
            "state": list(g.family.state),
            "admits": [a for a in ACTIONS if a in g.admits],
            "forbids": {a: {"operator": f.operator, "node": f.node, "why": f.why} for a, f in g.forbids.items()},
        }
        for g in groups
    ]


def structure(group: ChannelGroup) -> str:
    """In words: blocks that permutations and rotations keep, cells that share a factor."""
    blocks, cells = np.unique(group.family.blocks).size, np.unique(group.cells).size
    parts = []
    if blocks > 1:
        parts.append(f"{blocks} blocks of {group.width // blocks}")
    if cells < group.width:
        parts.append(f"factors equal in {cells} cells of {group.width // cells}")
    return "; ".join(parts)


def coverage(inputs: Iterable[Input]) -> dict:
    """Weights of products by what happens to positive factors of their input channels.

    Returns:
        ``{"weights", "scalable", "explained", "by_operator": {operator: weights}, "products": [{"weight", "shape",
        "scalable", "operator", "why"}]}``; the shares are of all weights.
    """
    total = scalable = explained = 0.0
    by_operator: dict[str, float] = {}
    products = []
    for item in inputs:
        size = math.prod(item.use.shape) * item.share
        total += size
        if item.forbidden is None:
            scalable += size
        else:
            explained += size if item.forbidden.operator else 0.0
            name = item.forbidden.operator or "unknown"
            by_operator[name] = by_operator.get(name, 0.0) + size
        products.append(
            {
                "weight": item.use.name,
                "shape": list(item.use.shape),
                "share": item.share,
                "scalable": item.forbidden is None,
                "operator": item.forbidden.operator if item.forbidden is not None else "",
                "why": item.forbidden.why if item.forbidden is not None else "",
            }
        )
    return {
        "weights": round(total),
        "scalable": scalable / total if total else 1.0,
        "explained": (scalable + explained) / total if total else 1.0,
        "by_operator": {k: round(v) for k, v in sorted(by_operator.items())},
        "products": products,
    }


def drawing(groups: ChannelGroups) -> str:
    """A Mermaid flowchart: a box per group, an arrow per weight from the channels it reads to those it makes."""
    lines = ["flowchart TD"]
    makers: dict[str, list[int]] = {}
    for g in groups:
        admitted = ", ".join(a for a in ACTIONS if a in g.admits) or "nothing"
        lines.append(f'  g{g.id}["{g.id}: {g.kind} × {g.width}<br/>{admitted}"]')
        for use in g.producers if g.kind != "heads" else ():
            makers.setdefault(use.name, []).append(g.id)
    arrows: dict[tuple[int, int], list[str]] = {}
    for g in groups:
        for use in g.consumers if g.kind != "heads" else ():
            for target in makers.get(use.name, ()):
                arrows.setdefault((g.id, target), []).append(use.name)
    for (source, target), names in sorted(arrows.items()):
        text = ", ".join(names[:_LISTED]) + (f", +{len(names) - _LISTED}" if len(names) > _LISTED else "")
        lines.append(f'  g{source} -->|"{text}"| g{target}')
    for first, second in _tied(groups):
        lines.append(f"  g{first} -.-|one index| g{second}")
    return "\n".join(lines) + "\n"


def _tied(groups: ChannelGroups) -> list[tuple[int, int]]:
    """Neighbours within each family."""
    held: dict[int, list[int]] = {}
    for g in groups:
        held.setdefault(g.family.id, []).append(g.id)
    return [(ids[0], i) for ids in held.values() for i in ids[1:]]


def _use(use: Use) -> dict:
    """A weight, and the range of positions along its axes if it is not all of them."""
    inside = np.flatnonzero(use.index >= 0)
    row = {"name": use.name, "axes": list(use.axes), "role": use.role, "power": use.power}
    if inside.size < use.index.size:
        row["positions"] = [int(inside[0]), int(inside[-1]) + 1]
    return row
