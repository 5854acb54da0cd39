"""The main job: a model goes in, a measured artifact comes out, complete or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qc.backends.artifact import ArtifactWriter
from qc.backends.reference import ModelRunner, Remembered
from qc.backends.target import Coverage, backend_for
from qc.backends.workspace import sweep, work_directory
from qc.data import read_data
from qc.emission import Clock, CompileResult, Prepared, canonicalize_steps, finish
from qc.frontend import load
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.probe import Found, find_inputs
from qc.ir.store import Store
from qc.measurement import measured_batches
from qc.passes.base import CALIBRATION_TOKENS, Context
from qc.passes.journal import Journal
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step, format_pipeline, parse_pipeline, steps_of
from qc.plan import make_plan
from qc.progress import Progress
from qc.recipes import Recipe, load_recipe

__all__ = ["CompileResult", "compile", "compile_all", "directory_of", "lower"]


def compile(  # noqa: A001  the verb of the product
    source: object,
    out: str | Path,
    *,
    target: str = "ort-cpu",
    recipe: str | None = None,
    passes: str | None = None,
    calib: str | Path | Mapping[str, object] | Iterable[Mapping[str, object]] | None = None,
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
        calib: What to calibrate on: a text file (its end calibrates, its beginning measures), JSON lines or token ids,
            see `qc.documents`; arrays, images, or inputs by name, see `qc.calibration`. Else the model's own sample
            text, else random inputs.
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
    (result,) = _compile(
        source,
        Path(out),
        {target: Path(out)},
        recipe=recipe,
        passes=passes,
        calib=calib,
        samples=samples,
        memory=memory,
        exclude=exclude,
        settings=settings,
        seed=seed,
        force=force,
        resume=resume,
        dry_run=dry_run,
        verify=verify,
        progress=progress or Progress(),
    ).values()
    return result


def compile_all(
    source: object, out: str | Path, targets: Sequence[str], *, progress: Progress | None = None, **options: Any
) -> dict[str, CompileResult]:
    """Compiles a model for several targets, each into a directory of its own below `out`.

    They share what comes before lowering: the import, the canonical form, and, where they take the same recipe, all of
    its work. Each artifact is the same to the byte as one that was compiled alone, and appears as soon as it is
    complete: if a later target fails, the earlier ones stand.

    Args:
        source: As of `compile`.
        out: The directory above the artifacts, which are named after their targets, with ``-`` for ``:``, ``,``, ``=``.
        targets: Names of targets.
        progress: Receives events.
        options: As of `compile`.

    Returns:
        What `compile` returns, by target.

    Raises:
        InputError: If two targets have the same directory, and as `compile`.
    """
    places = {target: Path(out) / directory_of(target) for target in targets}
    if len(set(places.values())) < len(targets):
        raise InputError(f"Expected different targets, found {', '.join(targets)}. Name each of them once.")
    chosen = _DEFAULTS | options
    if unknown := sorted(set(options) - set(_DEFAULTS)):
        raise TypeError(f"compile_all() got unexpected options {', '.join(unknown)}")
    sweep(Path(os.path.realpath(out)), resume=bool(options.get("resume")))
    return _compile(source, Path(out), places, progress=progress or Progress(), **chosen)


_DEFAULTS: dict[str, Any] = {
    "recipe": None,
    "passes": None,
    "calib": None,
    "samples": None,
    "memory": None,
    "exclude": (),
    "settings": (),
    "seed": 0,
    "force": False,
    "resume": False,
    "dry_run": False,
    "verify": True,
}


def directory_of(target: str) -> str:
    """The name of the directory of an artifact that is one of several."""
    return re.sub(r"[:,=]+", "-", target)


def _compile(
    source: object,
    out: Path,
    places: Mapping[str, Path],
    *,
    recipe: str | None,
    passes: str | None,
    calib: str | Path | Mapping[str, object] | Iterable[Mapping[str, object]] | None,
    samples: int | None,
    memory: int | None,
    exclude: Sequence[str],
    settings: Sequence[str],
    seed: int,
    force: bool,
    resume: bool,
    dry_run: bool,
    verify: bool,
    progress: Progress,
) -> dict[str, CompileResult]:
    """Compiles for each target into its place; works beside `out`."""
    clock = Clock(progress)
    backends = {target: backend_for(target) for target in places}
    recipes = {t: _recipe(recipe or b.target.recipe, passes).with_options(settings) for t, b in backends.items()}
    writers = {target: ArtifactWriter(place, force=force, resume=resume) for target, place in places.items()}
    results: dict[str, CompileResult] = {}
    try:
        with contextlib.ExitStack() as stack:
            work = stack.enter_context(work_directory(out, resume=resume))
            clock.start("import")
            shutil.rmtree(work / "import", ignore_errors=True)  # of a killed compile
            model = source if isinstance(source, Model) else load(source, work=work / "import")  # type: ignore[arg-type]
            plans, compilers = {}, max(b.target.compilers for b in backends.values())
            for chosen in _distinct(recipes.values()):
                exported = (work / "import").is_dir()
                plan = make_plan(model, steps_of(chosen.passes), exported=exported, compilers=compilers)
                progress.plan(plan)
                plan.check(out, memory)
                plans[str(chosen.passes)] = plan
            if dry_run:
                seconds = clock.stop()
                return {t: CompileResult(None, plans[str(r.passes)], (), {}, {}, seconds) for t, r in recipes.items()}
            original, model, store = model, model.clone(), Store(work / "store")  # passes act in place
            ahead = next(iter(plans.values())).ahead and all(b.target.longest is None for b in backends.values())
            # Half of the cores are left to the passes that it runs beside.
            threads = max(1, (os.cpu_count() or 2) // 2) if ahead else 0
            reference = Remembered(ModelRunner(original, threads=threads), Store(work / "reference"))
            stack.callback(reference.close)
            found = find_inputs(original, reference.run, seed)
            _require_finite(original, found)
            canonical: list[PassReport] = []
            outputs = found.outputs
            different = _distinct(recipes.values())
            for number, chosen in enumerate(different):
                steps, plan = steps_of(chosen.passes), plans[str(chosen.passes)]
                tokens = _calibration_tokens(steps)
                data = read_data(original, calib, samples=samples, tokens=tokens, seed=seed)
                journal = work / "journal" if number == 0 else work / "journal" / str(number)
                context = Context(
                    store=store,
                    seed=seed,
                    exclude=tuple(exclude),
                    tick=progress.tick,
                    work=work / "activations",
                    activations=None if memory is None else max(0, memory - plan.memory_bytes),
                    journal=Journal(journal, _facts(steps, seed, exclude), resume=resume),
                )
                if number == 0:
                    if ahead:
                        for batch in measured_batches(reference, plan, data):
                            reference.begin(batch)
                    clock.start("canonicalize")
                    manager = PassManager(canonicalize_steps(), verify=verify, observer=progress.pass_event)
                    model, canonical = manager.run(
                        model, context=context, probe=found.batches, calibration=data.calibration, outputs=outputs
                    )
                    outputs = manager.outputs
                    for backend in backends.values():
                        backend.check(model)
                clock.start("recipe")
                manager = PassManager(steps, verify=verify, observer=progress.pass_event)
                quantized = model if chosen is different[-1] else model.clone()
                quantized, done = manager.run(
                    quantized, context=context, probe=found.batches, calibration=data.calibration, outputs=outputs
                )
                _require_used(context)
                prepared = Prepared(
                    original=original,
                    reference=reference,
                    found=found,
                    outputs=manager.outputs,
                    data=data,
                    plan=plan,
                    recipe=chosen,
                    context=context,
                    reports=[*canonical, *done],
                )
                todo = [t for t, r in recipes.items() if r == chosen]
                for target in todo:
                    lowered = quantized if target is todo[-1] else quantized.clone()
                    own = Clock(progress, clock.stop())
                    results[target] = finish(prepared, lowered, target, writers[target], own, verify=verify)
        return {target: results[target] for target in places}
    finally:
        progress.close()


def _distinct(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Each recipe once, in order."""
    found: list[Recipe] = []
    for recipe in recipes:
        if recipe not in found:
            found.append(recipe)
    return found


