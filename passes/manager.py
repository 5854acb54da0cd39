"""Runs passes, verifies each one by its contract, and reports what happened."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model
from qc.ir.probe import find_inputs
from qc.ir.runtime import Session
from qc.ir.verify import STAGES, Difference, Stage, check_structure
from qc.passes.base import BlockPass, Context, Contract, Exact, Lossy, Outcome, Pass, Result, Site
from qc.passes.judge import Outputs, outputs_of, require_equal, worst
from qc.passes.pipeline import Step
from qc.passes.statistics import collect
from qc.passes.sweep import BlockError, sweep, wants_sweep

__all__ = ["Observer", "PassManager", "PassReport"]

Observer = Callable[[str, "PassReport | None"], None]
"""Called with a pass's name before it runs (None) and after (its report)."""


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: The pass's name in pipelines.
        spec: Name and options, as `passes.pipeline` spells them.
        contract: ``exact``, ``lossy`` or ``structural``.
        modified: Whether the model changed.
        seconds: Time of the pass itself.
        verify_seconds: Time of its verification, and of those that were verified with it.
        sites: Every site that it looked at.
        notes: Remarks.
        differences: Outputs before against after, the worst over the probe batches; empty if nothing was compared.
            Exact neighbours are compared as one, and share them.
        blocks: If it ran in a sweep: how far the outputs of each part are from those of the float network.
    """

    name: str
    spec: str
    contract: str
    modified: bool
    seconds: float
    verify_seconds: float
    sites: Sequence[Site] = ()
    notes: Sequence[str] = ()
    differences: Sequence[Difference] = ()
    blocks: Sequence[BlockError] = ()

    def count(self, outcome: Outcome) -> int:
        """Number of sites with that outcome."""
        return sum(s.outcome is outcome for s in self.sites)


class PassManager:
    """Runs steps in order over one model.

    After a pass that modified the model, its structure is checked against the stage, and the outputs on the probe batch
    against its contract: an `Exact` pass must reproduce them, or the run stops with the first value that differs; of a
    `Lossy` pass the error is measured.

    Neighbouring exact passes are checked as one, since a forward pass of a large model takes its time: if something is
    wrong behind the last, they run again from where they began, each checked alone, so that the one at fault is named.

    Neighbouring block passes run as one sweep over the parts of the network if one of them wants it
    (`qc.passes.sweep`); then the model is verified when all parts are done, and exact passes on each part.

    Accepts passes of ours and any ``onnx_ir`` pass (taken as exact).

    Attributes:
        steps: What runs.
        verify: Whether outputs are compared.
        outputs: After a run, what the model yields on the probe batches; empty if outputs are not compared.
    """

    def __init__(
        self,
        steps: Sequence[Step | ir.passes.PassBase],
        *,
        stage: str = "float",
        verify: bool = True,
        observer: Observer | None = None,
    ) -> None:
        """Prepares a run.

        Args:
            steps: What to run. A bare pass counts as optional: it may match nothing.
            stage: The stage that holds while they run; it becomes ``quantized`` after a lossy pass on a float model.
            verify: Whether to compare outputs; structure is always checked.
            observer: Told of every pass before and after.
        """
        self.steps = list(steps)
        self.verify = verify
        self.outputs: Outputs = []
        self._stage: Stage = STAGES[stage]
        self._observer = observer or (lambda name, report: None)

    def run(
        self,
        model: ir.Model,
        *,
        context: Context | None = None,
        probe: Sequence[Mapping[str, np.ndarray]] | None = None,
        calibration: Sequence[Mapping[str, np.ndarray]] | None = None,
        outputs: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> tuple[Model, list[PassReport]]:
        """Runs all steps on `model`, in place.

        Args:
            model: The model to transform.
            context: What passes may use.
            probe: Batches to verify on; None looks for some that the model runs on; without any, only structure is
                checked.
            calibration: Batches to collect statistics on, for passes that need them; None makes synthetic ones.
            outputs: What `model` yields on `probe`, if known: a forward pass of a large model takes its time.

        Returns:
            The model and one report per step.

        Raises:
            ContractError: If a pass broke its contract.
            UnsupportedError: If a pass that was asked for found nothing to do.
        """
        model = Model.of(model)
        context = dataclasses.replace(context or Context(), calibration=calibration)
        self._foreign = frozenset(n.domain for n in model.graph.all_nodes()) - {dialect.DOMAIN}
        dialect.sync_functions(model)
        batches = list(probe or ()) if self.verify else []
        if self.verify and probe is None:
            batches = list(find_inputs(model, Session(model).run, context.seed).batches)
        before = [dict(o) for o in outputs] if batches and outputs else outputs_of(model, batches)
        wanted = any(_wants_reference(s.action) for together in _runs(self.steps) for s in together)
        reports = []
        for together in _runs(self.steps, apart=wanted):
            if wanted and context.reference is None and _quantizes(together[0]):
                context = dataclasses.replace(context, reference=model.clone())
            if wants_sweep(together):
                model, before, done = self._run_sweep(together, model, context, calibration, batches, before)
                reports += done
                continue
            for alike in _alike(together):
                model, before, done = self._run_alike(alike, model, context, batches, before)
                reports += done
        self.outputs = before
        return model, reports

    def _run_sweep(
        self,
        steps: Sequence[Step],
        model: Model,
        context: Context,
        calibration: Sequence[Mapping[str, np.ndarray]] | None,
        batches: Sequence[Mapping[str, np.ndarray]],
        before: Outputs,
    ) -> tuple[Model, Outputs, list[PassReport]]:
        """Runs neighbouring block passes part by part; the model is verified when all parts are done."""
        self._observer(" + ".join(_name(s.action) for s in steps), None)
        model, done, errors = sweep(model, steps, context, calibration)
        started, differences = time.perf_counter(), []
        for swept in done:
            if not swept.step.optional and not _matched(swept.result.sites):
                raise UnsupportedError(_nothing_matched(_name(swept.step.action), swept.result.sites))
        if any(s.result.modified for s in done):
            if any(s.result.modified and _is_lossy(s.step.action) for s in done):
                self._quantized()
            check_structure(model, self._stage, self._foreign)
            after = outputs_of(model, batches)
            differences, before = worst(before, after), after
        last = done[-1].step
        verified = time.perf_counter() - started
        reports = [
            _report(s.step.action, s.result, s.seconds, verified, differences, errors)
            if s.step is last
            else _report(s.step.action, s.result, s.seconds)
            for s in done
        ]
        for report in reports:
            self._observer(report.name, report)
        return model, before, reports

    def _quantized(self) -> None:
        if self._stage.name == "float":
            self._stage = STAGES["quantized"]

    def _run_alike(
        self,
        steps: Sequence[Step],
        model: Model,
        context: Context,
        batches: Sequence[Mapping[str, np.ndarray]],
        before: Outputs,
    ) -> tuple[Model, Outputs, list[PassReport]]:
        """Runs neighbours that promise the same; if they do not keep it, each alone, to find the one that does not."""
        compared = bool(batches) and isinstance(_contract(steps[0].action), Exact)
        previous = model.clone() if compared or len(steps) > 1 else model
        try:
            return self._run_steps(steps, model, context, batches, before, previous)
        except Exception:
            if len(steps) == 1:
                raise
        model, reports = previous, []
        for step in steps:
            model, before, done = self._run_alike([step], model, context, batches, before)
            reports += done
        return model, before, reports

    def _run_steps(
        self,
        steps: Sequence[Step],
        model: Model,
        context: Context,
        batches: Sequence[Mapping[str, np.ndarray]],
        before: Outputs,
        previous: Model,
    ) -> tuple[Model, Outputs, list[PassReport]]:
        """Runs steps that promise the same, and holds what the last leaves against `previous`."""
        began, differences = time.perf_counter(), []
        done: list[tuple[ir.passes.PassBase, ir.passes.PassResult, float]] = []
        for step in steps:
            started = time.perf_counter()
            result = self._call(step, model, context)
            done.append((step.action, result, time.perf_counter() - started))
            model = result.model if isinstance(result.model, Model) else Model.of(result.model, assets=model.assets)
            if result.modified:
                dialect.sync_functions(model)
        modified = [action for action, result, _ in done if result.modified]
        if modified:
            if _is_lossy(modified[-1]):
                self._quantized()
            check_structure(model, self._stage, self._foreign)
            after, contract = outputs_of(model, batches), _contract(modified[-1])
            if isinstance(contract, Exact):
                names = " + ".join(_name(action) for action in modified)
                differences = require_equal(names, contract, before, after, previous, model, batches)
            elif isinstance(contract, Lossy):
                differences = worst(before, after)
            before = after
        verified = time.perf_counter() - began - sum(seconds for _, _, seconds in done)
        reports = [
            _report(
                action,
                result,
                seconds,
                verified if modified and action is modified[-1] else 0.0,
                differences if result.modified else (),
            )
            for action, result, seconds in done
        ]
        for report in reports:
            self._observer(report.name, report)
        return model, before, reports

    def _call(self, step: Step, model: Model, context: Context) -> ir.passes.PassResult:
        """Runs one step with the statistics that it wants."""
        action, name = step.action, _name(step.action)
        self._observer(name, None)
        if not isinstance(action, Pass):
            return action(model)
        requests = action.needs(model)
        found = collect(model, requests, context.calibration, context.seed) if requests else {}
        result = action.call(model, dataclasses.replace(context, memo={}, statistics=found))
        if not step.optional and not _matched(result.sites):
            raise UnsupportedError(_nothing_matched(name, result.sites))
        return result


def _runs(steps: Sequence[Step | ir.passes.PassBase], *, apart: bool = False) -> list[list[Step]]:
    """Groups neighbouring block passes, and neighbours that see the whole network.

    `apart`: what quantizes first begins a group, since what a later pass is to come close to is the model before it.
    """
    runs: list[list[Step]] = []
    for item in steps:
        step = item if isinstance(item, Step) else Step(item, optional=True)  # type: ignore[arg-type]
        begins = apart and _quantizes(step)
        apart = apart and not begins
        if not begins and runs and _by_parts(step.action) == _by_parts(runs[-1][-1].action):
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def _alike(steps: Sequence[Step]) -> list[list[Step]]:
    """Groups neighbours that promise the same equality; every other step is a group of its own."""
    groups: list[list[Step]] = []
    for step in steps:
        contract = _contract(step.action)
        if groups and isinstance(contract, Exact) and contract == _contract(groups[-1][-1].action):
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _contract(action: ir.passes.PassBase) -> Contract:
    return action.contract if isinstance(action, Pass) else Exact()


def _by_parts(action: ir.passes.PassBase) -> bool:
    return isinstance(action, BlockPass) and not action.whole


def _report(
    action: ir.passes.PassBase,
    result: ir.passes.PassResult,
    seconds: float,
    verify_seconds: float = 0.0,
    differences: Sequence[Difference] = (),
    blocks: Sequence[BlockError] = (),
) -> PassReport:
    known = isinstance(result, Result)
    return PassReport(
        name=_name(action),
        spec=str(Step(action)) if isinstance(action, Pass) else _name(action),
        contract=type(_contract(action)).__name__.lower(),
        modified=result.modified,
        seconds=seconds,
        verify_seconds=verify_seconds,
        sites=tuple(result.sites) if known else (),
        notes=tuple(result.notes) if known else (),
        differences=tuple(differences),
        blocks=tuple(blocks),
    )


def _is_lossy(action: ir.passes.PassBase) -> bool:
    return isinstance(_contract(action), Lossy)


def _wants_reference(action: ir.passes.PassBase) -> bool:
    return isinstance(action, Pass) and action.wants_reference


def _quantizes(step: Step) -> bool:
    """Whether what a later pass is to come close to must be kept before this step."""
    return _is_lossy(step.action) and not _wants_reference(step.action)


def _matched(sites: Sequence[Site]) -> bool:
    return any(s.outcome is not Outcome.SKIPPED for s in sites)


def _name(action: ir.passes.PassBase) -> str:
    return action.spec_name() if isinstance(action, Pass) else type(action).__name__


def _nothing_matched(name: str, sites: Sequence[Site]) -> str:
    reasons = "".join(f"\n  {s.name}: {s.reason}" for s in sites[:8])
    return (
        f"Pass {name} was asked for and found nothing that it could change, among {len(sites)} sites.{reasons}\n"
        "Choose another recipe (`float` changes nothing), or mark the pass `optional: true` in it."
    )
