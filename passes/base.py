"""What a pass is: a frozen dataclass whose fields are its options, with a contract, that reports every site it saw."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.store import Store
from qc.passes.statistics import Request

if TYPE_CHECKING:
    from qc.ir.model import Model
    from qc.passes.journal import Journal
    from qc.passes.sweep import BlockData

__all__ = [
    "CALIBRATION_TOKENS",
    "BlockPass",
    "Context",
    "Contract",
    "Exact",
    "Lossy",
    "Outcome",
    "Pass",
    "Result",
    "Site",
    "Structural",
    "check_patterns",
    "site_name",
]

CALIBRATION_TOKENS = 1024
"""Statistics of single channels change little beyond a thousand tokens."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """The outputs stay the same: ``max|new - old| <= tol * max(1, max|old|)`` per output on the probe batch.

    Attributes:
        tol: The tolerance.
        cache: Whether what a key-value cache holds stays the same too. If not, it holds the same in other coordinates;
            it is not compared, but the step behind it is, on what each of the two models wrote itself.
    """

    tol: float = 1e-4
    cache: bool = True


@dataclasses.dataclass(frozen=True)
class Lossy:
    """The outputs change; the manager measures by how much (SQNR per output) and shows it."""


@dataclasses.dataclass(frozen=True)
class Structural:
    """The pass changes inputs, outputs or annotations, so that values before and after are not comparable."""


Contract = Exact | Lossy | Structural


class Outcome(enum.Enum):
    """What became of a site."""

    CHANGED = "changed"
    MATCHED = "matched"
    SKIPPED = "skipped"


@dataclasses.dataclass(frozen=True)
class Site:
    """One place of the graph that a pass considered.

    Attributes:
        name: What a user calls it: the module path where known, else a weight's or node's name.
        outcome: ``CHANGED``, ``MATCHED`` (already as the pass wants it) or ``SKIPPED``.
        reason: A sentence; always present when skipped.
        details: Facts for the report, JSON values only: format, bits, error...
    """

    name: str
    outcome: Outcome
    reason: str = ""
    details: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome is Outcome.SKIPPED and not self.reason:
            raise ValueError(f"Pass developer: a skipped site needs a reason ({self.name}).")


@dataclasses.dataclass
class Result(ir.passes.PassResult):
    """An ``onnx_ir`` pass result with the sites that the pass looked at and remarks for the report."""

    sites: list[Site] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, model: ir.Model, sites: list[Site], notes: list[str] | None = None) -> Result:
        """A result that is modified exactly if a site was changed."""
        return cls(model, any(s.outcome is Outcome.CHANGED for s in sites), sites, notes or [])

    def count(self, outcome: Outcome) -> int:
        """Number of sites with that outcome."""
        return sum(s.outcome is outcome for s in self.sites)


@dataclasses.dataclass
class Context:
    """What a pass may use beside the model.

    Attributes:
        store: Where new weights are written.
        seed: Seed of everything random in a pass; use ``numpy.random.default_rng([seed, ...])``.
        threads: Number of threads a pass may use.
        statistics: What the manager collected because the pass asked for it (`Pass.needs`).
        calibration: The batches that statistics are collected on, for passes that run the network themselves; None if
            there are only made-up ones.
        reference: The model as it was before the first lossy pass, for passes that want to come close to it; None if
            there was none, or no pass wants it (`Pass.wants_reference`).
        scope: The nodes that a `BlockPass` may touch in this call, those in their subgraphs included; None for all.
        memo: What a pass wants to find again when it is called on the next part of the network: a weight that two parts
            share is quantized once. Empty at the start of each sweep.
        block: The activations of the part in `scope`, for passes that learn from them.
        work: Directory for temporary files; None for the system's.
        activations: Bytes of activations between two parts that may stay in memory; None for any number.
        journal: Where finished parts of sweeps are written down, and read from.
        exclude: Regular expressions of site names that lossy passes must leave as they are.
        used_patterns: Those of `exclude` that have matched something so far.
        tick: Called as ``tick(done, total, site)`` while a pass works, for progress displays.
    """

    store: Store = dataclasses.field(default_factory=Store)
    seed: int = 0
    threads: int = 2
    statistics: Mapping[Request, np.ndarray] = dataclasses.field(default_factory=dict)
    calibration: Sequence[Mapping[str, np.ndarray]] | None = None
    reference: Model | None = None
    scope: frozenset[ir.Node] | None = None
    memo: dict[object, Any] = dataclasses.field(default_factory=dict)
    block: BlockData | None = None
    work: Path | None = None
    activations: int | None = None
    journal: Journal | None = None
    exclude: tuple[str, ...] = ()
    used_patterns: set[str] = dataclasses.field(default_factory=set)
    tick: object = None

    def __post_init__(self) -> None:
        check_patterns(self.exclude)

    def excluded(self, *names: str) -> str | None:
        """Returns the first exclusion pattern that matches one of `names` anywhere, or None; remembers it as used."""
        found = next((p for p in self.exclude if any(re.search(p, n) for n in names)), None)
        if found is not None:
            self.used_patterns.add(found)
        return found

    def covers(self, node: ir.Node) -> bool:
        """Whether a pass may touch `node`."""
        return self.scope is None or node in self.scope

    def progress(self, done: int, total: int, site: str) -> None:
        """Reports progress, if anybody listens."""
        if callable(self.tick):
            self.tick(done, total, site)


@dataclasses.dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """Base of all passes. Subclass as a frozen dataclass; see docs/writing-a-pass.md.

    The name in pipelines is the class name in kebab case without a trailing ``Pass``. The first docstring line is its
    help. A pass is stand-alone too: ``QuantizeWeights(format="int4")(model)`` runs it as any onnx_ir pass.
    """

    contract: ClassVar[Contract] = Exact()

    @classmethod
    def spec_name(cls) -> str:
        """The pass's name in pipelines and recipes."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__.removesuffix("Pass")).lower()

    def needs(self, model: ir.Model) -> Sequence[Request]:
        """Statistics of activations that the manager shall collect just before the pass; none by default."""
        return ()

    @property
    def calibration_tokens(self) -> int:
        """How much text the statistics want, where there is as much."""
        return CALIBRATION_TOKENS

    @property
    def wants_reference(self) -> bool:
        """Whether the pass needs the model as it was before anything was quantized (`Context.reference`)."""
        return False

    @property
    def bytes_per_parameter(self) -> int:
        """Memory that the pass takes for each weight of the network; 0 if it has a few weights at a time."""
        return 0

    def bytes_for(self, columns: int) -> int:
        """Memory that the pass takes to work on a weight of so many input channels, beside that of the weight."""
        return 0

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        """Transforms `model` in place.

        Args:
            model: The model; a pass that declines leaves it bit-identical.
            context: Store, seed, exclusions; a default one when the pass runs alone.
        """
        raise TypeError(f"Pass developer: {type(self).__name__} does not define call(model, context).")


