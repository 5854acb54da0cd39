"""Draws actions on channel groups at random, and compares two models as their user would: cache included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qc.ir.channels import ChannelGroup
from qc.ir.execute import Executor
from qc.ir.model import Model
from qc.ir.probe import probe_inputs
from qc.passes.transform.actions import Action, Merge, Orthogonal, Permute, Scale, Shift, Split

__all__ = ["NAMES", "difference", "random_action", "rotation", "run"]

NAMES = ("permute", "scale", "sign", "shift", "orthogonal", "split")
"""The actions that keep the function; a merge does not."""


def rotation(blocks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix that does not mix blocks, and reflects none."""
    matrix = np.zeros((len(blocks), len(blocks)))
    for block in np.unique(blocks):
        inside = np.flatnonzero(blocks == block)
        turn = np.linalg.qr(rng.standard_normal((len(inside), len(inside))))[0]
        turn[:, 0] *= np.sign(np.linalg.det(turn))
        matrix[np.ix_(inside, inside)] = turn
    return matrix


def random_action(group: ChannelGroup, name: str, rng: np.random.Generator) -> Action:
    """An action of that name that fits the structure of the group."""
    width, blocks = group.width, group.family.blocks
    match name:
        case "permute":
            order = np.arange(width)
            for block in np.unique(blocks):
                inside = np.flatnonzero(blocks == block)
                order[inside] = rng.permutation(inside)
            return Permute(order)
        case "scale":
            return Scale(np.exp(rng.uniform(-2, 2, width))[group.cells])
        case "sign":
            return Scale(rng.choice([-1.0, 1.0], width)[group.cells])
        case "shift":
            return Shift(rng.standard_normal(width))
        case "orthogonal":
            return Orthogonal(rotation(blocks, rng))
        case "split":
            return Split(rng.integers(1, 4, width))
        case "merge":
            return Merge(np.minimum(np.arange(width), width - 2))
    raise ValueError(name)


def run(model: Model, precision: str = "float64") -> list[dict[str, np.ndarray]]:
    """The outputs on probe inputs, in torch. A decoder makes a cache from nothing and then a step on its own cache.

    Caches are left out of the results: what they hold is the model's own business.
    """
    import torch

    signature = model.signature
    past = {p.name: p.role.replace("past_", "present_") + f".{p.index}" for p in signature.inputs if "past_" in p.role}
    present = {p.name: f"{p.role}.{p.index}" for p in signature.outputs if "present_" in p.role}
    executor = Executor(model, dtype=getattr(torch, precision))
    sizes = {"batch": 2, "seq": 5, "past": 0, "total": 5} if past else None
    first = probe_inputs(model, sizes=sizes)[0]
    results = [executor(first)]
    if past:
        step = probe_inputs(model, seed=1, sizes={"batch": 2, "seq": 1, "past": 5, "total": 6})[0]
        by_role = {role: results[0][name] for name, role in present.items()}
        results.append(executor(step | {name: by_role[role] for name, role in past.items()}))
    return [{n: t.numpy() for n, t in r.items() if n not in present} for r in results]


def difference(before: list[Mapping[str, np.ndarray]], after: list[Mapping[str, np.ndarray]]) -> float:
    """The largest deviation, relative to the largest entry of its output."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        for name, expected in old.items():
            scale = max(float(np.abs(expected).max()), 1e-30)
            deviation = float(np.abs(new[name] - expected).max()) / scale
            worst = max(worst, float("inf") if np.isnan(deviation) else deviation)
    return worst
