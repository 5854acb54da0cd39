"""What a compile does for one target, once the model is quantized: lower, write, load in its runtime, measure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.artifact import Artifact, ArtifactWriter
from qc.backends.decoding import context_limit
from qc.backends.manifest import Manifest, source_files
from qc.backends.reference import ModelRunner, Remembered
from qc.backends.target import Runner, Target, backend_for
from qc.data import Data, fitted, shortened
from qc.ir.digest import digest_batches
from qc.ir.errors import ContractError
from qc.ir.model import Model
from qc.ir.probe import Found, run_in_turn
from qc.ir.verify import STAGES, check_structure, compare
from qc.measurement import measure, measured_batches, rehearse, speed
from qc.passes.base import Context
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step, steps_of
from qc.plan import Plan
from qc.progress import Progress
from qc.recipes import Recipe
from qc.report import build_report, write_report

__all__ = ["Clock", "CompileResult", "Prepared", "canonicalize_steps", "finish"]

_LOWERING_SQNR = 10.0
"""Decibels that a lowered model must keep against the quantized one. Kernels that quantize activations at run time land
between 25 and 45; a wrong lowering lands near 0."""


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """What `compile` returns.

    Attributes:
        artifact: The directory; None after a dry run.
        plan: What was estimated before the work.
        reports: One per pass, in order.
        report: The content of ``report.json``.
        speed: A first impression of the artifact's speed here: ``decode_tok_s`` and ``prefill_ms``, or ``latency_ms``.
        seconds: Wall time of each stage. Neither is part of the artifact, which must not depend on the clock.
    """

    artifact: Artifact | None
    plan: Plan
    reports: Sequence[PassReport]
    report: Mapping[str, Any]
    speed: Mapping[str, float]
    seconds: Mapping[str, float]


class Clock:
    """Times the stages of a compile and announces them."""

    def __init__(self, progress: Progress, seconds: Mapping[str, float] | None = None) -> None:
        """Starts at what earlier stages took."""
        self.progress = progress
        self._seconds = dict(seconds or {})
        self._running: tuple[str, float] | None = None

    def start(self, name: str) -> None:
        self.stop()
        self._running = (name, time.perf_counter())
        self.progress.stage(name)

    def stop(self) -> dict[str, float]:
        if self._running is not None:
            name, began = self._running
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            self._running = None
        return dict(self._seconds)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all targets with one recipe share.

    Attributes:
        original: The model as it was imported.
        reference: Runs the original and remembers what it yielded.
        found: Inputs, and what the original yields.
        outputs: What the quantized model yields on these inputs; empty if not known.
        data: What was calibrated on, and what to measure on.
        plan: The estimate.
        recipe: The recipe.
        context: What its passes used.
        reports: Of all passes so far.
    """

    original: Model
    reference: Remembered
    found: Found
    outputs: Sequence[Mapping[str, np.ndarray]]
    data: Data
    plan: Plan
    recipe: Recipe
    context: Context
    reports: Sequence[PassReport]


def canonicalize_steps() -> list[Step]:
    """The passes before those of the recipe."""
    return [Step(p, optional=True) for p in canonicalize_passes()]


def finish(
    prepared: Prepared, model: Model, target: str, writer: ArtifactWriter, clock: Clock, *, verify: bool
) -> CompileResult:
    """Brings a quantized model to one target, in place.

    Args:
        prepared: What was done so far.
        model: The quantized model.
        target: Name of the target.
        writer: Where the artifact goes.
        clock: Has timed what was done so far.
        verify: Whether passes are verified numerically.
    """
    backend, plan, found = backend_for(target), prepared.plan, prepared.found
    data = prepared.data
    longest = _longest(model, backend.target)
    if longest is not None:
        model.record(max_positions=longest)
        data = fitted(data, model.signature, longest)
    if backend.target.simulated:
        data = shortened(data, model.signature, plan)
    clock.start("lower")
    unlowered = prepared.outputs or _outputs(model, found.batches)
    lowering = list(backend.lowering())
    manager = PassManager(lowering, stage="lowering", verify=verify, observer=clock.progress.pass_event)
    model, lowered = manager.run(
        model, context=prepared.context, probe=found.batches, calibration=data.calibration, outputs=prepared.outputs
    )
    check_structure(model, STAGES[backend.target.stage], _foreign_domains(prepared.original))
    with writer:
        clock.start("write")
        backend.emit(model, writer.directory)
        clock.start("measure")
        rehearse(prepared.reference, plan, data)  # the float model and the artifact take turns in memory
        if plan.in_parts:
            runner = backend.open_in_parts(writer.directory, prepared.context.work or writer.directory)
            runner.prepare(measured_batches(runner, plan, data))
        else:
            runner = backend.open(writer.directory)
        _require_same(runner, found.batches, unlowered)
        accuracy = measure(runner, prepared.reference, plan, data, found)
        timed = found.batches and not plan.in_parts and not backend.target.simulated
        figures = speed(runner, found.batches) if timed else {}
        reports = [*prepared.reports, *lowered]
        report = build_report(
            plan=plan,
            reports=reports,
            coverage=backend.coverage(model),
            accuracy=accuracy,
            directory=writer.directory,
            recipe=prepared.recipe.name,
            target=target,
        )
        write_report(report, writer.directory)
        manifest = Manifest.of(
            model,
            backend.target,
            recipe=prepared.recipe.name,
            steps=steps_of(prepared.recipe.passes),
            lowering=[*canonicalize_steps(), *lowering],
            seed=prepared.context.seed,
            source=source_files(_weight_files(prepared.original)),
            accuracy=accuracy,
            calibration=_described(data),
        )
        writer.describe(manifest)
    return CompileResult(Artifact.open(writer.out), plan, reports, report, figures, clock.stop())


def _longest(model: Model, target: Target) -> int | None:
    """How long a text may be where the target fixes it; None if it does not, or the model reads no text."""
    if target.longest is None or model.signature.input("tokens") is None:
        return None
    longest = target.longest[0 if model.signature.caches else 1]
    return min(longest, context_limit(model.provenance) or longest)


def _described(data: Data) -> dict[str, object]:
    """What the manifest says about the calibration data."""
    if data.calibration is None:
        return {}
    return {"source": data.name, "batches": len(data.calibration), "sha256": digest_batches(data.calibration)}


def _outputs(model: Model, batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return run_in_turn(ModelRunner(model).run, model.signature, batches)


def _weight_files(model: Model) -> list[str]:
    """The files that the model's weights and assets lie in."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sorted(
        {t.path for t in tensors if isinstance(t, ir.ExternalTensor)} | {str(p) for p in model.assets.values()}
    )


def _foreign_domains(model: Model) -> frozenset[str]:
    return frozenset(n.domain for n in model.graph.all_nodes())


def _require_same(
    runner: Runner, probe: Sequence[Mapping[str, np.ndarray]], expected: Sequence[Mapping[str, np.ndarray]]
) -> None:
    """Compares the artifact in its own runtime with the model that was lowered."""
    for before, after in zip(expected, run_in_turn(runner.run, runner.signature, probe), strict=True):
        for difference in compare(before, after):
            if not difference.sqnr >= _LOWERING_SQNR:
                raise ContractError(
                    f"The artifact does not compute what was lowered: output {difference.output!r} keeps "
                    f"{difference.sqnr:.1f} dB on a random batch, expected at least {_LOWERING_SQNR:g} dB. "
                    "This is a defect of qc or of the runtime's kernels; nothing was written."
                )
