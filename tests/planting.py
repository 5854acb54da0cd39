"""Plants outlier channels into a model without changing what it computes, so that the truth is known."""

from __future__ import annotations

import numpy as np

from qc.ir.channels import ChannelGroup, find_groups
from qc.ir.model import Model
from qc.ir.store import Store
from qc.passes.transform.actions import Scale
from qc.passes.transform.fold import fold

__all__ = ["plant_outliers"]


def plant_outliers(
    model: Model,
    factor: float,
    channels: int,
    rng: np.random.Generator,
    *,
    kinds: tuple[str, ...] = ("normalized",),
    store: Store | None = None,
    dtype: type[np.floating] = np.float32,
) -> dict[int, np.ndarray]:
    """Multiplies `channels` random channels of every group of the given kinds by `factor`, and undoes it behind.

    Exactly function-preserving: what the activations gain, the weights that read them lose. Powers of two leave every
    product bit-identical.

    Args:
        model: A canonical model; changed in place.
        factor: 10 to 300 is what large language models show.
        channels: Channels per group; at most a quarter of its cells.
        rng: Chooses the channels.
        kinds: Kinds of groups (see `qc.ir.channels.ChannelGroup.kind`): ``normalized``, ``value``, ``hidden``,
            ``features``, ``key``.
        store: Where the new weights are written; a temporary one if None.
        dtype: Element type of the new weights.

    Returns:
        The planted channels of each group, by the group's number.
    """
    store = store if store is not None else Store()
    planted = {}
    for group in find_groups(model):
        if group.kind not in kinds or "scale" not in group.admits:
            continue
        factors = np.ones(group.width)
        factors[_chosen(group, channels, rng)] = factor
        fold(model, group, Scale(factors), store, dtype=dtype)
        planted[group.id] = np.flatnonzero(factors != 1.0)
    return planted


def _chosen(group: ChannelGroup, channels: int, rng: np.random.Generator) -> np.ndarray:
    cells = np.unique(group.cells)
    count = min(channels, max(1, len(cells) // 4))
    return np.isin(group.cells, rng.choice(cells, count, replace=False))
