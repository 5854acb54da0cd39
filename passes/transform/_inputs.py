"""Where factors can be moved between the input of matrix products and their weights, and the loop that moves them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import ChannelGroup, Use, find_groups
from qc.ir.quant import read_weight
from qc.ir.store import Store
from qc.passes.base import Context, Outcome, Result, Site
from qc.passes.statistics import Request, Statistic
from qc.passes.transform.actions import Scale
from qc.passes.transform.fold import Folded, fold

__all__ = [
    "Columns",
    "Inputs",
    "centred",
    "linear_readers",
    "operators",
    "read_elsewhere",
    "requests",
    "scale_inputs",
    "unreadable",
    "unscalable",
    "unscalable_at_run_time",
    "unseparable",
    "unwritable",
    "visit",
]

_STRONGEST = 1e4
"""Largest factor, and the inverse of the smallest: between them float32 keeps all its digits after a fold."""

Columns = Mapping[Statistic, Sequence[np.ndarray]]
"""Statistics of the inputs of products: for each product an array over the columns of its weight."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """A channel group, seen from the matrix products that read it.

    Attributes:
        group: The channels.
        products: The weights ``[N, K]`` of linear layers that read them.
    """

    group: ChannelGroup
    products: tuple[Use, ...]

    @property
    def names(self) -> list[str]:
        """The products by the names that users know: module paths, else names of weights."""
        return [use.node.metadata_props.get("qc.scope") or use.name for use in self.products]

    @property
    def facts(self) -> dict[str, object]:
        """What a report says about any site."""
        return {"group": self.group.id, "kind": self.group.kind, "products": self.names}

    def largest(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """The maximum over everything that must share a factor: products, repeated columns, cells of the group.

        Args:
            columns: Non-negative numbers, for each product ``[K]``.

        Returns:
            ``[width of the group]``.
        """
        return self.tied(np.maximum(self.greatest(columns), 0.0))

    def magnitude(self, columns: Columns) -> np.ndarray:
        """The largest magnitude of each channel, from its minima and maxima: ``[width of the group]``."""
        bounds = zip(columns[Statistic.MIN], columns[Statistic.MAX], strict=True)
        return self.largest([np.maximum(-low, high) for low, high in bounds])

    def greatest(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """The maximum over products and repeated columns.

        Args:
            columns: For each product ``[K]``.

        Returns:
            ``[width of the group]``; 0 for channels that no product reads.
        """
        found = np.full(self.group.width, -np.inf)
        for use, numbers in zip(self.products, columns, strict=True):
            index = _index(use)
            np.maximum.at(found, index[index >= 0], numbers[index >= 0])
        return np.where(np.isfinite(found), found, 0.0)

    def tied(self, numbers: np.ndarray) -> np.ndarray:
        """The maximum over the cells of the group, of non-negative numbers ``[width of the group]``."""
        cells = np.zeros(self.group.width)
        np.maximum.at(cells, self.group.cells, numbers)
        return cells[self.group.cells]

    def spread(self, factors: np.ndarray, use: Use) -> np.ndarray:
        """The factor of each column of a product, ``[K]``; 1 at columns of other groups."""
        index = _index(use)
        return np.where(index >= 0, factors[index], 1.0)


Choice = Callable[[Inputs, Columns], tuple[np.ndarray, dict[str, object]]]
"""Returns the factor of each channel, for the weights, and facts for the report."""


Obstacle = Callable[[Inputs], str]
"""Says why a transform cannot act on a group; empty if it can."""

Change = Callable[[Inputs, Columns, dict[str, object]], Site]
"""Transforms a group and returns the site; gets facts for it."""


After = Callable[[Inputs, Columns, np.ndarray], Mapping[str, object]]
"""What else is done to a group after its channels were divided by these factors; returns facts."""


def requests(model: ir.Model, statistics: Sequence[Statistic], obstacle: Obstacle | None = None) -> list[Request]:
    """What to collect so that `scale_inputs`, or `visit` with this obstacle, knows these statistics."""
    found = [i for i in _inputs(model) if not (obstacle or unscalable)(i)]
    return [_request(use, s) for inputs in found for use in inputs.products for s in statistics]


def visit(
    model: ir.Model,
    context: Context,
    exclude: Sequence[str],
    statistics: Sequence[Statistic],
    obstacle: Obstacle,
    change: Change,
) -> Result:
    """Offers every channel group that a linear layer reads to a transform; each is a site.

    Args:
        model: Changed in place.
        context: Statistics and store.
        exclude: Regular expressions of products whose group is left alone.
        statistics: What `change` needs, of the input of each product.
        obstacle: Says which groups are left alone, beside those without statistics.
        change: Transforms a group.
    """
    sites: list[Site] = []
    exclusion = dataclasses.replace(context, exclude=tuple(exclude))
    found = _inputs(model, context)
    for done in range(len(found)):
        if _outdated(found[done]):
            found = _inputs(model, context)
        inputs = found[done]
        context.progress(done, len(found), inputs.names[0])
        columns = _columns(inputs, context, statistics)
        pattern = exclusion.excluded(*inputs.names, *(use.name for use in inputs.products))
        reason = obstacle(inputs)
        if not reason and not all(context.covers(u.node) for u in inputs.group.uses):
            reason = "its channels pass from one block to another, and blocks are worked on one at a time"
        if not reason and pattern is not None:
            reason = f"excluded by {pattern}"
        if not reason and columns is None:
            reason = "no statistics of its input: no calibration inputs could be made that the model runs on"
        facts = inputs.facts
        if reason or columns is None:
            sites.append(Site(inputs.names[0], Outcome.SKIPPED, reason, facts))
            continue
        sites.append(change(inputs, columns, facts))
    return Result.of(model, sites)


def scale_inputs(
    model: ir.Model,
    context: Context,
    exclude: Sequence[str],
    statistics: Sequence[Statistic],
    choose: Choice,
    *,
    obstacle: Obstacle | None = None,
    after: After | None = None,
) -> Result:
    """Divides the input channels of matrix products by factors and multiplies the weights by them.

    Every channel group that a linear layer reads is a site. Left alone, with the reason: groups that do not admit
    factors, or whose weights are quantized already or shared with another group. A cache that holds the channels of a
    group holds them scaled.

    Args:
        model: Changed in place; computes the same function.
        context: Statistics and store.
        exclude: Regular expressions of products whose group is left alone.
        statistics: What `choose` needs, of the input of each product.
        choose: Says by which factors.
        obstacle: Says which groups are left alone: `unscalable`, or `unscalable_at_run_time` to insert multiplications.
        after: What else to do to each group.
    """
    scaled: dict[ir.Node, np.ndarray] = {}

    def taken(inputs: Inputs) -> str:
        if any(np.any(scaled.get(u.node, False) & (_index(u) >= 0)) for u in inputs.products):
            return "its products were already scaled together with the other factor of their input"
        return (obstacle or unscalable)(inputs)

    def change(inputs: Inputs, columns: Columns, facts: dict[str, object]) -> Site:
        factors, chosen = choose(inputs, columns)
        changed = _fold(model, inputs, factors, context.store)
        more = after(inputs, columns, factors) if after is not None else {}
        facts |= {**chosen, **changed, **more}
        if not changed and not more:
            return Site(inputs.names[0], Outcome.MATCHED, "no factors are better than those it has", facts)
        for use in inputs.products:
            scaled[use.node] = scaled.get(use.node, False) | (_index(use) >= 0)
        return Site(inputs.names[0], Outcome.CHANGED, "", facts)

    return visit(model, context, exclude, statistics, taken, change)


def centred(factors: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Factors such that the largest is the inverse of the smallest, bounded; 1 for channels that are not used.

    A common factor of all channels changes no code of any quantizer.
    """
    result = np.ones(len(factors))
    if used.any():
        chosen = factors[used]
        result[used] = np.clip(chosen / np.sqrt(chosen.max() * chosen.min()), 1 / _STRONGEST, _STRONGEST)
    return result


