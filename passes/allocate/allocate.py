"""Gives every weight a format of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.model import Model, port_of
from qc.ir.probe import find_inputs
from qc.ir.quant import Format, Weight
from qc.ir.runtime import Session
from qc.passes.allocate._costs import TARGETS, relative_time
from qc.passes.allocate._program import Option, choose
from qc.passes.allocate._trial import Trial
from qc.passes.base import Context, Outcome, Pass, Result, Site, check_patterns
from qc.passes.quantize._fisher import FISHER_BYTES, FISHER_TOKENS, fisher
from qc.passes.quantize._sites import Kind, Use, weight_uses
from qc.passes.quantize.assign import assign, squared_errors
from qc.passes.quantize.weights import SHORTEST_GROUP, fitted
from qc.passes.statistics import Request, Statistic

__all__ = ["Allocate"]

_KINDS = frozenset({Kind.LINEAR, Kind.HEAD, Kind.VALUE, Kind.CACHED_VALUE, Kind.EMBEDDING})
_TRIED, _JUDGED = 512, 1024
"""Positions that single weights are tried on, and further ones that whole plans are judged on: a batch at least."""

_WINDOW = 256
"""Positions that a batch counts as which has no tokens."""

_FEEDBACK = 0.4
"""What is left of the error of a product if codes are chosen with feedback. In terms of what outputs lose it is 0.29
for a sentence encoder at 4 bits, 0.44 and 0.50 for builtin:tiny-llama at 4 and 2."""


@dataclasses.dataclass(frozen=True)
class Allocate(Pass):
    """Chooses a format for each weight such that the network loses least within a budget of bits.

    A unit u is a weight, an option c a format. With the second moments m of its input, quantizing it by range search
    adds the squared error ``E_uc = sum_nk m_k (w_nk - decoded_nk)^2`` to the outputs of the layer: the trace of
    ``d H d'`` with the diagonal of H, which is the whole of it in expectation, as nearest codes err independently. What
    that does to the network is taken to grow in proportion, and to add up:

        min  sum_u lambda_u sum_c E_uc x_uc     sum_c x_uc = 1     sum_uc bits_uc x_uc <= bits * elements

    (AdaQuant, arXiv 2006.10518, section 3.4; solved exactly). lambda_u is how far the outputs of the network move, in
    nats of divergence where there are logits, when u alone is quantized, over ``E_uc``: one forward pass per weight.
    The best plans are tried on further batches, and the one whose outputs move least is taken. This pass only writes
    the plan into the model; ``quantize-weights`` behind it follows it. Every stored bit counts: codes, scales, zero
    points, padding.

    With ``metric: fisher``, the error of an option is ``E_uc = sum_nk F_nk (w_nk - decoded_nk)^2`` with the diagonal
    Fisher information F of the network's loss (LQ-LoRA, arXiv 2311.12023): it already counts by what an error does to
    the network, lambda_u is one, and one backward pass takes the place of a forward pass per weight.

    If codes will be chosen with feedback (``assign: gptq``), products lose less than range search says, embeddings do
    not: ``E_uc`` of products counts 0.4 then, so embeddings get more of the bits.

    Left alone: what ``quantize-weights`` leaves alone, and convolutions.

    Attributes:
        bits: Average bits per weight, stored, over all weights with a plan.
        time: Limit on the time that products with weights take when one token is decoded, relative to that of uint4 in
            groups of 32 for all of them, from the table of `target`; 0 for none.
        formats: The choices, in full spelling.
        plans: Number of plans that are tried.
        metric: What an error counts: moment (and a forward pass per weight) or fisher, which needs torch.
        assign: How ``quantize-weights`` behind it will choose codes: search or gptq.
        target: Whose costs of formats `time` refers to.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    bits: float = 4.0
    time: float = 0.0
    formats: tuple[str, ...] = (
        "uint2:g32:f16",
        "uint2:g64:f16",
        "uint4:g16:f16",
        "uint4:g32:f16",
        "uint4:g64:f16",
        "uint4:g128:f16",
        "int4:g128:f16",
        "int4:g256:f16",
        "int8:g32:f16",
        "int8:g128:f16",
    )
    plans: int = 3
    metric: str = "moment"
    assign: str = "search"
    target: str = "ort-cpu"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits <= 0 or self.time < 0 or self.plans < 1 or not self.formats:
            raise InputError(
                f"Expected bits above 0, time of at least 0, and at least one format and one plan; found "
                f"{self.bits:g}, {self.time:g}, {len(self.formats)} and {self.plans}."
            )
        if self.assign not in ("search", "gptq"):
            raise InputError(f"Expected codes chosen by search or gptq, found {self.assign!r}.")
        if self.metric not in ("moment", "fisher"):
            raise InputError(f"Expected a metric of moment or fisher, found {self.metric!r}.")
        if self.target not in TARGETS:
            raise InputError(f"Expected a target among {', '.join(TARGETS)}, found {self.target!r}.")
        check_patterns(self.exclude)
        for text in self.formats:
            Format.parse(text)

    def needs(self, model: ir.Model) -> list[Request]:
        if self.metric == "fisher":
            return []
        found = (use.statistic(Statistic.SECOND_MOMENT) for use in weight_uses(model))
        return [request for request in found if request is not None]

    @property
    def calibration_tokens(self) -> int:
        return FISHER_TOKENS if self.metric == "fisher" else super().calibration_tokens

    @property
    def bytes_per_parameter(self) -> int:
        return FISHER_BYTES if self.metric == "fisher" else 0

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        units, sites = self._units(weight_uses(model), context)
        if not units:
            return Result.of(model, sites)
        tried, judged = _batches(model, context)
        information = self._information(model, units, context, tried)
        for done, unit in enumerate(units):
            context.progress(done, 2 * len(units), unit.name)
            unit.measure(context, information)
        weights = [self._left(unit) for unit in units] if information else self._weights(model, units, context, tried)
        options = [
            [
                Option(weight * o.error, {"bits": o.bits, "time": o.time} if self.time else {"bits": o.bits})
                for o in unit.options
            ]
            for unit, weight in zip(units, weights, strict=True)
        ]
        elements = sum(unit.elements for unit in units)
        budgets = {"bits": self.bits * elements}
        if self.time:
            budgets["time"] = self.time * sum(u.elements for u in units if u.multiplies)
        plans = choose(options, budgets, self.plans)
        notes, best = _judge(model, units, plans, context, judged)
        for unit, choice in zip(units, best, strict=True):
            unit.take(choice)
            sites.append(unit.site(choice))
        stored = sum(u.options[c].bits for u, c in zip(units, best, strict=True))
        return Result.of(model, sites, [f"{stored / elements:.4g} bits per weight, of {self.bits:g} allowed", *notes])

    def _units(self, uses: Sequence[Use], context: Context) -> tuple[list[_Unit], list[Site]]:
        """Groups the readers of each weight, and says which have no choice."""
        units: dict[ir.Value, _Unit] = {}
        sites = []
        own = dataclasses.replace(context, exclude=(*context.exclude, *self.exclude))
        for number, use in enumerate(uses):
            reason = use.reason or _obstacle(use)
            pattern = own.excluded(use.name, *([use.weight.name] if use.weight is not None else []))
            if pattern is not None:
                reason = f"excluded by {pattern}"
            if reason or use.weight is None:
                sites.append(Site(use.name, Outcome.SKIPPED, reason))
                continue
            units.setdefault(use.weight.data, _Unit()).add(number, use)
        for unit in units.values():
            unit.offer(self.formats, self.target if self.time else None)
        reason = "none of the formats has a kernel for it on the target"
        sites.extend(Site(u.name, Outcome.SKIPPED, reason) for u in units.values() if not u.options)
        return [u for u in units.values() if u.options], sites

    def _weights(self, model: ir.Model, units: Sequence[_Unit], context: Context, batches: Sequence) -> list[float]:
        """Lambda of each unit."""
        trial, weights = Trial(Model.of(model), context, batches), []
        for done, unit in enumerate(units):
            context.progress(len(units) + done, 2 * len(units), unit.name)
            option = min(unit.options, key=lambda o: abs(o.bits / unit.elements - self.bits))
            moved = trial.divergence(dict.fromkeys(unit.numbers, option.format))
            weights.append(self._left(unit) * max(moved, 0.0) / max(option.error, 1e-30))
        return weights

    def _left(self, unit: _Unit) -> float:
        """What codes that are chosen as they will be leave of an error of nearest codes."""
        return _FEEDBACK if self.assign == "gptq" and not unit.looked_up else 1.0

    def _information(
        self, model: ir.Model, units: Sequence[_Unit], context: Context, batches: Sequence
    ) -> Mapping[ir.Value, ir.TensorProtocol]:
        """The Fisher information of each weight, if that is what errors count by."""
        if self.metric != "fisher":
            return {}
        given = batches if context.calibration is None else context.calibration
        return fisher(model, [unit.weight for unit in units], given, context.seed, context.threads)


