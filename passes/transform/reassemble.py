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
from qc.passes.quantize._copies import spread
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

_TOKENS = {"token": 4096, "tensor": 16384}
"""Which channels are outliers, and how large, shows late. A static range must also hold what comes later: channels that
are split by the largest values of 4096 tokens are clipped by those of others, which costs what splitting gains."""


@dataclasses.dataclass(frozen=True)
class Reassemble(BlockPass):
    """Splits each channel into ``T = ceil(max|x| / theta)`` equal parts, and merges as many others as were added.

    The parts ``x / T`` are read by equal columns of the weights, which is exact; no channel is larger than theta. To
    keep the width, channels ``i`` and ``j`` become their mean, and their columns the sum, corrected by least squares on
    samples. Those are merged for which the error of the outputs is least without the correction,
    ``|x_i - x_j|^2 |W_i - W_j|^2 / 4``, the sum over all layers that read them.

    ``theta`` is searched for each channel group: the one of the least error of the outputs of its layers on samples of
    their input, with weights and activations rounded as the passes behind this one will do it. Copies come from half of
    the samples, errors from the other half. No threshold at all is among the candidates, so by this measure no group
    becomes worse. Where the width grows, the error must shrink by a larger factor.

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

    @property
    def calibration_tokens(self) -> int:
        return _TOKENS[self.granularity]

    def needs(self, model: ir.Model) -> list[Request]:
        return requests(model, STATISTICS, _obstacle)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        quantizers = Quantizers.parse(self.spec_name(), self.weights, self.bits, self.granularity, context.threads)

        def change(inputs: Inputs, columns: Columns, facts: dict[str, object]) -> Site:
            folds = _folds(inputs)
            matching = _matched(inputs, columns) if self.merge and not folds else None
            choice = _Choice(inputs, columns, self.ratio, matching, align=folds)
            if self.theta != "search":
                return _apply(model, inputs, choice.of(float(self.theta)), context.store, facts | {"theta": self.theta})
            trial = Trial(inputs.products, columns[Statistic.SAMPLES], quantizers)
            theta, found = _search(_Choice(inputs, trial.columns, self.ratio, matching, align=folds), trial)
            # More data may have shown larger channels, which want more copies.
            theta = max(theta, choice.least())
            if np.isfinite(theta):
                found["theta"] = theta
            return _apply(model, inputs, choice.of(theta), context.store, facts | found)

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


def _matched(inputs: Inputs, columns: Columns) -> Matching:
    matching = Matching(inputs.group.width)
    for use, x in zip(inputs.products, columns[Statistic.SAMPLES], strict=True):
        order = np.argsort(use.index)
        matching.add(x[:, order], stored(use, _EVERYTHING)[:, order])
    return matching


class _Choice:
    """The reassemblies of one channel group."""

    def __init__(
        self, inputs: Inputs, columns: Columns, ratio: float, matching: Matching | None, *, align: bool
    ) -> None:
        self._maxima = inputs.magnitude(columns)
        self._most = int(ratio * inputs.group.width)
        self._matching, self._align = matching, align
        pairs = zip(inputs.products, columns[Statistic.SAMPLES], strict=True)
        distinct = {use.node.inputs[0]: x[:, np.argsort(use.index)] for use, x in pairs}
        self._samples = np.concatenate(list(distinct.values())) if matching is not None else None

    def of(self, theta: float) -> Reassembly | None:
        """The reassembly at a threshold; None if it would take too many copies."""
        copies = self._copies(theta)
        if copies.sum() - len(copies) > self._most:
            return None
        clusters = np.arange(int(copies.sum())) if self._matching is None else self._matching.clusters(copies)
        return None if clusters is None else Reassembly(copies, clusters, self._samples)

    def least(self) -> float:
        """The smallest threshold that does not take too many copies."""
        low, high = 0.0, float(self._maxima.max())
        while high > 0 and high - low > 1e-3 * high:
            middle = (low + high) / 2
            enough = self._copies(middle).sum() - len(self._maxima) <= self._most
            low, high = (low, middle) if enough else (middle, high)
        return high

    def candidates(self) -> Iterable[tuple[float, Reassembly]]:
        """Thresholds with different numbers of copies, the largest first, as long as there are not too many copies."""
        largest, known = float(self._maxima.max()), {len(self._maxima)}
        if largest == 0:
            return
        for theta in np.geomspace(largest, self.least(), _CANDIDATES + 1)[1:]:
            action = self.of(theta)
            if action is not None and int(action.copies.sum()) not in known:
                known.add(int(action.copies.sum()))
                yield float(theta), action

    def _copies(self, theta: float) -> np.ndarray:
        copies = np.maximum(np.ceil(np.minimum(self._maxima / theta, 2**31)), 1).astype(int)
        if self._align and np.any(copies > 1):
            while copies.sum() % _ALIGNED:
                copies[np.argmax(self._maxima / copies)] += 1
        return copies


def _search(choice: _Choice, trial: Trial) -> tuple[float, dict[str, float]]:
    """The threshold of the least error, and that error relative to the one without any."""
    before = trial.error(lambda use, product: product)
    best, lowest, theta = before, before, np.inf
    for candidate, action in choice.candidates():
        error = trial.error(lambda use, product, action=action: _reassembled(use, product, action))
        cost = error * len(action.sizes) / len(action.copies)  # what grows takes time
        if cost < lowest:
            best, lowest, theta = error, cost, candidate
    return theta, {"error": round(best / before, 4) if before > 0 else 1.0}


def _reassembled(use: Use, product: Product, action: Reassembly) -> Product:
    order = np.argsort(use.index)

    def made(numbers: np.ndarray) -> np.ndarray:
        return action.made(numbers.T[order], 1.0).T.astype(np.float32)

    low, high = (made(bound[None])[0] for bound in (product.low, product.high))
    columns = action.read(product.rows.T[order]).T.astype(np.float32)
    return Product(made(product.x), low, high, columns, _offsets(action))


def _offsets(action: Reassembly) -> np.ndarray:
    """What splits the codes of copies: channels of one source that are not merged, and so have equal columns."""
    sources, first = action.sources, np.unique(action.clusters(), return_index=True)[1]
    labels = np.where(action.sizes == 1, sources[first], len(sources) + np.arange(len(first)))
    return spread(np.unique(labels, return_inverse=True)[1]).astype(np.float32)


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