def _fold(model: ir.Model, inputs: Inputs, factors: np.ndarray, store: Store) -> dict[str, object]:
    """Divides the channels by factors; returns facts, none if nothing changed."""
    runtime = "scale" not in inputs.group.admits
    power = -1.0 if runtime else inputs.products[0].power
    folded = fold(model, inputs.group, Scale(factors ** (1 / power)), store, runtime=runtime)
    if not folded.modified:
        return {}
    reach: dict[str, object] = {"smallest": float(factors.min()), "largest": float(factors.max())}
    if folded.added:
        reach["added"] = operators(folded)
    if folded.state:
        reach["state"] = list(folded.state)
    return reach


def operators(folded: Folded) -> list[dict[str, object]]:
    """The operators that a fold added, for the report."""
    return [{"operator": operator, "operations": cost} for operator, cost in folded.added]


def _inputs(model: ir.Model, context: Context | None = None) -> list[Inputs]:
    found = []
    for group in find_groups(model):
        products = linear_readers(group)
        if products and group.kind != "heads" and (context is None or context.covers(products[0].node)):
            found.append(Inputs(group, products))
    return found


def linear_readers(group: ChannelGroup) -> tuple[Use, ...]:
    """The weights ``[N, K]`` of linear layers that read the channels."""
    return tuple(u for u in group.consumers if dialect.is_op(u.node, "Linear") and 0 not in u.axes)


