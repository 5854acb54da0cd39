"""Learns the codes, ranges and scales of quantized weights, block by block."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.quant import Weight
from qc.passes.base import BlockPass, Context, Contract, Lossy, Outcome, Result, Site
from qc.passes.tune._learner import Learner, require_torch, trained_sites

__all__ = ["Tune"]

_LOSSES = ("float", "both")


@dataclasses.dataclass(frozen=True)
class Tune(Learner, BlockPass):
    """Learns quantized weights by gradients: each block comes as close as it can to what the float block yields.

    The loss is the squared error of a block's outputs, on what the quantized blocks before it yield, against the float
    block's on the float activations, relative to their square. One calibration batch in eight is not learned from: on
    these, the integers and scales as they would be stored are judged ten times, and the best are kept. So a block never
    becomes worse by this measure, whatever the rates.

    It goes on from the codes that the `quantize-weights` before it chose, in the same sweep. What may be learned
    together: rounding, weights, low-rank, range, scale (formulas: `qc.passes.tune._weight`), norms, the gains and
    biases of the block, activations, the steps of their static grids, and transforms, below. Published methods are
    choices among these: AutoRound is rounding and range with the optimizer sign; Block-AP of EfficientQAT is weights
    and range with adam; OmniQuant's LWC is range with adam, its LET transforms.

    Transforms are positive factors ``s`` of every channel group that admits them, ``x'_k = x_k / s_k`` and
    ``W'_nk = W_nk s_k`` as in `smooth`, from 1 on: from norms into what reads them, from values into the output
    projection, from the linear side of a gate into the product behind it, between queries and keys where these are
    rounded. They are equal in what a rotary embedding turns together and in all query heads on one key-value head, so
    the float network stays the same. They are folded into gains, biases and weights, and each weight is rounded anew,
    on its learned grid. No shifts are learned.

    Left alone, with the reason: parts without a weight on a uniform grid, or whose outputs are too wide to hold; of
    transforms, groups that forbid factors, reach into another block, or hold a weight that is not learned.
    Needs torch; computes on CUDA where there is one.

    Attributes:
        learn: What is learned: rounding, weights, low-rank, range, scale, norms, activations, transforms.
        optimizer: sign (the sign of the gradient) or adam.
        steps: Number of steps per block.
        batch: Calibration batches in a step.
        rate: Length of a step of rounding, weights and low-rank, in code units; falls linearly to zero.
        range_rate: Length of a step of range, scale, activations and transforms, as a factor; likewise.
        loss: float, or both: the distance to the float block on the quantized inputs counts as much.
        rank: Of low-rank.
        exclude: Regular expressions of layers that are left as they are.
    """

    contract: ClassVar[Contract] = Lossy()

    loss: str = "float"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in _LOSSES:
            raise InputError(f"Expected loss of tune to be {' or '.join(_LOSSES)}, found {self.loss!r}.")

    @property
    def sequential(self) -> bool:
        return True

    @property
    def learns(self) -> bool:
        return True

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        if context is None or context.block is None:
            raise InputError(
                "Expected tune to run in a pass manager, which gives it calibration data; see PassManager."
            )
        require_torch()
        block = context.block

        def original(node: ir.Node, weight: Weight) -> np.ndarray | str:
            found = block.originals.get(weight.value)
            if found is None:
                return "it was quantized elsewhere: its float weight is not known here"
            numbers = found.numpy()
            found.release()
            return numbers

        layers, sites = self.layers(model, context, original)
        if not layers:
            return Result.of(model, sites)
        if not block.targets or not block.count:
            reason = (
                "its outputs are too wide to hold for all batches" if block.count else "there is nothing to learn from"
            )
            return Result.of(model, [*sites, *(Site(layer.name, Outcome.SKIPPED, reason) for layer in layers)])
        from qc.passes.tune._loss import BlockLoss

        found, groups = self.train(
            model,
            context,
            layers,
            block.label,
            lambda learned, device: BlockLoss(block, learned, self.loss == "both", device),
        )
        facts = {"before_db": _db(found.before), "after_db": _db(found.after)}
        return Result.of(model, [*sites, *groups, *trained_sites(layers, found, facts)])


def _db(loss: float) -> float | None:
    return round(-10 * math.log10(loss), 3) if loss > 0 and math.isfinite(loss) else None