@dataclasses.dataclass
class _Choice:
    """A format that a unit may get: its stored bits, its time, and its error once measured."""

    format: Format
    bits: float
    time: float
    error: float = 0.0


class _Unit:
    """A weight with all its readers.

    Attributes:
        numbers: Which uses, as `weight_uses` counts them.
        options: The formats it may get.
        power: Sum of squares of the layer's outputs, by the diagonal of the second moments.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.options: list[_Choice] = []
        self.power = 0.0
        self._uses: list[Use] = []

    def add(self, number: int, use: Use) -> None:
        self.numbers.append(number)
        self._uses.append(use)

    @property
    def name(self) -> str:
        return self._uses[0].name

    @property
    def elements(self) -> int:
        assert self._uses[0].weight is not None
        return math.prod(self._uses[0].weight.shape)

    @property
    def multiplies(self) -> bool:
        """Whether a product reads it; look-ups read a row, and take no time."""
        return any(use.kind is not Kind.EMBEDDING for use in self._uses)

    @property
    def looked_up(self) -> bool:
        """Whether rows of it are read one by one; then its codes are the nearest, whoever else reads it."""
        return any(use.kind is Kind.EMBEDDING for use in self._uses)

    def offer(self, formats: Sequence[str], target: str | None) -> None:
        """Lists the formats that fit the shape, and, where time counts, have a fused kernel."""
        weight = self._uses[0].weight
        assert weight is not None
        for format in dict.fromkeys(fitted(Format.parse(text), weight.shape[1]) for text in formats):
            per_weight = relative_time(format, weight.shape[1], target) if target and self.multiplies else 0.0
            if per_weight is not None:
                self.options.append(
                    _Choice(format, format.stored_bits(weight.shape), per_weight * self.elements)  # type: ignore[arg-type]
                )

    @property
    def weight(self) -> Weight:
        weight = self._uses[0].weight
        assert weight is not None
        return weight

    def measure(self, context: Context, information: Mapping[ir.Value, ir.TensorProtocol]) -> None:
        """Quantizes the weight to each format, to know the error.

        Args:
            context: Has second moments.
            information: The Fisher information of single weights, to count by that instead.
        """
        weight = self.weight
        requests = (use.statistic(Statistic.SECOND_MOMENT) for use in self._uses)
        known = [context.statistics[r] for r in requests if r is not None and r in context.statistics]
        known = [information[weight.value].numpy()] if weight.value in information else known
        metric = known[0] if known else None
        numbers = weight.raw()
        for option in self.options:
            tensor = assign(numbers, option.format, metric, name=weight.name, threads=context.threads)
            self.power, option.error = squared_errors(numbers, tensor, metric, threads=context.threads)
        del numbers
        weight.release()

    def take(self, choice: int) -> None:
        for use in self._uses:
            use.plan(self.options[choice].format)

    def site(self, choice: int) -> Site:
        option = self.options[choice]
        facts = {
            "format": str(option.format),
            "planned_bits": option.bits / self.elements,
            "relative_error": option.error / max(self.power, 1e-30),
        }
        return Site(self.name, Outcome.CHANGED, "", facts)


def _obstacle(use: Use) -> str:
    weight = use.weight
    if weight is None or weight.format is not None:
        return "already quantized" if weight is not None else "its weight is computed"
    if use.kind not in _KINDS:
        return f"a {use.kind.value} gets no plan"
    if weight.shape[1] < SHORTEST_GROUP or weight.value.dtype not in (None, ir.DataType.FLOAT):
        return "quantize-weights leaves it alone"
    return ""


def _batches(model: ir.Model, context: Context) -> tuple[list, list]:
    """Batches to try single weights on, and others to judge plans on; the same where there is but one."""
    if context.calibration is None:
        found = find_inputs(Model.of(model), Session(model).run, context.seed)
        if not found.batches:
            raise InputError(
                f"Expected a model that runs on made-up inputs, to see which weights matter: {found.obstacle}. Give a "
                "text with --calib if it reads text, or choose formats without `allocate`."
            )
        return list(found.batches), list(found.batches)
    tokens = [v.name for v in model.graph.inputs if port_of(v).role == "tokens"]
    left = iter(context.calibration)

    def take(positions: int) -> list:
        taken = []
        for batch in left:
            taken.append(batch)
            positions -= sum(batch[name].size for name in tokens) or _WINDOW
            if positions <= 0:
                break
        return taken

    tried = take(_TRIED)
    return tried, take(_JUDGED) or tried


def _judge(
    model: ir.Model, units: Sequence[_Unit], plans: Sequence[tuple[int, ...]], context: Context, batches: Sequence
) -> tuple[list[str], tuple[int, ...]]:
    """Tries whole plans, with nearest codes."""
    if len(plans) == 1:
        return [], plans[0]
    trial = Trial(Model.of(model), context, batches)
    moved = []
    for plan in plans:
        formats = {n: u.options[c].format for u, c in zip(units, plan, strict=True) for n in u.numbers}
        moved.append(trial.divergence(formats))
    best = int(np.argmin(moved))
    tried = ", ".join(f"{m:.4g}" for m in moved)
    return [f"outputs of the {len(plans)} best plans moved by {tried}; number {best + 1} was taken"], plans[best]
