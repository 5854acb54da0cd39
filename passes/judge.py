"""Holds what a model yields before and after passes against what they promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qc.ir.errors import ContractError
from qc.ir.model import Model
from qc.ir.probe import continues_cache, run_in_turn
from qc.ir.runtime import Session
from qc.ir.verify import Difference, compare, tolerance
from qc.passes.base import Exact

__all__ = ["Outputs", "outputs_of", "require_equal", "worst"]

Outputs = list[dict[str, np.ndarray]]
"""Per batch, arrays by the names of outputs."""


def outputs_of(model: Model, batches: Sequence[Mapping[str, np.ndarray]]) -> Outputs:
    """What `model` yields on `batches`; nothing is loaded if there are none."""
    if not batches:
        return []
    return run_in_turn(Session(model).run, model.signature, batches)


def worst(before: Outputs, after: Outputs) -> list[Difference]:
    """Per output, the batch with the lowest SQNR."""
    found: dict[str, Difference] = {}
    for old, new in zip(before, after, strict=True):
        for difference in compare(old, new):
            if difference.output not in found or difference.sqnr < found[difference.output].sqnr:
                found[difference.output] = difference
    return list(found.values())


def require_equal(
    name: str,
    contract: Exact,
    before: Outputs,
    after: Outputs,
    previous: Model,
    model: Model,
    batches: Sequence[Mapping[str, np.ndarray]],
) -> list[Difference]:
    """Compares what `previous` and `model` yield on `batches`, as `contract` says.

    Args:
        name: The pass, for the message.
        contract: What it promises.
        before: What `previous` yields.
        after: What `model` yields.
        previous: The model before the pass.
        model: The model behind it.
        batches: Inputs of both.

    Returns:
        The worst difference per output.

    Raises:
        ContractError: If an output differs by more; names the first value that does.
    """
    tol = tolerance(model, contract.tol)
    caches = set() if contract.cache else {present.name for _, present in model.signature.caches}
    compared = []
    for number, (batch, old, new) in enumerate(zip(batches, before, after, strict=True)):
        if caches and not continues_cache(model.signature, batch, after[number - 1] if number else {}):
            continue  # a cache of unknown origin: it means one thing to the one model, another to the other
        compared.append(({n: v for n, v in old.items() if n not in caches}, new))
        for difference in compare(*compared[-1]):
            if not difference.max_abs <= tol * difference.scale:
                where = _first_difference(previous, model, batch, tol)
                raise ContractError(
                    f"Pass {name} promises outputs equal to {tol:g} (relative to the largest value), but output "
                    f"{difference.output!r} differs by {difference.max_abs:.3g} (largest value "
                    f"{difference.scale:.3g}). {where} This is a defect of the pass: exclude it, and report the "
                    "model's operators around that value."
                )
    return worst([old for old, _ in compared], [new for _, new in compared])


def _first_difference(previous: Model, model: Model, batch: Mapping[str, np.ndarray], tol: float) -> str:
    """Names the first value, in execution order, that both graphs have and that differs."""
    shared = {v.name for n in model.graph for v in n.outputs} & {v.name for n in previous.graph for v in n.outputs}
    old, new = (_inner_values(m, shared, batch) for m in (previous, model))
    for difference in compare(old, new):
        if not difference.max_abs <= tol * difference.scale:
            producer = next(n for n in model.graph for v in n.outputs if v.name == difference.output)
            return (
                f"The first value that differs is {difference.output!r} (by {difference.max_abs:.3g}), made by "
                f"{producer.domain or 'onnx'}::{producer.op_type}."
            )
    return "No inner value that both graphs share differs before the output."


def _inner_values(model: Model, names: set[str | None], batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    probe = model.clone()
    own = set(probe.graph.outputs)
    known = [v for n in probe.graph for v in n.outputs if v.name in names and v.dtype is not None and v not in own]
    probe.graph.outputs.extend(known)
    results = Session(probe).run(batch)
    return {v.name: results[v.name] for n in probe.graph for v in n.outputs if v.name in results}  # type: ignore[misc]
