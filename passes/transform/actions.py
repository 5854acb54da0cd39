"""What can be done to the channels of a group: plain data, checked against the group before anything is touched."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from qc.ir.channels import ChannelGroup
from qc.ir.errors import InputError

__all__ = [
    "Action",
    "Kronecker",
    "Lift",
    "Merge",
    "Orthogonal",
    "Permute",
    "Reassemble",
    "Rotation",
    "Scale",
    "Shift",
    "Split",
]

_ORTHOGONAL = 1e-8
"""Largest deviation of ``A.T @ A`` from the identity: what float64 leaves of a product of a few rotations."""

_DAMPING = 0.05
"""What the squares of merged channels grow by, so that few samples do not decide alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Action:
    """An action on the channels ``z`` of a group. Subclasses say which."""

    name: ClassVar[str] = ""

    def is_identity(self) -> bool:
        """Whether nothing is to be done."""
        raise TypeError(f"Bug: {type(self).__name__} does not say when it is the identity")

    def needs(self) -> tuple[str, ...]:
        """The actions of `qc.ir.channels.ACTIONS` that the group must admit."""
        return (self.name,)

    def check(self, group: ChannelGroup) -> None:
        """Raises InputError if the numbers do not fit the group."""


@dataclasses.dataclass(frozen=True, eq=False)
class Permute(Action):
    """``z'[i] = z[order[i]]``. Within blocks, if the family has blocks.

    Attributes:
        order: ``[width]``, each index once.
    """

    order: np.ndarray
    name: ClassVar[str] = "permute"

    def is_identity(self) -> bool:
        return bool(np.array_equal(self.order, np.arange(len(self.order))))

    def check(self, group: ChannelGroup) -> None:
        if not np.array_equal(np.sort(self.order), np.arange(group.width)):
            raise InputError(
                f"Expected each of {group.width} channels once in the order, found {list(self.order)[:8]}..."
            )
        if np.any(group.family.blocks[self.order] != group.family.blocks):
            raise InputError(f"Group {group.id} has blocks, and the order moves a channel from one to another.")


@dataclasses.dataclass(frozen=True, eq=False)
class Scale(Action):
    """``z' = z * factors``.

    Attributes:
        factors: ``[width]``, nonzero, equal within the cells of the group; negative ones flip signs.
    """

    factors: np.ndarray
    name: ClassVar[str] = "scale"

    def is_identity(self) -> bool:
        return bool(np.all(np.asarray(self.factors) == 1))

    def needs(self) -> tuple[str, ...]:
        factors = np.asarray(self.factors)
        sized = ("scale",) if np.any(np.abs(factors) != 1) else ()
        return sized + (("sign",) if np.any(factors < 0) else ())

    def check(self, group: ChannelGroup) -> None:
        factors = _vector(group, self.factors, "factors")
        if not np.all(factors):
            raise InputError(
                f"Expected nonzero factors for group {group.id}, found 0 at {np.flatnonzero(factors == 0)[:4]}."
            )
        first = np.zeros(group.width)
        first[group.cells[::-1]] = factors[::-1]
        if np.any(first[group.cells] != factors):
            raise InputError(f"Group {group.id} needs equal factors within its cells; use the maximum of each cell.")


@dataclasses.dataclass(frozen=True, eq=False)
class Shift(Action):
    """``z' = z + offsets``.

    Attributes:
        offsets: ``[width]``.
    """

    offsets: np.ndarray
    name: ClassVar[str] = "shift"

    def is_identity(self) -> bool:
        return not np.any(self.offsets)

    def check(self, group: ChannelGroup) -> None:
        _vector(group, self.offsets, "offsets")


class Rotation(Action):
    """``z' = z @ Q``, with ``Q.T @ Q = 1``. Block-diagonal, if the family has blocks. Subclasses say which Q."""

    name: ClassVar[str] = "orthogonal"

    def turn(self, rows: np.ndarray) -> np.ndarray:
        """``Q.T @ rows``, for rows ``[width, n]`` in float64: what becomes of weights that make or read channels."""
        raise TypeError(f"Bug: {type(self).__name__} does not say what it is")