def lower(model: Model, target: str = "ort-cpu", *, verify: bool = True) -> tuple[Model, Coverage]:
    """Lowers a canonical model to a target's operators, without writing anything.

    Returns:
        The lowered model and which of its nodes run on the target's own kernels.
    """
    backend = backend_for(target)
    manager = PassManager(list(backend.lowering()), stage="lowering", verify=verify)
    lowered, _ = manager.run(model)
    return lowered, backend.coverage(lowered)


def _calibration_tokens(steps: Sequence[Step]) -> int:
    return max((s.action.calibration_tokens for s in steps), default=CALIBRATION_TOKENS)


def _facts(steps: Sequence[Step], seed: int, exclude: Sequence[str]) -> dict[str, str]:
    """What the work on blocks depends on, beside the model and the data, which are known later."""
    packages = ["numpy", "onnx", "onnx-ir", "onnxruntime"]
    packages += ["torch"] * (importlib.util.find_spec("torch") is not None)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return {
        "version": f"qc {importlib.metadata.version('qc-compiler')} with {versions}",
        "recipe": format_pipeline(steps),
        "seed": str(seed),
        "list of exclusions": str(list(exclude)),
    }


def _recipe(name: str, passes: str | None) -> Recipe:
    if passes is None:
        return load_recipe(name)
    entries = [
        {s.action.spec_name(): dataclasses.asdict(s.action) | {"optional": s.optional}} for s in parse_pipeline(passes)
    ]
    return Recipe("custom", "A pipeline given as a string", "", entries)


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
