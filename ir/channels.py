"""Channel groups: which channels of a network move together, and what may act on them without changing its function.

A *family* is a set of channels of weights and activations that must keep one index: the residual stream with the
outputs of all norms that read it, the hidden channels of a gated layer. Permutations, rotations, copies and merges act
on a family. A *group* is one degree of freedom of scale within a family: a vector of factors that some weights take up
and others undo. `qc.passes.transform.fold` carries out an action.

The analysis reads the graph alone. What an operator lets through is one line of `qc.ir._channels_table`; a channel
that meets an operator without a line is left as it is, and the operator is named.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qc.ir import _channels_ops, _channels_shapes  # noqa: F401  they register the tracers
from qc.ir._channels_build import Builder
from qc.ir._channels_solve import solve
from qc.ir._channels_table import ROUNDING
from qc.ir._channels_trace import Trace
from qc.ir._channels_types import ACTIONS, ChannelGroup, Family, Forbidden, Input, Use

__all__ = ["ACTIONS", "ROUNDING", "ChannelGroup", "ChannelGroups", "Family", "Forbidden", "Use", "find_groups"]


class ChannelGroups(Sequence[ChannelGroup]):
    """All groups of a graph, in the order of their first producer. Valid until the graph changes."""

    def __init__(self, groups: Sequence[ChannelGroup], families: Sequence[Family], inputs: Sequence[Input]) -> None:
        self._groups = tuple(groups)
        self.families = tuple(families)
        self._inputs = tuple(inputs)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, position):  # type: ignore[override]
        return self._groups[position]

    def of(self, node: ir.Node) -> tuple[ChannelGroup, ...]:
        """The groups of the input channels of a matrix product or convolution."""
        return tuple(g for g in self._groups if g.kind != "heads" and any(u.node is node for u in g.consumers))

    def describe(self) -> list[dict]:
        """One row per group, in JSON values; see the command ``qc inspect --groups``."""
        from qc.ir._channels_report import describe

        return describe(self)

    def coverage(self) -> dict:
        """How many weights of products read channels that admit positive factors, and what forbids the others."""
        from qc.ir._channels_report import coverage

        return coverage(self._inputs)

    def drawing(self) -> str:
        """The groups and the weights between them as a Mermaid flowchart."""
        from qc.ir._channels_report import drawing

        return drawing(self)


def find_groups(model: ir.Model, *, rounded: bool = False) -> ChannelGroups:
    """Finds the channel groups of the main graph of a canonical model with shapes. No weight is read.

    A key-value cache (inputs of role ``past_*`` with an output ``present_*``) belongs to the model: actions may change
    what it holds, as long as a cache written by the model is only read by the same model.

    Time grows linearly with the nodes.

    Args:
        model: The model.
        rounded: Whether to look through what rounds activations, as if it did nothing: actions are then exact but for
            this rounding.
    """
    trace = Trace(model.graph, rounded=rounded)
    return ChannelGroups(*Builder(trace, solve(trace)).groups())