@dataclasses.dataclass(frozen=True, eq=False)
class Orthogonal(Rotation):
    """A rotation by any orthogonal matrix.

    Attributes:
        matrix: ``[width, width]``.
    """

    matrix: np.ndarray

    def is_identity(self) -> bool:
        return bool(np.array_equal(self.matrix, np.eye(len(self.matrix))))

    def check(self, group: ChannelGroup) -> None:
        matrix, width = np.asarray(self.matrix, np.float64), group.width
        if matrix.shape != (width, width) or np.abs(matrix.T @ matrix - np.eye(width)).max() > _ORTHOGONAL:
            raise InputError(f"Expected an orthogonal matrix {width} × {width} in float64, found shape {matrix.shape}.")
        blocks = group.family.blocks
        if np.any(matrix[blocks[:, None] != blocks]):
            raise InputError(f"Group {group.id} has blocks; expected a block-diagonal matrix.")
        if group.family.turns and any(_determinant(matrix, blocks == b) < 0 for b in np.unique(blocks)):
            raise InputError(
                f"Group {group.id} passes a rotary embedding; expected rotations of pairs, not reflections."
            )

    def turn(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix, np.float64).T @ rows


@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker(Rotation):
    """A rotation by ``diag(signs) (F_1 x F_2 x ...)`` in each block: a product with it takes the sum of their sizes.

    Attributes:
        signs: ``[width]``, -1 or 1.
        factors: Orthogonal matrices in float64, whose sizes multiply to that of a block.
        blocks: Block of each channel, ``[width]``.
    """

    signs: np.ndarray
    factors: tuple[np.ndarray, ...]
    blocks: np.ndarray

    def is_identity(self) -> bool:
        return bool(np.all(self.signs == 1)) and all(np.array_equal(f, np.eye(len(f))) for f in self.factors)

    def check(self, group: ChannelGroup) -> None:
        _vector(group, self.signs, "signs")
        size = math.prod(len(f) for f in self.factors)
        if np.any(np.abs(self.signs) != 1) or np.any(np.unique(self.blocks, return_counts=True)[1] != size):
            raise InputError(f"Expected signs, and factors that multiply to the size of a block; found {size} in one.")
        if any(np.abs(f.T @ f - np.eye(len(f))).max() > _ORTHOGONAL for f in self.factors):
            raise InputError("Expected orthogonal factors in float64.")
        pairs = np.unique(np.stack([group.family.blocks, self.blocks]), axis=1).shape[1]
        if pairs != len(np.unique(self.blocks)) or group.family.turns:
            raise InputError(f"Group {group.id} has blocks that these of {size} channels do not fit into.")

    def turn(self, rows: np.ndarray) -> np.ndarray:
        order = np.argsort(self.blocks, kind="stable")
        turned = (rows * self.signs[:, None])[order]
        size = math.prod(len(f) for f in self.factors)
        for factor in self.factors:
            size //= len(factor)
            turned = np.matmul(factor.T, turned.reshape(-1, len(factor), size * rows.shape[1]))
        result = np.empty(rows.shape)
        result[order] = turned.reshape(rows.shape)
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class Lift(Action):
    """Other channels in their place: copies that share the value of one, means of several. Subclasses say which.

    `counts` channels ``z[i] / counts[i]`` come in place of ``z[i]``, the first at ``i``, the others behind all. Then
    each cluster of these becomes one channel, their mean, and consumers get the sum of the members' columns.
    """

    def counts(self) -> np.ndarray:
        """How many copies come in place of each channel, ``[width]``, integers from 1."""
        raise TypeError(f"Bug: {type(self).__name__} does not say how channels are copied")

    def clusters(self) -> np.ndarray:
        """The cluster of each copy, ``[sum of counts]``, numbered from 0 without gaps."""
        raise TypeError(f"Bug: {type(self).__name__} does not say how channels are joined")

    @property
    def sources(self) -> np.ndarray:
        """The old channel of each copy."""
        everything = np.arange(len(self.counts()))
        return np.concatenate([everything, np.repeat(everything, self.counts() - 1)])

    @property
    def sizes(self) -> np.ndarray:
        """The number of members of each cluster."""
        return np.bincount(self.clusters())

    def is_identity(self) -> bool:
        return bool(np.all(self.counts() == 1)) and np.array_equal(self.clusters(), np.arange(len(self.clusters())))

    def needs(self) -> tuple[str, ...]:
        split = ("split",) if np.any(self.counts() != 1) else ()
        merge = ("merge",) if np.any(self.sizes != 1) else ()
        return split + merge or ("permute",)

    def check(self, group: ChannelGroup) -> None:
        copies = self.counts()
        if copies.shape != (group.width,) or copies.dtype.kind not in "iu" or np.any(copies < 1):
            raise InputError(f"Expected {group.width} integers from 1 as numbers of copies, found {copies.shape}.")
        held = np.asarray(self.clusters())
        if held.shape != (copies.sum(),) or not np.array_equal(np.unique(held), np.arange(held.max() + 1)):
            raise InputError(f"Expected a cluster for each of {copies.sum()} channels, numbered from 0 without gaps.")

    def made(self, rows: np.ndarray, power: float) -> np.ndarray:
        """The new channels ``[clusters, ...]`` of what holds this power of the old ones ``[width, ...]``."""
        return self._joined(rows, power) / self.sizes[:, None]

    def read(self, rows: np.ndarray, power: float = -1.0) -> np.ndarray:
        """The new columns ``[clusters, ...]`` of what reads the channels, which takes this power of their factors."""
        return self._joined(rows, power + 1.0)  # a consumer adds all copies up

    def _joined(self, rows: np.ndarray, power: float) -> np.ndarray:
        sources = self.sources
        copied = rows[sources] * (1.0 / self.counts().astype(np.float64)[sources, None]) ** power
        order = np.argsort(self.clusters(), kind="stable")
        return np.add.reduceat(copied[order], np.cumsum(self.sizes) - self.sizes, axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Split(Lift):
    """``copies[i]`` channels ``z[i] / copies[i]`` in place of ``z[i]``: the first at ``i``, the others behind all.

    Attributes:
        copies: ``[width]``, integers from 1.
    """

    copies: np.ndarray
    name: ClassVar[str] = "split"

    def counts(self) -> np.ndarray:
        return np.asarray(self.copies)

    def clusters(self) -> np.ndarray:
        return np.arange(int(np.sum(self.copies)))


@dataclasses.dataclass(frozen=True, eq=False)
class Merge(Lift):
    """One channel, the mean of the members, in place of each cluster. Changes the function, unless members are equal.

    ``z'[c] = mean(z[i] for assignment[i] == c)``; consumers get the sum of the members' columns.

    Attributes:
        assignment: ``[width]``, clusters numbered from 0 without gaps.
    """

    assignment: np.ndarray
    name: ClassVar[str] = "merge"

    def counts(self) -> np.ndarray:
        return np.ones(len(self.assignment), int)

    def clusters(self) -> np.ndarray:
        return np.asarray(self.assignment)


@dataclasses.dataclass(frozen=True, eq=False)
class Reassemble(Lift):
    """Splits channels and merges others in one step, such that the width may stay the same.

    With samples X of the channels, X' of the new ones, and sums of columns W', consumers get for the merged channels m

        ``W'_m + (X W^T - X' W'^T)^T X'_m (X'_m^T X'_m + D)^-1``

    which brings their outputs closest to what they were, but for a small diagonal D.

    Attributes:
        copies: ``[width]``, integers from 1.
        assignment: ``[sum of copies]``, the cluster of each copy.
        samples: Rows of the channels, ``[S, width]``; None to take the sums.
    """

    copies: np.ndarray
    assignment: np.ndarray
    samples: np.ndarray | None = None
    name: ClassVar[str] = "reassemble"

    def counts(self) -> np.ndarray:
        return np.asarray(self.copies)

    def clusters(self) -> np.ndarray:
        return np.asarray(self.assignment)

    def read(self, rows: np.ndarray, power: float = -1.0) -> np.ndarray:
        columns = super().read(rows, power)
        merged = np.flatnonzero(self.sizes > 1)
        if self.samples is None or power != -1.0 or not len(merged):
            return columns
        samples = np.asarray(self.samples, np.float64)
        new = self.made(samples.T, 1.0).T
        joined = new[:, merged]
        gram = joined.T @ joined
        gram[np.diag_indices(len(gram))] *= 1 + _DAMPING
        gram[np.diag_indices(len(gram))] += np.finfo(np.float64).tiny
        missing = joined.T @ (samples @ rows - new @ columns)
        columns[merged] += np.linalg.solve(gram, missing)
        return columns


def _determinant(matrix: np.ndarray, inside: np.ndarray) -> float:
    return float(np.linalg.det(matrix[np.ix_(inside, inside)]))


def _vector(group: ChannelGroup, numbers: np.ndarray, what: str) -> np.ndarray:
    vector = np.asarray(numbers, np.float64)
    if vector.shape != (group.width,) or not np.all(np.isfinite(vector)):
        raise InputError(f"Expected {group.width} finite {what} for group {group.id}, found shape {vector.shape}.")
    return vector
