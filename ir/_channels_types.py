"""What a channel group is: plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qc.ir.quant import read_weight

__all__ = ["ACTIONS", "ChannelGroup", "Family", "Forbidden", "Input", "Use"]

ACTIONS = ("permute", "scale", "sign", "shift", "orthogonal", "split", "merge")
"""What may act on a group. ``scale`` is by positive factors, ``sign`` by -1 and 1; a signed scale needs both."""


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """Why an action is not admitted.

    Attributes:
        operator: The operator that forbids it (as in the table of the analysis).
        node: Name of one such node; empty at the boundary of the graph.
        why: The reason.
    """

    operator: str
    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.operator} forbids it: {self.why}"


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A weight, at one place where it is read, as a member of a group or family.

    Attributes:
        node: The reader.
        slot: Which of its inputs; the input may be absent (a bias that could be added).
        role: ``producer`` (its rows make the channels), ``consumer``, ``gain`` (multiplies), ``bias`` (adds), ``mean``,
            ``deviation`` (of a batch normalization).
        shape: The shape in which the weight must be viewed.
        axes: Its axes that carry channels, in that view.
        index: Index in the group of each position along those axes, flattened; -1 for positions of other groups.
        power: The weight is multiplied by this power of the group's positive factors.
        parity: And by this power of its signs.
        lead: Whether it is tied to the channels themselves, and not to those of a product with others: what a shift
            changes.
        centred: Whether it makes channels whose mean a LayerNormalization removes.
    """

    node: ir.Node
    slot: int
    role: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    index: np.ndarray
    power: float = 0.0
    parity: int = 0
    lead: bool = False
    centred: bool = False

    @property
    def value(self) -> ir.Value | None:
        """The weight; None if absent."""
        return self.node.inputs[self.slot] if self.slot < len(self.node.inputs) else None

    @property
    def name(self) -> str:
        """Name of the stored weight, of the value if it is computed, or of the reader if it is absent."""
        value = self.value
        weight = read_weight(value)
        return weight.name if weight is not None else str(value.name if value is not None else self.node.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Channels that keep one index.

    Attributes:
        id: Number in the graph.
        width: Number of channels.
        uses: Every weight in it; what is permuted, rotated or copied.
        blocks: Block of each channel: permutations and rotations stay within blocks. One block if all zero.
        forbids: The actions on families that are not admitted.
        turns: Whether rotations must not reflect a block (of two channels): what commutes with a rotary embedding.
        centred: LayerNormalization nodes whose mean a rotation must first move into the producers.
        carriers: The activations, with the axes that carry channels.
        state: Names of cache inputs whose content an action changes.
    """

    id: int
    width: int
    uses: tuple[Use, ...]
    blocks: np.ndarray
    forbids: Mapping[str, Forbidden]
    turns: bool
    centred: tuple[ir.Node, ...]
    carriers: Mapping[ir.Value, tuple[int, ...]]
    state: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """One degree of freedom.

    Attributes:
        id: Number in the graph.
        kind: ``stream`` (read by norms), ``normalized`` (written by one), ``key``, ``value``, ``features`` (of a
            convolution), ``hidden``, ``output``, ``heads`` (of attention, as channels of their own).
        family: What it is part of.
        uses: The weights that a scale or shift changes.
        cells: Cell of each channel: factors are equal within a cell. All different if there is no such tie.
        admits: The admitted actions, of `ACTIONS`.
        forbids: The others, with the reason.
        carriers: The activations that carry it.
        interior: Operators that the carriers pass, by name.
    """

    id: int
    kind: str
    family: Family
    uses: tuple[Use, ...]
    cells: np.ndarray
    admits: frozenset[str]
    forbids: Mapping[str, Forbidden]
    carriers: tuple[ir.Value, ...]
    interior: tuple[str, ...]

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.family.width

    @property
    def producers(self) -> tuple[Use, ...]:
        """Weights whose output channels these are."""
        return self._of("producer")

    @property
    def consumers(self) -> tuple[Use, ...]:
        """Weights whose input channels these are."""
        return self._of("consumer")

    @property
    def parameters(self) -> tuple[Use, ...]:
        """Vectors: gains, biases, statistics."""
        return self._of("gain", "bias", "mean", "deviation")

    def _of(self, *roles: str) -> tuple[Use, ...]:
        return tuple(u for u in self.uses if u.role in roles and u.value is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """Some input channels of one product, for the coverage."""

    use: Use
    share: float
    forbidden: Forbidden | None
