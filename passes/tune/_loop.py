"""The one optimizer loop: part of a network against what its float part yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from qc.ir.execute import Executor
from qc.passes.tune._weight import LearnedWeight

if TYPE_CHECKING:
    from qc.passes.sweep import BlockData

__all__ = ["Schedule", "Trained", "train"]

_JUDGES = 8
"""One batch in so many judges, and is not learned from."""

_MOST_JUDGES = 16

_CHECKS = 10
"""How often the loss is judged."""

_WEAK = 0.05
"""Rate of everything that is no weight (gains and biases), relative to that of ranges: they are floats, and few."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How to learn.

    Attributes:
        optimizer: ``sign`` or ``adam``.
        steps: Number of steps.
        batch: Calibration batches in a step.
        rate: Step length of what moves codes, in code units; falls linearly to zero.
        range_rate: Step length of factors of ranges and scales, likewise.
        both: Whether the loss counts the distance to the float part on the quantized inputs too.
    """

    optimizer: str
    steps: int
    batch: int
    rate: float
    range_rate: float
    both: bool


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
    block: BlockData,
    weights: Mapping[str, LearnedWeight],
    vectors: Mapping[str, torch.Tensor],
    schedule: Schedule,
    rng: np.random.Generator,
    device: str,
) -> Trained:
    """Learns, and keeps the best that was seen on batches which are not learned from; never worse than the start.

    Args:
        block: The part and its activations.
        weights: The weights by the name of their decoded value.
        vectors: Float parameters by the name under which they are read.
        schedule: How.
        rng: Chooses the batches.
        device: Where to compute.
    """
    part = block.part()
    loss = _Loss(block, part, weights, vectors, schedule.both, device)
    judges = range(0, block.count, max(_JUDGES, -(-block.count // _MOST_JUDGES)))
    learners = [i for i in range(block.count) if i not in judges] or list(judges)
    groups = [
        {"params": [p for w in weights.values() for n, p in w.parameters.items() if n in names], "lr": rate}
        for names, rate in ((("offset", "up", "down"), schedule.rate), (("high", "low", "factor"), schedule.range_rate))
    ]
    groups.append({"params": list(vectors.values()), "lr": _WEAK * schedule.range_rate})
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.SGD(groups) if schedule.optimizer == "sign" else torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, schedule.steps)
    learned = [p for g in groups for p in g["params"]]
    before = best = loss.judge(judges)
    kept = [p.detach().clone() for p in learned]
    order: list[int] = []
    for step in range(1, schedule.steps + 1):
        while len(order) < schedule.batch:
            order += rng.permutation(learners).tolist()
        drawn, order = order[: schedule.batch], order[schedule.batch :]
        optimizer.zero_grad()
        loss.backward(drawn)
        if schedule.optimizer == "sign":
            for p in learned:
                if p.grad is not None:
                    p.grad.sign_()
        optimizer.step()
        decay.step()
        for weight in weights.values():
            weight.bound()
        if step % max(1, schedule.steps // _CHECKS) == 0 or step == schedule.steps:
            found = loss.judge(judges)
            if found < best:
                best, kept = found, [p.detach().clone() for p in learned]
    with torch.no_grad():
        for p, value in zip(learned, kept, strict=True):
            p.copy_(value)
    return Trained(before, best)


class _Loss:
    """Squared distance of a part's outputs from those of the float part, relative to the square of the latter."""

    def __init__(
        self,
        block: BlockData,
        part: ir.Model,
        weights: Mapping[str, LearnedWeight],
        vectors: Mapping[str, torch.Tensor],
        both: bool,
        device: str,
    ) -> None:
        self._block, self._weights, self._device = block, weights, device
        outputs = [v for v in part.graph.outputs if v.name in block.targets and v.dtype in _FLOATS]
        self._executor = Executor(part, outputs=outputs, device=device, straight_through=True)
        decoded = {str(v.name): v for n in part.graph for v in n.outputs}
        self._decoded = {name: decoded[name] for name in weights}
        decoded |= dict(part.graph.initializers)
        self._executor.parameters |= {v: torch.empty(0) for v in self._decoded.values()}  # what is behind is not read
        self._executor.parameters |= {decoded[name]: tensor for name, tensor in vectors.items()}
        self._names = [str(v.name) for v in outputs]
        self._inputs = {str(v.name) for v in part.graph.inputs}
        self._float = Executor(block.reference, outputs=self._names, device=device) if both else None

    def backward(self, batches: Sequence[int]) -> None:
        """Adds the gradient over some batches to everything that is learned."""
        made = {name: weight() for name, weight in self._weights.items()}
        # The gradient of each decoded weight is summed over the batches first: it is decoded once.
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in made.items()}
        self._set(leaves)
        for batch in batches:
            (self._of(batch) / len(batches)).backward()
        pairs = [(tensor, leaves[name].grad) for name, tensor in made.items() if tensor.requires_grad]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])

    @torch.no_grad()
    def judge(self, batches: Sequence[int]) -> float:
        """The loss with the integers and scales as they would be stored."""
        self._set({n: torch.from_numpy(w.export().decode()).to(self._device) for n, w in self._weights.items()})
        return sum(float(self._of(batch)) for batch in batches) / len(batches)

    def _set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._executor.parameters[self._decoded[name]] = tensor

    def _of(self, batch: int) -> torch.Tensor:
        inputs = {n: x for n, x in self._block.inputs(batch).items() if n in self._inputs}
        found, expected = self._executor(inputs), self._block.expected(batch)
        total = self._distance(found, {n: torch.from_numpy(np.array(expected[n])) for n in self._names})
        if self._float is not None:
            with torch.no_grad():
                local = self._float(inputs)
            total = total + self._distance(found, local)
        return total

    def _distance(self, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> torch.Tensor:
        parts = []
        for name in self._names:
            target = expected[name].to(self._device, torch.float32)
            parts.append((found[name].float() - target).square().mean() / target.square().mean().clamp(min=1e-20))
        return torch.stack(parts).mean()


_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
