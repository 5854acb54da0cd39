"""Splits outlier channels, and merges others so that the width stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.channels import Use
from qc.ir.errors import InputError
from qc.ir.store import Store
from qc.passes.base import BlockPass, Context, Contract, Lossy, Outcome, Result, Site, check_patterns
from qc.passes.statistics import Request, Statistic
from qc.passes.transform._inputs import Columns, Inputs, operators, requests, unreadable, unseparable, unwritable, visit
from qc.passes.transform._matching import Matching
from qc.passes.transform._trial import STATISTICS, Product, Quantizers, Trial, stored
from qc.passes.transform.actions import Reassemble as Reassembly
from qc.passes.transform.fold import fold

__all__ = ["Reassemble"]

_CANDIDATES = 24
"""Thresholds tried, evenly spaced on a logarithmic scale."""

_ALIGNED = 16
"""Widths that grow become a multiple of this, which kernels want."""

_EVERYTHING = 1 << 62


@dataclasses.dataclass(frozen=True)
class Reassemble(BlockPass):
    """Splits each channel into ``T = ceil(max|x| / theta)`` equal parts, and merges as many others as were added.

    The parts ``x / T`` are read by equal columns of the weights, which is exact; no channel is larger than theta. To
    keep the width, channels ``i`` and ``j`` become their mean, and their columns the sum. Those are merged for which
    the error of the outputs is least, ``|x_i - x_j|^2 |W_i - W_j|^2 / 4``, the sum over all layers that read them.

    ``theta`` is searched for each channel group: the one of the least error of the outputs of its layers on samples of
    their input, with weights and activations rounded as the passes behind this one will do it. No threshold at all is
    among the candidates, so by this measure no group becomes worse. Where the width grows, the error must shrink by a
    larger factor.

    Where the channels are rows of a projection, or the linear side of a gate, these take up the parts, no operator is
    added, and the width grows, since a mean of products is no product. Behind a norm, channels are gathered at run
    time; the factors ``1 / T`` and those of the means go into its gain and bias.

    Left alone, with the reason: channels of attention heads, channels that cannot be copied, quantized weights.

    Source: QLLM, arXiv 2310.08041, sections 4.1 and 4.2, without its trained low-rank terms. The correction by least
    squares is ours.

    Attributes:
        theta: The largest magnitude that a channel may have, or ``search``.
        merge: Whether to keep the width where operators are inserted; without it, the function stays the same.
        ratio: The most channels to add, as a share of the width.
        bits: Bits that activations will have.
        granularity: What will share a range of them: ``tensor`` or ``token``.
        weights: Format that weights will have, such as ``int8`` or ``uint4:g32``.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Lossy()

    theta: float | str = "search"
    merge: bool = True
    ratio: float = 0.2
    bits: int = 8
    granularity: str = "token"
    weights: str = "int4"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.theta, float) and self.theta > 0
        if not number and self.theta != "search":
            raise InputError(f"Expected a positive number or 'search' as theta of reassemble, found {self.theta!r}.")
        if not 0 < self.ratio <= 0.5:
            raise InputError(f"Expected a ratio above 0 and up to 0.5 for reassemble, found {self.ratio}.")
        Quantizers.parse(self.spec_name(), self.weights, self.bits, self.granularity)
        check_patterns(self.exclude)

    @property
    def sequential(self) -> bool:
        return True  # samples of the inputs of all layers at once would take much memory

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, STATISTICS, _obstacle)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        quantizers = Quantizers.parse(self.spec_name(), self.weights, self.bits, self.granularity, context.threads)

        def change(inputs: Inputs, columns: Columns, facts: dict[str, object]) -> Site:
            folds = _folds(inputs)
            choice = _Choice(inputs, columns, quantizers, self.ratio, join=self.merge and not folds, align=folds)
            action, found = choice.search() if self.theta == "search" else choice.of(float(self.theta))
            return _apply(model, inputs, action, context.store, facts | found)

        return visit(model, context, self.exclude, STATISTICS, _obstacle, change)


def _obstacle(inputs: Inputs) -> str:
    group = inputs.group
    if group.kind in ("value", "key"):
        return "its channels belong to attention heads, which must keep their width"
    uses = group.family.uses if _folds(inputs) else group.uses
    return unseparable(inputs) or unreadable(inputs) or unwritable(inputs, uses)


def _folds(inputs: Inputs) -> bool:
    """Whether weights can take up copies of the channels."""
    return {"split", "scale"} <= inputs.group.admits


