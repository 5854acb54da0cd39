"""The main job: a model goes in, a measured artifact comes out, complete or not at all."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qc.backends.artifact import Artifact, ArtifactWriter
from qc.backends.decoding import context_limit
from qc.backends.manifest import Manifest, source_files
from qc.backends.reference import ModelRunner, Remembered
from qc.backends.target import Backend, Coverage, Runner, Target, backend_for
from qc.backends.workspace import work_directory
from qc.frontend import load
from qc.ir.digest import digest_batches
from qc.ir.errors import ContractError, InputError
from qc.ir.model import Model
from qc.ir.probe import Found, find_inputs, run_in_turn
from qc.ir.store import Store
from qc.ir.verify import STAGES, check_structure, compare
from qc.measurement import Data, measure, measured_batches, read_data, rehearse, shortened, speed
from qc.passes.base import CALIBRATION_TOKENS, Context
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.journal import Journal
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step, format_pipeline, parse_pipeline, steps_of
from qc.plan import Plan, make_plan
from qc.progress import Progress
from qc.recipes import Recipe, load_recipe
from qc.report import build_report, write_report

__all__ = ["CompileResult", "compile", "lower"]

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


def compile(  # noqa: A001  the verb of the product
    source: object,
    out: str | Path,
    *,
    target: str = "ort-cpu",
    recipe: str | None = None,
    passes: str | None = None,
    calib: str | Path | Iterable[Mapping[str, object]] | None = None,
    samples: int | None = None,
    memory: int | None = None,
    exclude: Sequence[str] = (),
    settings: Sequence[str] = (),
    seed: int = 0,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> CompileResult:
    """Compiles a model into an artifact directory.

    Args:
        source: A Hugging Face directory, an ``.onnx`` or ``.pt2`` file, ``builtin:NAME``, or a `Model`.
        out: The artifact's directory; must not exist or be empty, unless `force`.
        target: Name of a target.
        recipe: Name or file of a recipe; the target's own if None; ignored if `passes` is given.
        passes: A pipeline as a string, in place of a recipe.
        calib: What to calibrate on, see `qc.calibration`: a text file (its end calibrates, its beginning measures),
            JSON lines, token ids, arrays, images, or any iterable of inputs by name. Else the model's own sample text,
            else random inputs.
        samples: How many windows, texts or batches of it to use at most.
        memory: Bytes of anonymous memory that the compile may use.
        exclude: Regular expressions of sites to leave in float.
        settings: ``pass.option=value`` for passes of the recipe.
        seed: Seed of everything random.
        force: Replace an artifact that stands at `out`.
        resume: Go on with the blocks that a killed compile to the same place has finished, and leave them there if this
            one fails. The artifact is the same to the byte. The killed compile must have been the same.
        dry_run: Stop after the plan.
        verify: Whether passes are verified numerically.
        progress: Receives events.

    Returns:
        The artifact and everything measured on the way.

    Raises:
        InputError: If anything given is unusable. Nothing at `out` was touched.
        UnsupportedError: If the target cannot express the result.
        ContractError: If a pass, or the artifact, does not compute what it must.
    """
    progress = progress or Progress()
    clock = _Clock(progress)
    backend = backend_for(target)
    chosen = _recipe(recipe or backend.target.recipe, passes).with_options(settings)
    steps = steps_of(chosen.passes)
    out = Path(out)
    writer = ArtifactWriter(out, force=force, resume=resume)
    try:
        with work_directory(out, resume=resume) as work:
            clock.start("import")
            shutil.rmtree(work / "import", ignore_errors=True)  # of a killed compile
            model = source if isinstance(source, Model) else load(source, work=work / "import")  # type: ignore[arg-type]
            _limit(model, backend.target)
            plan = make_plan(model, steps, exported=(work / "import").is_dir())
            progress.plan(plan)
            plan.check(out, memory)
            if dry_run:
                return CompileResult(None, plan, (), {}, {}, clock.stop())
            data = read_data(model, calib, samples=samples, tokens=_calibration_tokens(steps), seed=seed)
            if backend.target.simulated:
                data = shortened(data, plan)
            original = model.clone()
            store = Store(work / "store")
            reference = Remembered(ModelRunner(original), store)
            found = find_inputs(original, reference.run, seed)
            _require_finite(original, found)
            context = Context(
                store=store,
                seed=seed,
                exclude=tuple(exclude),
                tick=progress.tick,
                work=work / "activations",
                activations=None if memory is None else max(0, memory - plan.memory_bytes),
                journal=Journal(work / "journal", _facts(steps, seed, exclude), resume=resume),
            )
            phases = _phases(steps, backend)
            reports: list[PassReport] = []
            known = found.outputs
            for phase, todo in phases.items():
                clock.start(phase)
                if phase == "lower":
                    unlowered = known or _outputs(model, found.batches)
                stage = "lowering" if phase == "lower" else "float"
                manager = PassManager(todo, stage=stage, verify=verify, observer=progress.pass_event)
                model, done = manager.run(
                    model, context=context, probe=found.batches, calibration=data.calibration, outputs=known
                )
                reports, known = reports + done, manager.outputs
                if phase == "recipe":
                    _require_used(context)
            check_structure(model, STAGES[backend.target.stage], _foreign_domains(original))
            with writer:
                clock.start("write")
                backend.emit(model, writer.directory)
                clock.start("measure")
                rehearse(reference, plan, data)  # the float model and the artifact take turns in memory
                if plan.in_parts:
                    runner = backend.open_in_parts(writer.directory, work / "activations")
                    runner.prepare(measured_batches(runner, plan, data))
                else:
                    runner = backend.open(writer.directory)
                _require_same(runner, found.batches, unlowered)
                accuracy = measure(runner, reference, plan, data, found)
                timed = found.batches and not plan.in_parts and not backend.target.simulated
                figures = speed(runner, found.batches) if timed else {}
                report = build_report(
                    plan=plan,
                    reports=reports,
                    coverage=backend.coverage(model),
                    accuracy=accuracy,
                    directory=writer.directory,
                    recipe=chosen.name,
                    target=target,
                )
                write_report(report, writer.directory)
                manifest = Manifest.of(
                    model,
                    backend.target,
                    recipe=chosen.name,
                    steps=steps,
                    lowering=[*phases["canonicalize"], *phases["lower"]],
                    seed=seed,
                    source=source_files(_weight_files(original)),
                    accuracy=accuracy,
                    calibration=_described(data),
                )
                writer.describe(manifest)
            artifact = Artifact.open(out)
            return CompileResult(artifact, plan, reports, report, figures, clock.stop())
    finally:
        progress.close()


def lower(model: Model, target: str = "ort-cpu", *, verify: bool = True) -> tuple[Model, Coverage]:
    """Lowers a canonical model to a target's operators, without writing anything.

    Returns:
        The lowered model and which of its nodes run on the target's own kernels.
    """
    backend = backend_for(target)
    manager = PassManager(list(backend.lowering()), stage="lowering", verify=verify)
    lowered, _ = manager.run(model)
    return lowered, backend.coverage(lowered)


def _limit(model: Model, target: Target) -> None:
    """Says how long a text may be where the target fixes it, so that longer ones are cut before they are used."""
    if target.longest is None or model.signature.input("tokens") is None:
        return
    longest = target.longest[0 if model.signature.caches else 1]
    model.record(max_positions=min(longest, context_limit(model.provenance) or longest))


def _described(data: Data) -> dict[str, object]:
    """What the manifest says about the calibration data."""
    if data.calibration is None:
        return {}
    return {"source": data.name, "batches": len(data.calibration), "sha256": digest_batches(data.calibration)}


def _calibration_tokens(steps: Sequence[Step]) -> int:
    return max((s.action.calibration_tokens for s in steps), default=CALIBRATION_TOKENS)


def _facts(steps: Sequence[Step], seed: int, exclude: Sequence[str]) -> dict[str, str]:
    """What the work on blocks depends on, beside the model and the data, which are known later."""
    packages = ("numpy", "onnx", "onnx-ir", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "version": f"qc {importlib.metadata.version('qc-compiler')} with {versions}",
        "recipe": format_pipeline(steps),
        "seed": str(seed),
        "list of exclusions": str(list(exclude)),
    }


def _phases(steps: Sequence[Step], backend: Backend) -> dict[str, list[Step]]:
    """The passes of each phase of a compile, in order."""
    return {
        "canonicalize": [Step(p, optional=True) for p in canonicalize_passes()],
        "recipe": list(steps),
        "lower": list(backend.lowering()),
    }


def _outputs(model: Model, batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return run_in_turn(ModelRunner(model).run, model.signature, batches)


class _Clock:
    """Times the stages of a compile and announces them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def start(self, name: str) -> None:
        self.stop()
        self._running = (name, time.perf_counter())
        self._progress.stage(name)

    def stop(self) -> dict[str, float]:
        if self._running is not None:
            name, began = self._running
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            self._running = None
        return dict(self._seconds)