def _outdated(inputs: Inputs) -> bool:
    """Whether a weight has another size than when the group was found."""
    uses = inputs.group.family.uses if "split" in inputs.group.admits else inputs.group.uses
    return any(u.value is not None and math.prod(u.value.shape or ()) != math.prod(u.shape) for u in uses)


def unscalable(inputs: Inputs) -> str:
    """Why no factors can be moved into the weights that read the channels."""
    group, products = inputs.group, inputs.products
    if "scale" not in group.admits:
        return str(group.forbids["scale"])
    if len({use.power for use in products}) != 1 or products[0].power == 0:
        return "its products see different powers of the channels"
    return unreadable(inputs) or unwritable(inputs, (*group.producers, *group.consumers))


def unscalable_at_run_time(inputs: Inputs) -> str:
    """Why factors can neither be moved into weights nor multiplied with at run time."""
    if "scale" in inputs.group.admits:
        return unscalable(inputs)
    return unseparable(inputs) or unreadable(inputs) or unwritable(inputs, inputs.group.consumers)


def unseparable(inputs: Inputs) -> str:
    """Why no operator can be inserted in front of everything that reads the channels; empty if it can."""
    if any(not np.array_equal(np.sort(use.index), np.arange(inputs.group.width)) for use in inputs.products):
        return "its products read other channels too"
    if len(inputs.products) != len(inputs.group.consumers):
        return "other operators than linear layers read its channels"
    return ""


def unreadable(inputs: Inputs) -> str:
    """Why no statistics of the channels can be collected; empty if they can."""
    if any(u.node.inputs[0].dtype != ir.DataType.FLOAT or u.node.inputs[0].shape is None for u in inputs.products):
        return "its input is not a FLOAT tensor of known rank"
    return ""


def unwritable(inputs: Inputs, uses: Sequence[Use]) -> str:
    """Why some weights of the group cannot be changed; empty if they can."""
    for use in uses:
        weight = read_weight(use.value)
        if weight is not None and weight.format is not None:
            return f"{use.name} is quantized: put transforms in front of quantization"
    return read_elsewhere(inputs.group, uses)


def read_elsewhere(group: ChannelGroup, uses: Sequence[Use]) -> str:
    """Which of some weights something outside of the group reads too, as a reason; empty if none."""
    members = {(use.node, use.slot) for use in (*group.uses, *uses)}
    for use in uses:
        weight = read_weight(use.value)
        if weight is None:
            continue
        # Through another decode node or directly: whoever else reads the numbers.
        direct = [pair for pair in weight.data.uses() if pair[0] is not weight.value.producer()]
        if any(tuple(pair) not in members for pair in (*weight.value.uses(), *direct)):
            return f"{use.name} is also read elsewhere, and would have to be stored twice"
    return ""


def _index(use: Use) -> np.ndarray:
    """The channel of each column of a product's weight, ``[K]``; -1 at columns of other groups."""
    shape = use.shape[1:]
    spread = [size if axis in use.axes else 1 for axis, size in enumerate(shape, 1)]
    return np.broadcast_to(use.index.reshape(spread), shape).reshape(-1)


def _request(use: Use, statistic: Statistic) -> Request:
    return Request(statistic, use.node.inputs[0])


def _columns(inputs: Inputs, context: Context, statistics: Sequence[Statistic]) -> Columns | None:
    found: dict[Statistic, list[np.ndarray]] = {s: [] for s in statistics}
    for statistic, arrays in found.items():
        for use in inputs.products:
            array = context.statistics.get(_request(use, statistic))
            if array is None:
                return None
            arrays.append(array)
    return found
