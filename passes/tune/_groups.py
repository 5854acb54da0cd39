"""Which channel groups of a quantized model can have learned factors."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from qc.ir.channels import ROUNDING, ChannelGroup, find_groups
from qc.ir.quant import read_weight
from qc.passes.base import Context, Outcome, Site
from qc.passes.transform._inputs import Inputs, linear_readers, read_elsewhere
from qc.passes.tune._stored import is_vector

__all__ = ["transformable"]


def transformable(model: ir.Model, context: Context, learned: Collection[ir.Value]) -> tuple[list[Inputs], list[Site]]:
    """The groups whose factors change what is rounded, and the sites of those whose factors something forbids.

    Factors of a weight's rows go into its scales, so they matter where a learned weight reads the channels, or where
    activations that carry them are rounded. Channels are followed through this rounding as if it did nothing.

    Args:
        model: The model.
        context: Says which nodes may be touched.
        learned: The weights that are learned, as they are read.
    """
    found: list[Inputs] = []
    sites: list[Site] = []
    for group in find_groups(model, rounded=True):
        inputs = Inputs(group, linear_readers(group) or group.producers)
        if group.kind == "heads" or not inputs.products or not context.covers(inputs.products[0].node):
            continue
        if not ROUNDING & set(group.interior) and not any(use.value in learned for use in group.consumers):
            continue
        reason = _obstacle(group, context, learned)
        if reason:
            sites.append(Site(inputs.names[0], Outcome.SKIPPED, reason, inputs.facts))
        else:
            found.append(inputs)
    return found, sites


def _obstacle(group: ChannelGroup, context: Context, learned: Collection[ir.Value]) -> str:
    if "scale" not in group.admits:
        return str(group.forbids["scale"])
    if not all(context.covers(use.node) for use in group.uses):
        return "its channels pass from one block to another, and blocks are worked on one at a time"
    uses = [use for use in group.uses if use.value is not None]
    other = next((u for u in uses if u.value not in learned and not is_vector(read_weight(u.value))), None)
    return f"{other.name} is not learned" if other is not None else read_elsewhere(group, uses)
