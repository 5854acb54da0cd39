"""Makes the output channels of weights equally large, so that one scale serves them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import ChannelGroup, Use, find_groups
from qc.ir.quant import read_weight
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, check_patterns
from qc.passes.transform._bounds import Bounds
from qc.passes.transform._inputs import Inputs, centred, unwritable
from qc.passes.transform.actions import Scale
from qc.passes.transform.fold import fold

__all__ = ["Equalize"]

_ROUNDS = 40
"""Most rounds over all groups; a chain of n layers needs about n."""

_SETTLED = 1e-3
"""Largest change of a factor, relative, in a round after which none is needed."""

_LEAST_GAIN = 1e-3
"""What the channels of a group must gain in evenness to be scaled: less is rounding."""


@dataclasses.dataclass(frozen=True)
class Equalize(Pass):
    """Scales channels between weights such that each is as large where it is made as where it is read.

    With ``r1`` and ``r2`` the largest magnitudes of channel i in the weights that make it and that read it, each
    relative to the largest of its weight, the channel is multiplied by

        ``s_i = sqrt(r2_i / r1_i)``    so that    ``r1_i s_i = r2_i / s_i``

    which goes into rows and bias of the first and, inverted, into columns of the second. Where only one side has a
    weight (the other is the gain of a norm, or another vector), that side becomes even. A depthwise filter is both.
    Groups that share a weight influence each other, so this is repeated until nothing changes. It is for weights with
    one scale per tensor, of convolutional networks with ReLU above all.

    An activation that is clipped to one range for all channels (ReLU6) lets no factors through. It gets a range for
    each channel, if that lets its channels become more even: ``Clip`` becomes ``Max`` or ``Relu``, and ``Min``, which
    is an operator more; the report counts them.

    Left alone, with the reason: channels whose factors something lets not through, quantized weights, and weights that
    others read. Large biases are not absorbed by the next layer, as the source does where no input on calibration data
    is below zero: that is no identity.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721,
    section 4.1. There, groups are pairs of layers; here, all that a residual connection ties together.

    Attributes:
        bounds: Whether to give clipped activations a range for each channel.
        exclude: Regular expressions of layers or weights whose groups are left as they are.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    bounds: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_patterns(self.exclude)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        exclusion = dataclasses.replace(context, exclude=self.exclude)
        bounds = Bounds(model, context.store)
        if self.bounds:
            bounds.widen()
        sites: list[Site] = []
        work: list[_Group] = []
        weights = _Weights()
        for group in find_groups(model):
            found = _Group.of(group, weights)
            if found is None:
                continue
            reason = found.obstacle(exclusion)
            if reason:
                sites.append(Site(found.name, Outcome.SKIPPED, reason))
            else:
                work.append(found)
        _settle(work, context)
        sites.extend([item.fold(model, context) for item in work])
        kept = bounds.settle({v for item in work if item.changed for v in item.group.carriers})
        notes = [f"{kept} clipped activations have a range for each channel now, which is an operator more each."]
        notes = notes if kept else []
        dialect.sync_functions(model)
        return Result.of(model, sites, notes)


class _Weights:
    """The largest magnitude of each channel of every weight, as its factors change. Kernels count as one element."""

    def __init__(self) -> None:
        self._held: dict[ir.Value, np.ndarray] = {}

    def of(self, use: Use) -> np.ndarray:
        """The magnitudes of a weight, viewed as the use wants it; writable."""
        value = use.value
        assert value is not None
        inner = len(use.shape) - _kernel(use)
        if value not in self._held:
            weight = read_weight(value)
            assert weight is not None
            numbers = np.abs(weight.raw().astype(np.float32)).reshape(*use.shape[:inner], -1).max(axis=-1)
            self._held[value] = numbers.astype(np.float64)
            weight.release()
        return self._held[value].reshape(use.shape[:inner])


def _kernel(use: Use) -> int:
    """How many axes at the end of the view of a weight are those of a kernel."""
    return len(use.value.shape) - 2 if use.node.op_type == "Conv" else 0


