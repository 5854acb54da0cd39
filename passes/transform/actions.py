"""What can be done to the channels of a group: plain data, checked against the group before anything is touched."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from qc.ir.channels import ChannelGroup
from qc.ir.errors import InputError

__all__ = ["Action", "Kronecker", "Merge", "Orthogonal", "Permute", "Rotation", "Scale", "Shift", "Split"]

_ORTHOGONAL = 1e-8
"""Largest deviation of ``A.T @ A`` from the identity: what float64 leaves of a product of a few rotations."""


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
class Split(Action):
    """``copies[i]`` channels ``z[i] / copies[i]`` in place of ``z[i]``: the first at ``i``, the others behind all.

    Attributes:
        copies: ``[width]``, integers from 1.
    """

    copies: np.ndarray
    name: ClassVar[str] = "split"

    def is_identity(self) -> bool:
        return bool(np.all(np.asarray(self.copies) == 1))

    def check(self, group: ChannelGroup) -> None:
        copies = np.asarray(self.copies)
        if copies.shape != (group.width,) or copies.dtype.kind not in "iu" or np.any(copies < 1):
            raise InputError(f"Expected {group.width} integers from 1 as numbers of copies, found {copies.shape}.")

    @property
    def sources(self) -> np.ndarray:
        """The old channel of each new one."""
        width = len(self.copies)
        return np.concatenate([np.arange(width), np.repeat(np.arange(width), np.asarray(self.copies) - 1)])


@dataclasses.dataclass(frozen=True, eq=False)
class Merge(Action):
    """One channel, the mean of the members, in place of each cluster. Changes the function, unless members are equal.

    ``z'[c] = mean(z[i] for assignment[i] == c)``; consumers get the sum of the members' columns.

    Attributes:
        assignment: ``[width]``, clusters numbered from 0 without gaps.
    """

    assignment: np.ndarray
    name: ClassVar[str] = "merge"

    def is_identity(self) -> bool:
        return bool(np.array_equal(self.assignment, np.arange(len(self.assignment))))

    def check(self, group: ChannelGroup) -> None:
        held = np.asarray(self.assignment)
        if held.shape != (group.width,) or not np.array_equal(np.unique(held), np.arange(held.max() + 1)):
            raise InputError(f"Expected a cluster for each of {group.width} channels, numbered from 0 without gaps.")


def _determinant(matrix: np.ndarray, inside: np.ndarray) -> float:
    return float(np.linalg.det(matrix[np.ix_(inside, inside)]))


def _vector(group: ChannelGroup, numbers: np.ndarray, what: str) -> np.ndarray:
    vector = np.asarray(numbers, np.float64)
    if vector.shape != (group.width,) or not np.all(np.isfinite(vector)):
        raise InputError(f"Expected {group.width} finite {what} for group {group.id}, found shape {vector.shape}.")
    return vector