@dataclasses.dataclass(frozen=True)
class BlockPass(Pass):
    """A pass that can work on one part of a network at a time: on the nodes for which `Context.covers` is true.

    Neighbouring block passes of a pipeline are fused into one sweep if one of them wants it (`sequential`); see
    `qc.passes.sweep`. Then `call` runs once for each part, in order, with the statistics of that part on the
    activations that the parts before it yield as they are by then: quantized. Elsewhere it runs once on everything.

    The calls on all parts together must list the same sites as one call on everything.
    """

    @property
    def sequential(self) -> bool:
        """Whether the pass gains from what the parts before, already changed, really yield."""
        return False

    @property
    def whole(self) -> bool:
        """Whether the pass must see the whole network at once, so that it takes part in no sweep."""
        return False

    @property
    def learns(self) -> bool:
        """Whether the pass needs what the float part yields on every calibration batch (`Context.block`)."""
        return False


def check_patterns(patterns: Sequence[str]) -> None:
    """Raises InputError unless all `patterns` are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"Expected a regular expression to exclude, found {pattern!r}: {error}.") from error


def site_name(node: ir.Node) -> str:
    """The name of a node for people: its module path if the frontend recorded one, else its own name."""
    return node.metadata_props.get("qc.scope") or node.name or f"{node.domain or 'onnx'}::{node.op_type}"