@dataclasses.dataclass(eq=False)
class _Group:
    """A channel group, seen from its weights.

    Attributes:
        group: The channels.
        uses: The weights that a quantizer may store: those of products and convolutions.
        factors: What the channels are multiplied with, so far.
        before: How even the channels of the weights were.
        changed: Whether they were scaled in the end.
    """

    group: ChannelGroup
    uses: Sequence[Use]
    weights: _Weights
    factors: np.ndarray
    before: float = 0.0
    changed: bool = False

    @classmethod
    def of(cls, group: ChannelGroup, weights: _Weights) -> _Group | None:
        """None if no weight takes up factors of the group."""
        uses = [u for u in group.uses if u.value is not None and u.slot == 1 and _is_product(u.node)]
        if group.kind == "heads" or not uses:
            return None
        return cls(group, uses, weights, np.ones(group.width))

    @property
    def name(self) -> str:
        """Of the first weight."""
        use = self.uses[0]
        return use.node.metadata_props.get("qc.scope") or use.name

    def obstacle(self, context: Context) -> str:
        """Why nothing can be done; empty if something can."""
        if "scale" not in self.group.admits:
            return str(self.group.forbids["scale"])
        names = [n for u in self.uses for n in (u.node.metadata_props.get("qc.scope", ""), u.name)]
        pattern = context.excluded(*names)
        if pattern is not None:
            return f"excluded by {pattern}"
        return unwritable(Inputs(self.group, tuple(self.uses)), self.uses)

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """The share of each channel of the largest of its weight: where factors multiply, and where they divide."""
        multiplied, divided = (self._shares([u for u in self.uses if u.power * sign > 0]) for sign in (1, -1))
        return multiplied, divided

    def evenness(self) -> float:
        """The mean share that channels have of the largest of their weight: 1 if all are equal."""
        shares = [r for r in self.ranges() if r.any()]
        return float(np.mean([r[r > 0].mean() for r in shares])) if shares else 1.0

    def step(self) -> float:
        """Scales the channels so that both sides are equally even; returns the largest change of a logarithm."""
        multiplied, divided = self.ranges()
        sides = [r for r in (multiplied, divided) if r.any()]
        used = np.logical_and.reduce([r > 0 for r in sides]) if sides else np.zeros(self.group.width, bool)
        powers = [max((abs(u.power) for u in self.uses if u.power * s > 0), default=0.0) for s in (1, -1)]
        logs = [np.log(np.where(r > 0, r, 1.0)) for r in (divided, multiplied)]
        change = centred(np.exp((logs[0] - logs[1]) / sum(powers)), used)
        before, self.factors = self.factors, centred(self.factors * change, used)
        change = self.factors / before
        for use in self.uses:
            held = self.weights.of(use)
            spread = [n if a in use.axes else 1 for a, n in enumerate(held.shape)]
            held *= np.where(use.index >= 0, change[use.index], 1.0).reshape(spread) ** use.power
        return float(np.abs(np.log(change)).max())

    def fold(self, model: ir.Model, context: Context) -> Site:
        """Carries it out."""
        facts: dict[str, object] = {
            "group": self.group.id,
            "weights": list(dict.fromkeys(u.name for u in self.uses)),
            "evenness_before": round(self.before, 4),
            "evenness": round(self.evenness(), 4),
        }
        if self.evenness() < self.before + _LEAST_GAIN and np.abs(np.log(self.factors)).max() < _LEAST_GAIN:
            return Site(self.name, Outcome.MATCHED, "its channels are as even as they can be", facts)
        folded = fold(model, self.group, Scale(self.factors), context.store)
        self.changed = True
        if folded.state:
            facts["state"] = list(folded.state)
        return Site(self.name, Outcome.CHANGED, "", facts)

    def _shares(self, uses: Iterable[Use]) -> np.ndarray:
        found = np.zeros(self.group.width)
        for use in uses:
            held = self.weights.of(use)
            rows = np.moveaxis(held, use.axes, range(len(use.axes))).reshape(len(use.index), -1).max(axis=1)
            inside = use.index >= 0
            np.maximum.at(found, use.index[inside], rows[inside] / max(float(held.max()), 1e-30))
        cells = np.zeros(self.group.width)
        np.maximum.at(cells, self.group.cells, found)
        return cells[self.group.cells]


def _settle(work: Sequence[_Group], context: Context) -> None:
    for item in work:
        item.before = item.evenness()
    for number in range(_ROUNDS):
        context.progress(number, _ROUNDS, "all groups")
        if max((item.step() for item in work), default=0.0) < _SETTLED:
            return


def _is_product(node: ir.Node) -> bool:
    return dialect.is_op(node, "Linear") or (node.domain == "" and node.op_type in ("Conv", "MatMul"))
