"""The one optimizer loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qc.passes.tune._checkpoint import Checkpoint
from qc.passes.tune._loss import Loss, Parameters

__all__ = ["Schedule", "Trained", "train"]

_JUDGES = 8
"""One batch in so many judges, and is not learned from."""

_MOST_JUDGES = 16

_CHECKS = 5
"""How often the loss is judged."""

_WEAK = 0.05
"""Rate of everything that is no weight (gains and biases), relative to that of ranges: they are floats, and few."""

_MOVED_BY = (("offset", "up", "down"), ("high", "low", "factor", "logarithm"), ("vector",))
"""Names of parameters that are moved by ``rate``, by ``range_rate``, and by little."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How to learn.

    Attributes:
        optimizer: ``sign`` or ``adam``.
        steps: Number of steps.
        batch: Calibration batches in a step.
        rate: Step length of what moves codes, in code units; falls linearly to zero.
        range_rate: Step length of factors of ranges and scales, likewise.
    """

    optimizer: str
    steps: int
    batch: int
    rate: float
    range_rate: float


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` found.

    Attributes:
        before: The loss on the judging batches at the start, relative to the square of the outputs.
        after: The smallest that was seen; what was learned is set to where it was.
    """

    before: float
    after: float


def train(
    loss: Loss,
    learned: Sequence[Parameters],
    schedule: Schedule,
    rng: np.random.Generator,
    *,
    checkpoint: Checkpoint | None = None,
    tick: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Learns, and keeps the best that was seen on batches which are not learned from; never worse than the start.

    Args:
        loss: What is to become small.
        learned: What it depends on.
        schedule: How.
        rng: Chooses the batches.
        checkpoint: Where the state is written down, and read from.
        tick: Called before every step with its number.
    """
    judges = range(0, loss.count, max(_JUDGES, -(-loss.count // _MOST_JUDGES)))
    learners = [i for i in range(loss.count) if i not in judges] or list(judges)
    rates = (schedule.rate, schedule.range_rate, _WEAK * schedule.range_rate)
    groups = [
        {"params": [p for v in learned for n, p in v.parameters.items() if n in names], "lr": rate}
        for names, rate in zip(_MOVED_BY, rates, strict=True)
    ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        return Trained(start := loss.judge(judges), start)
    optimizer = torch.optim.SGD(groups) if schedule.optimizer == "sign" else torch.optim.Adam(groups, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, schedule.steps)
    moved = [p for g in groups for p in g["params"]]
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None:
        before = best = loss.judge(judges)
        kept, order, done = [p.detach().clone() for p in moved], [], 0
    else:
        before, best, kept, order, done = (saved[k] for k in ("before", "best", "kept", "order", "done"))
        _set(moved, saved["moved"])
        optimizer.load_state_dict(saved["optimizer"])
        decay.load_state_dict(saved["decay"])
        rng.bit_generator.state = saved["rng"]
    for step in range(done + 1, schedule.steps + 1):
        tick(step)
        while len(order) < schedule.batch:
            order += rng.permutation(learners).tolist()
        drawn, order = order[: schedule.batch], order[schedule.batch :]
        optimizer.zero_grad()
        loss.backward(drawn)
        if schedule.optimizer == "sign":
            for p in moved:
                if p.grad is not None:
                    p.grad.sign_()
        optimizer.step()
        decay.step()
        for value in learned:
            value.bound()
        if step % max(1, schedule.steps // _CHECKS) == 0 or step == schedule.steps:
            found = loss.judge(judges)
            if found < best:
                best, kept = found, [p.detach().clone() for p in moved]
        if checkpoint is not None and (step == schedule.steps or checkpoint.is_due()):
            state = {"before": before, "best": best, "kept": kept, "order": order, "done": step, "moved": moved}
            state |= {"optimizer": optimizer.state_dict(), "decay": decay.state_dict(), "rng": rng.bit_generator.state}
            checkpoint.save(state)
    _set(moved, kept)
    return Trained(before, best)


@torch.no_grad()
def _set(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
