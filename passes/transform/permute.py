"""Orders channels by importance, so that groups of weights hold equals."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.channels import Use, find_groups
from qc.ir.errors import InputError, UnsupportedError
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, check_patterns
from qc.passes.statistics import Request, Statistic
from qc.passes.transform._inputs import Inputs, linear_readers, unreadable, unwritable
from qc.passes.transform.actions import Permute
from qc.passes.transform.fold import fold

__all__ = ["PermuteChannels"]

_MEASURES = {"moment": Statistic.SECOND_MOMENT, "magnitude": Statistic.ABS_MAX}


@dataclasses.dataclass(frozen=True)
class PermuteChannels(Pass):
    """Puts the channels first that count most, in every weight that makes or reads them; the function stays the same.

    The order is that of the second moment of the inputs of linear layers (act-order: what a rounding error costs) or of
    their largest magnitude (salient first). Channels that move together get one order; where several inputs are read,
    such as those of all layers on a residual stream, the sum decides, each measured in units of its mean. Channels stay
    within blocks that must not mix, such as heads.

    This changes nothing for scales per tensor, token or output channel. Weights with a scale for each group of columns
    have other groups then: of channels of like importance.

    Left alone, with the reason: channels whose order something on the way fixes, and weights that are quantized or
    shared with other layers.

    Source: GPTQ (act-order), arXiv 2210.17323; PTQ1.61 (salient channels first), arXiv 2502.13179, section 3.2; made a
    permutation of weights here, so that no index is needed at run time.

    Attributes:
        by: What counts: ``moment`` or ``magnitude``.
        exclude: Regular expressions of layers or weights; channels that one of them reads keep their order.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    by: str = "moment"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.by not in _MEASURES:
            raise InputError(f"Expected permute-channels by {' or '.join(_MEASURES)}, found {self.by!r}.")
        check_patterns(self.exclude)

    def needs(self, model: ir.Model) -> list[Request]:
        found = [i for i in _families(model) if "permute" in i.group.admits and not unreadable(i)]
        return [self._request(use) for inputs in found for use in inputs.products]

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = dataclasses.replace(context or Context(), exclude=self.exclude)
        return Result.of(model, [self._site(model, inputs, context) for inputs in _families(model)])

    def _request(self, use: Use) -> Request:
        return Request(_MEASURES[self.by], use.node.inputs[0])

    def _site(self, model: ir.Model, inputs: Inputs, context: Context) -> Site:
        name, group = inputs.names[0], inputs.group
        pattern = context.excluded(*inputs.names, *(use.name for use in inputs.products))
        measured = [context.statistics.get(self._request(use)) for use in inputs.products]
        reason = str(group.forbids.get("permute", "")) or unreadable(inputs) or unwritable(inputs, group.family.uses)
        if not reason and pattern is not None:
            reason = f"excluded by {pattern}"
        if not reason and any(m is None for m in measured):
            reason = "no statistics of its input: no calibration inputs could be made that the model runs on"
        facts: dict[str, object] = {"channels": group.width, "products": inputs.names}
        if reason:
            return Site(name, Outcome.SKIPPED, reason, facts)
        order = _order(inputs, [m for m in measured if m is not None])
        try:
            folded = fold(model, group, Permute(order), context.store)
        except UnsupportedError as error:
            return Site(name, Outcome.SKIPPED, str(error), facts)
        if not folded.modified:
            return Site(name, Outcome.MATCHED, "its channels are in order", facts)
        return Site(name, Outcome.CHANGED, "", facts)


def _families(model: ir.Model) -> list[Inputs]:
    """Each family of channels that linear layers read, as one of its groups with all those layers."""
    found: dict[int, Inputs] = {}
    for group in find_groups(model):
        readers = linear_readers(group)
        if readers and group.kind != "heads":
            known = found.setdefault(group.family.id, Inputs(group, ()))
            found[group.family.id] = Inputs(known.group, (*known.products, *readers))
    return list(found.values())


def _order(inputs: Inputs, measured: list[np.ndarray]) -> np.ndarray:
    importance = np.zeros(inputs.group.width)
    for use, numbers in zip(inputs.products, measured, strict=True):
        one = Inputs(inputs.group, (use,)).greatest([numbers])
        if one.any():
            importance += one / one.mean()
    blocks, order = inputs.group.family.blocks, np.arange(inputs.group.width)
    for block in np.unique(blocks):
        inside = np.flatnonzero(blocks == block)
        order[inside] = inside[np.argsort(-importance[inside], kind="stable")]
    return order