def _recipe(name: str, passes: str | None) -> Recipe:
    if passes is None:
        return load_recipe(name)
    entries = [
        {s.action.spec_name(): dataclasses.asdict(s.action) | {"optional": s.optional}} for s in parse_pipeline(passes)
    ]
    return Recipe("custom", "A pipeline given as a string", "", entries)


def _weight_files(model: Model) -> list[str]:
    """The files that the model's weights and assets lie in."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sorted(
        {t.path for t in tensors if isinstance(t, ir.ExternalTensor)} | {str(p) for p in model.assets.values()}
    )


def _foreign_domains(model: Model) -> frozenset[str]:
    return frozenset(n.domain for n in model.graph.all_nodes())


def _require_finite(model: Model, found: Found) -> None:
    """Refuses a model whose weights hold NaN; a NaN that inputs alone bring about, as in ``Log(-1)``, is its own."""
    bad = (n for outputs in found.outputs for n, v in outputs.items() if v.dtype.kind == "f" and np.isnan(v).any())
    output = next(bad, None)
    weight = _nan_weight(model) if output is not None else None
    if weight is not None:
        raise InputError(
            f"Expected finite weights, found NaN in {weight!r}; output {output!r} is NaN because of it. "
            "Check the checkpoint, or copy it again."
        )


def _nan_weight(model: Model) -> str | None:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is not None
            and tensor.dtype.is_floating_point()
            and np.isnan(tensor.numpy().astype(np.float32)).any()
        ):
            return name
    return None


def _require_used(context: Context) -> None:
    unused = sorted(set(context.exclude) - context.used_patterns)
    if unused:
        raise InputError(
            f"Expected --exclude to match a weight, found none that {', '.join(unused)} matches. A typo would quantize "
            "what you meant to keep; `qc inspect --sizes` lists the names."
        )


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
