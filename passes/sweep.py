"""One pass over a network, part by part: each part is changed knowing what the changed parts before it really yield.

For every part in the order of execution (`qc.ir.blocks`): the float part runs on the float activations; the statistics
that each pass needs are collected on the activations of the model as it is by now; the passes work on this part alone;
its outputs are computed for the next one, and compared with those of the float part. Memory holds one part, and the
activations between two parts, which go to mapped files beyond a limit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.digest import digest_batches, digest_model
from qc.ir.errors import ContractError, InputError
from qc.ir.model import Model
from qc.ir.quant import Weight
from qc.ir.runtime import Session
from qc.ir.verify import compare, tolerance
from qc.passes._activations import Shelf, Stream
from qc.passes._partition import Partition
from qc.passes.base import BlockPass, Context, Exact, Result, Site
from qc.passes.journal import Entry
from qc.passes.pipeline import Step, format_pipeline
from qc.passes.statistics import Request, collect, synthetic

__all__ = ["FOLDED", "BlockData", "BlockError", "Swept", "sweep", "wants_sweep"]

_MEASURED = 4
"""Batches on which the float parts run when no pass learns from them: enough to tell the error of a part."""

FOLDED = 1 << 30
"""Bytes of the weights of a part up to which they are decoded once for all batches, and not for each again. No other
limit counts here: sums come in another order, and results must not depend on the memory that is there."""

_WIDEST = 4
"""Outputs of the network count as targets if they are at most so many times as large as what the part reads: logits
would outweigh everything else."""

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BlockError:
    """How far a part's outputs are from those of the float network, over the calibration batches.

    Attributes:
        label: Which part: ``block 0.3``.
        before: Signal to noise ratio of what it reads, in decibels; None if that is exact.
        after: The same of what it yields.
    """

    label: str
    before: float | None
    after: float | None


@dataclasses.dataclass(frozen=True)
class Swept:
    """What one step of a sweep did on all parts together.

    Attributes:
        step: The step.
        result: Its sites and notes, in the order of the parts.
        seconds: Time that it took.
    """

    step: Step
    result: Result
    seconds: float


class BlockData:
    """What a pass learns from: the activations of one part of the network, batch by batch.

    Attributes:
        label: Which part.
        count: Number of batches.
        reference: The float part: a model of its own, with the names of the network.
        targets: Names of the outputs to come close to.
        originals: The float weights that passes of this sweep have replaced, by the value that is read instead.
    """

    def __init__(self, label: str, reference: Model, partition: Partition, k: int, float_: Stream, changed: Stream):
        self.label, self.reference, self.count = label, reference, float_.count
        self.targets = tuple(str(v.name) for v in reference.graph.outputs)
        self.originals: dict[ir.Value, Weight] = {}
        self._partition, self._k, self._float, self._changed = partition, k, float_, changed

    def part(self) -> Model:
        """The part as it is now: a model of its own, whose weights are shared."""
        return self._partition.cut(self._k, to_the_end=True)

    def inputs(self, batch: int) -> Batch:
        """What the part reads, as the changed network yields it; more than that may be there."""
        return self._changed.batch(batch)

    def float_inputs(self, batch: int) -> Batch:
        """What the float part reads."""
        return self._float.batch(batch)

    def expected(self, batch: int) -> dict[str, np.ndarray]:
        """What the float part yields on `float_inputs`, by name."""
        found = self._float.batch(batch)
        return {name: found[name] for name in self.targets}


def wants_sweep(steps: Sequence[Step]) -> bool:
    """Whether one of these neighbouring steps works better knowing what the changed parts before it yield."""
    actions = (s.action for s in steps)
    return any(isinstance(a, BlockPass) and a.sequential and not a.whole for a in actions)


def sweep(
    model: Model, steps: Sequence[Step], context: Context, batches: Sequence[Batch] | None
) -> tuple[Model, list[Swept], list[BlockError]]:
    """Runs block passes over `model`, part by part.

    Args:
        model: Changed in place, unless the journal knows better.
        steps: Steps whose actions are block passes.
        context: What they may use; `Context.activations` bounds the memory of activations.
        batches: Inputs to calibrate on; None makes synthetic ones.

    Returns:
        The model, what each step did, and the error of each part.

    Raises:
        InputError: If the network cannot be run on the batches, or yields NaN.
        ContractError: If an exact pass changed what a part computes.
    """
    inputs = list(batches) if batches is not None else synthetic(model, context.seed)
    begun, number, entry, journal = model.clone(), 0, None, context.journal
    if journal is not None:
        facts = {
            "pipeline": format_pipeline(steps),
            "model": digest_model(model),
            "calibration data": digest_batches(inputs),
        }
        number = journal.begin(facts)
        entry = journal.load(number, begun, context.store)
    work = _Sweep(begun, model, steps, context, inputs)
    if entry is not None:
        work.go_on(*entry)
    for k in range(len(work.labels)):
        if work.part(k) and journal is not None:
            journal.save(number, begun, work.model, context.store, work.entry())
            entry = journal.load(number, begun, context.store)
            assert entry is not None
            work.go_on(
                *entry
            )  # from what a killed compile would find, so that it cannot differ: names that are made up
    return work.model, work.swept(), work.errors


class _Sweep:
    def __init__(
        self, original: Model, model: Model, steps: Sequence[Step], context: Context, batches: Sequence[Batch]
    ) -> None:
        self.model, self._steps, self._context = model, steps, context
        self._float, self._now = Partition(original), Partition(model)
        self.labels = self._float.labels
        learns = any(isinstance(s.action, BlockPass) and s.action.learns for s in steps)
        self._decoded = [_float_bytes(self._float.cut(k)) for k in range(len(self.labels))]
        shelf = Shelf(context.work, context.activations)
        self._changed_stream = Stream(batches, shelf)
        self._float_stream = Stream(batches if learns else batches[:_MEASURED], shelf)
        self._memos: list[dict[object, object]] = [{} for _ in steps]
        self._sites: list[list[Site]] = [[] for _ in steps]
        self._notes: list[list[str]] = [[] for _ in steps]
        self._seconds = [0.0] * len(steps)
        self._modified: list[bool] = []
        self.errors: list[BlockError] = []

    def go_on(self, model: Model, entry: Entry) -> None:
        """Takes over what the journal holds."""
        self.model, self._now = model, self._float.moved(model, entry.owners)
        self._modified = list(entry.modified)
        self._memos = [dict(m) for m in entry.memos]
        self._sites, self._notes = [list(s) for s in entry.sites], [list(n) for n in entry.notes]
        self._context.used_patterns.update(entry.used)

    def entry(self) -> Entry:
        """What the journal writes down."""
        return Entry(
            owners=self._now.owners,
            modified=self._modified,
            sites=self._sites,
            notes=self._notes,
            memos=self._memos,
            used=sorted(self._context.used_patterns),
        )

    def swept(self) -> list[Swept]:
        return [
            Swept(step, Result.of(self.model, sites, notes), seconds)
            for step, sites, notes, seconds in zip(self._steps, self._sites, self._notes, self._seconds, strict=True)
        ]

    def part(self, k: int) -> bool:
        """Works on one part; returns False if it only had to be run, because the journal knew it."""
        label, known = self.labels[k], k < len(self._modified)
        self._context.progress(k, len(self.labels), f"{label}, from the journal" if known else label)
        to_the_end = self._is_last_and_small(k)
        reference = self._float.cut(k, to_the_end=to_the_end)
        self._run_float(k, reference)
        if not known:
            data = BlockData(label, reference, self._now, k, self._float_stream, self._changed_stream)
            changed = [self._pass(number, k, data) for number in range(len(self._steps))]
            self._modified.append(any(changed))
        self._run_changed(k, self._modified[k], to_the_end)
        self.errors.append(BlockError(label, self._sqnr(reference.graph.inputs), self._sqnr(reference.graph.outputs)))
        self._float_stream.retain(self._float.needed_after(k))
        self._changed_stream.retain(self._now.needed_after(k))
        return not known

    def _is_last_and_small(self, k: int) -> bool:
        """Whether a part makes outputs of the network and nothing else, no larger than its activations."""
        if self._float.cut(k).graph.outputs:
            return False
        part = self._float.cut(k, to_the_end=True)
        return _width(part.graph.outputs) <= _WIDEST * max(_width(part.graph.inputs), 1)

    def _folds(self, k: int, batches: int) -> bool:
        """Whether the weights of a part are decoded once for so many batches."""
        return batches > _MEASURED and self._decoded[k] <= FOLDED

    def _run_float(self, k: int, reference: Model) -> None:
        names = [str(v.name) for v in reference.graph.outputs]
        if not names:
            return
        session = Session(reference, fold=self._folds(k, self._float_stream.count))
        for i in range(self._float_stream.count):
            outputs = session.run(self._float_stream.batch(i))
            for name in names:
                if outputs[name].dtype.kind == "f" and np.isnan(outputs[name]).any():
                    raise InputError(
                        f"Expected numbers, found NaN in {name!r}, an output of {self.labels[k]} of the float model on "
                        f"calibration batch {i}. Check that sample, or the weights of that block."
                    )
            self._float_stream.put(i, {name: outputs[name] for name in names})

    def _pass(self, number: int, k: int, data: BlockData) -> bool:
        step, label = self._steps[number], self.labels[k]
        action, scope, started = step.action, self._now.scope(k), time.perf_counter()

        def tick(done: int, total: int, site: str) -> None:
            self._context.progress(k, len(self.labels), f"{label}: {site}")

        context = dataclasses.replace(
            self._context,
            scope=scope,
            statistics=self._collect(action.needs(self.model), scope, k),
            memo=self._memos[number],
            block=data,
            tick=tick,
        )
        exact = action.contract if isinstance(action.contract, Exact) else None
        before = self._probe(k, exact) if exact is not None else {}
        result = action.call(self.model, context)
        assert isinstance(result, Result)
        if result.modified:
            dialect.sync_functions(self.model)
            self._now.adopt(k)
            if exact is not None:
                _require_equal(
                    action.spec_name(), label, tolerance(self.model, exact.tol), before, self._probe(k, exact)
                )
        sites = [dataclasses.replace(s, details={**s.details, "block": label}) for s in result.sites]
        self._sites[number] += sites
        self._notes[number] += [n for n in result.notes if n not in self._notes[number]]
        self._seconds[number] += time.perf_counter() - started
        return result.modified

    def _collect(self, requests: Sequence[Request], scope: frozenset[ir.Node], k: int) -> Mapping[Request, np.ndarray]:
        """The statistics that a pass needs of the values that the nodes of a part read."""
        wanted = [r for r in dict.fromkeys(requests) if any(n in scope for n, _ in r.value.uses())]
        if not wanted or not self._changed_stream.count:
            return {}
        part = self._now.cut(k, to_the_end=True)
        values = {v.name: v for v in (*part.graph.inputs, *(o for n in part.graph for o in n.outputs))}
        inner = {r: dataclasses.replace(r, value=values[r.value.name]) for r in wanted if r.value.name in values}
        batches = (self._changed_stream.batch(i) for i in range(self._changed_stream.count))
        folds = self._folds(k, self._changed_stream.count)
        found = collect(part, list(inner.values()), batches, fold=folds)
        return {r: found[i] for r, i in inner.items() if i in found}

    def _probe(self, k: int, contract: Exact) -> dict[str, np.ndarray]:
        """What a part yields on the first batch, without caches whose coordinates may change."""
        if not self._changed_stream.count:
            return {}
        caches = set() if contract.cache else {present.name for _, present in self.model.signature.caches}
        outputs = Session(self._now.cut(k, to_the_end=True)).run(self._changed_stream.batch(0))
        return {name: value for name, value in outputs.items() if name not in caches}

    def _run_changed(self, k: int, modified: bool, to_the_end: bool) -> None:
        part = self._now.cut(k, to_the_end=to_the_end)
        names = [str(v.name) for v in part.graph.outputs]
        read = [str(v.name) for v in part.graph.inputs]
        complete = self._float_stream.count == self._changed_stream.count
        if not modified and complete and self._changed_stream.equals(self._float_stream, read):
            self._changed_stream.share(self._float_stream, names)
        elif names:
            session = Session(part, fold=self._folds(k, self._changed_stream.count))
            for i in range(self._changed_stream.count):
                outputs = session.run(self._changed_stream.batch(i))
                self._changed_stream.put(i, {name: outputs[name] for name in names})

    def _sqnr(self, values: Sequence[ir.Value]) -> float | None:
        signal = noise = 0.0
        for i in range(self._float_stream.count):
            expected, found = self._float_stream.batch(i), self._changed_stream.batch(i)
            for name in (str(v.name) for v in values):
                if name not in expected or name not in found or expected[name].dtype.kind != "f":
                    continue
                reference = expected[name].astype(np.float64)
                finite = np.isfinite(reference)
                signal += float(np.square(reference, where=finite, out=np.zeros_like(reference)).sum())
                if found[name] is not expected[name]:
                    noise += float(np.square(np.where(finite, found[name] - reference, 0)).sum())
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _float_bytes(model: Model) -> int:
    """What the weights take in float32."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sum(4 * t.size for t in tensors if t is not None and t.dtype.is_floating_point())


def _width(values: Sequence[ir.Value]) -> int:
    return max((v.shape[-1] for v in values if v.shape and isinstance(v.shape[-1], int)), default=0)


def _require_equal(name: str, label: str, tol: float, before: Batch, after: Batch) -> None:
    for difference in compare(before, after):
        if not difference.max_abs <= tol * difference.scale:
            raise ContractError(
                f"Pass {name} must not change what {label} computes, but output {difference.output!r} differs by "
                f"{difference.max_abs:.3g}, more than {tol * difference.scale:.3g}. This is a defect of the "
                "pass; leave it out of the recipe."
            )