class _Choice:
    """The reassembly of one channel group."""

    def __init__(
        self, inputs: Inputs, columns: Columns, quantizers: Quantizers, ratio: float, *, join: bool, align: bool
    ) -> None:
        self._inputs, self._columns, self._quantizers = inputs, columns, quantizers
        low, high = (columns[s] for s in (Statistic.MIN, Statistic.MAX))
        self._maxima = inputs.largest([np.maximum(-a, b) for a, b in zip(low, high, strict=True)])
        self._most = int(ratio * inputs.group.width)
        self._matching = self._matched() if join else None
        self._samples = np.concatenate([x[:, np.argsort(u.index)] for u, x in self._distinct()]) if join else None
        self._align = align

    def _distinct(self) -> Iterable[tuple[Use, np.ndarray]]:
        """The products with samples of their input, once for each value that they read."""
        pairs = zip(self._inputs.products, self._columns[Statistic.SAMPLES], strict=True)
        return {use.node.inputs[0]: (use, x) for use, x in pairs}.values()

    def of(self, theta: float) -> tuple[Reassembly | None, dict[str, object]]:
        """The reassembly at a threshold; None if it would take too many copies."""
        copies = self._copies(theta)
        enough = copies.sum() - len(copies) <= self._most
        return self._action(copies) if enough else None, {"theta": theta}

    def search(self) -> tuple[Reassembly, dict[str, object]]:
        """The reassembly of the least error."""
        trial = Trial(self._inputs.products, self._columns, self._quantizers)
        before = trial.error(lambda use, product: product)
        best, lowest, theta = before, before, np.inf
        chosen = self._action(np.ones(len(self._maxima), int))
        assert chosen is not None
        for candidate, copies in self._candidates():
            action = self._action(copies)
            if action is None:
                continue
            error = trial.error(lambda use, product, action=action: _reassembled(use, product, action))
            cost = error * len(action.sizes) / len(copies)  # what grows takes time
            if cost < lowest:
                best, lowest, theta, chosen = error, cost, candidate, action
        facts: dict[str, object] = {} if chosen.is_identity() else {"theta": theta}
        if before > 0:
            facts["error"] = round(best / before, 4)
        return chosen, facts

    def _candidates(self) -> Iterable[tuple[float, np.ndarray]]:
        """Thresholds with different numbers of copies, the largest first, as long as there are not too many copies."""
        largest = float(self._maxima.max())
        if largest == 0:
            return
        low, high = 0.0, largest
        while high - low > 1e-3 * largest:
            middle = (low + high) / 2
            enough = self._copies(middle).sum() - len(self._maxima) <= self._most
            low, high = (low, middle) if enough else (middle, high)
        known = {0}
        for theta in np.geomspace(largest, high, _CANDIDATES + 1)[1:]:
            copies = self._copies(theta)
            added = int(copies.sum()) - len(copies)
            if added not in known:
                known.add(added)
                yield float(theta), copies

    def _copies(self, theta: float) -> np.ndarray:
        copies = np.maximum(np.ceil(np.minimum(self._maxima / theta, 2**31)), 1).astype(int)
        if self._align and np.any(copies > 1):
            while (copies.sum()) % _ALIGNED:
                copies[np.argmax(self._maxima / copies)] += 1
        return copies

    def _action(self, copies: np.ndarray) -> Reassembly | None:
        clusters = np.arange(int(copies.sum())) if self._matching is None else self._matching.clusters(copies)
        return None if clusters is None else Reassembly(copies, clusters, self._samples)

    def _matched(self) -> Matching:
        matching = Matching(self._inputs.group.width)
        for use, x in zip(self._inputs.products, self._columns[Statistic.SAMPLES], strict=True):
            order = np.argsort(use.index)
            matching.add(x[:, order], stored(use, _EVERYTHING)[:, order])
        return matching


def _reassembled(use: Use, product: Product, action: Reassembly) -> Product:
    order = np.argsort(use.index)

    def made(numbers: np.ndarray) -> np.ndarray:
        return action.made(numbers.T[order], 1.0).T.astype(np.float32)

    low, high = (made(bound[None])[0] for bound in (product.low, product.high))
    return Product(made(product.x), low, high, action.read(product.rows.T[order]).T.astype(np.float32))


def _apply(model: ir.Model, inputs: Inputs, action: Reassembly | None, store: Store, facts: dict[str, object]) -> Site:
    name = inputs.names[0]
    if action is None:
        return Site(name, Outcome.SKIPPED, "its threshold takes more copies than the ratio or the width allows", facts)
    if action.is_identity():
        return Site(name, Outcome.MATCHED, "no channel is to be split", facts)
    folded = fold(model, inputs.group, action, store, runtime=True)
    copies, sizes = action.counts(), action.sizes
    facts |= {
        "split": int(np.count_nonzero(copies > 1)),
        "copies": int(copies.sum() - len(copies)),
        "merged": int(sizes[sizes > 1].sum()),
        "width": len(sizes),
        "added": operators(folded),
    }
    return Site(name, Outcome.CHANGED, "", facts)
