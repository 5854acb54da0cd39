"""Tries formats on a copy of a network, and tells how far its outputs move."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.model import Model, port_of
from qc.ir.pooling import POOLINGS, embedding
from qc.ir.quant import Format
from qc.ir.runtime import Session
from qc.ir.store import Store
from qc.passes.base import Context
from qc.passes.quantize._sites import weight_uses
from qc.passes.quantize.weights import QuantizeWeights
from qc.passes.statistics import Statistic

__all__ = ["Trial"]

Batch = Mapping[str, np.ndarray]

_CACHE = frozenset({"present_key", "present_value"})


class Trial:
    """A network, and what it yields on some batches."""

    def __init__(self, model: Model, context: Context, batches: Sequence[Batch]) -> None:
        """Runs `model`, which must not change while this object lives."""
        self._model, self._context, self._batches = model, context, batches
        roles = {str(v.name): port_of(v).role for v in model.graph.outputs}
        self._logits = {name for name, role in roles.items() if role == "logits"}
        self._outputs = self._logits or {name for name, role in roles.items() if role not in _CACHE}
        masks = [str(v.name) for v in model.graph.inputs if port_of(v).role == "mask"]
        hidden = {name for name, role in roles.items() if role == "hidden"} & self._outputs
        pooling = model.provenance.get("pooling", "")
        self._mask, self._pooling = "", ""
        if hidden and masks and pooling in POOLINGS:
            self._outputs, self._mask, self._pooling = hidden, masks[0], pooling
        self._expected = self._run(model)

    def divergence(self, plan: Mapping[int, Format]) -> float:
        """How far the outputs move if weights are quantized by range search.

        Args:
            plan: Formats by the number of a use in `weight_uses`; weights of other uses stay as they are.

        Returns:
            The mean of ``KL(before || after)`` over all positions of logits; without logits, the squared error of the
            embedding of a sentence encoder whose pooling is known, or of all outputs, relative to their squares.
        """
        copy = self._model.clone()
        statistics, scope = {}, []
        for number, (old, new) in enumerate(zip(weight_uses(self._model), weight_uses(copy), strict=True)):
            if number in plan:
                new.plan(plan[number])
                scope.append(new.node)
                known, wanted = (use.statistic(Statistic.SECOND_MOMENT) for use in (old, new))
                if wanted is not None and known in self._context.statistics:
                    statistics[wanted] = self._context.statistics[known]
        context = dataclasses.replace(
            self._context,
            store=Store(),
            statistics=statistics,
            scope=frozenset(scope),
            memo={},
            exclude=(),
            tick=None,
        )
        QuantizeWeights().call(copy, context)
        dialect.sync_functions(copy)
        found = self._run(copy)
        pairs = [(a[name], b[name]) for a, b in zip(self._expected, found, strict=True) for name in self._outputs]
        if self._logits:
            return float(np.mean([_kl(a, b) for a, b in pairs]))
        noise = sum(float(np.sum((a - b) ** 2, dtype=np.float64)) for a, b in pairs)
        return noise / max(sum(float(np.sum(a**2, dtype=np.float64)) for a, _ in pairs), 1e-30)

    def _run(self, model: ir.Model) -> list[dict[str, np.ndarray]]:
        session = Session(model)
        runs = []
        for batch in self._batches:
            outputs = session.run(batch)
            floats = {name: outputs[name] for name in self._outputs if outputs[name].dtype.kind == "f"}
            runs.append({name: self._pooled(value, batch) for name, value in floats.items()})
        self._outputs = set(runs[0]) if runs else set()
        return runs

    def _pooled(self, value: np.ndarray, batch: Batch) -> np.ndarray:
        """Token vectors as the sentence's one, where it is known how; errors that cancel there do not count."""
        if not self._pooling or value.ndim != 3:
            return value
        return embedding(value, np.asarray(batch[self._mask]), self._pooling)


def _kl(before: np.ndarray, after: np.ndarray) -> float:
    """Mean divergence in nats over all positions, a row at a time."""
    total = 0.0
    p, q = (a.reshape(-1, a.shape[-1]) for a in (before, after))
    for rows in zip(p, q, strict=True):
        a, b = (_log_softmax(row.astype(np.float64)) for row in rows)
        total += float(np.sum(np.exp(a) * (a - b)))
    return total / len(p)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.sum(np.exp(x)))
