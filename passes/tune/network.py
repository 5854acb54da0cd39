"""Learns quantized weights of a whole network at once, so that its outputs come close to those of the float network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.digest import digest_batches, digest_model
from qc.ir.quant import Weight, read_weight
from qc.passes._activations import Shelf
from qc.passes.base import Context, Contract, Lossy, Outcome, Result, Site
from qc.passes.pipeline import Step
from qc.passes.tune._learner import Learner, require_torch, trained_sites

__all__ = ["TuneNetwork"]

_TOKENS = 1 << 17
"""512 windows of 256: on fewer, what is learned on the whole network soon fits them and little else."""

_MOVED, _FROZEN = 52, 26
"""Bytes for each weight: as float, in units of its scale, as code, decoded, the gradient of that, and steps between;
and if it moves, what is learned about it, the best of that so far, its gradient, and both moments."""


@dataclasses.dataclass(frozen=True)
class TuneNetwork(Learner):
    """Learns quantized weights by gradients: the outputs of the network come as close as they can to the float ones.

    The loss is ``KL(softmax(float) || softmax(quantized))`` of logits, for networks without logits the squared error of
    the outputs relative to their square. What is learned, how it is judged, kept or given up is as in `tune`; but here
    an error counts by what it does to the outputs, and every layer may make up for the others. Where ranges of
    activations are quantized before, what is learned knows of them.

    Published methods are choices among the options: E2E-QP of EfficientQAT (arXiv 2407.11062, section 3.3) is scale
    with adam, with codes as they are; quantization-aware training with distillation (EdgeQAT, arXiv 2402.10787) is
    weights and range; MobileQuant (arXiv 2408.13933) is transforms, range and activations, behind `smooth` and static
    `quantize-activations`.

    Memory holds the whole network, each weight a few times over: `tune` needs that of one block. Left alone, with the
    reason: weights that are not on a uniform grid. Needs torch; computes on CUDA where there is one.

    Attributes:
        learn: What is learned: rounding, weights, low-rank, range, scale, norms, activations, transforms.
        optimizer: sign (the sign of the gradient) or adam.
        steps: Number of steps.
        batch: Calibration batches in a step.
        rate: Length of a step of rounding, weights and low-rank, in code units; falls linearly to zero.
        range_rate: Length of a step of range, scale, activations and transforms, as a factor; likewise.
        rank: Of low-rank.
        exclude: Regular expressions of layers that are left as they are.
    """

    contract: ClassVar[Contract] = Lossy()

    learn: tuple[str, ...] = ("weights", "range", "norms")
    optimizer: str = "adam"
    steps: int = 100
    batch: int = 4
    range_rate: float = 0.002

    @property
    def calibration_tokens(self) -> int:
        return _TOKENS

    @property
    def wants_reference(self) -> bool:
        return True

    @property
    def bytes_per_parameter(self) -> int:
        return _MOVED if {"rounding", "weights", "low-rank", "transforms"} & set(self.learn) else _FROZEN

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = context or Context()
        require_torch()
        reference = context.reference
        originals = {} if reference is None else {v.name: n for n in reference.graph for v in n.outputs}

        def original(node: ir.Node, weight: Weight) -> np.ndarray | str:
            """The float weight of the same product, else what the codes decode to."""
            same = originals.get(node.outputs[0].name)
            found = read_weight(same.inputs[1]) if same is not None and same.op_type == node.op_type else None
            if found is None or found.shape != weight.shape:
                return weight.quantized().decode()
            numbers = found.numpy()
            found.release()
            return numbers

        layers, sites = self.layers(model, context, original)
        if not layers:
            return Result.of(model, sites)
        batches = context.calibration
        if reference is None or not batches:
            reason = (
                "there is no calibration data to learn from"
                if reference is not None
                else "nothing was quantized in this run"
            )
            return Result.of(model, [*sites, *(Site(layer.name, Outcome.SKIPPED, reason) for layer in layers)])
        from qc.passes.tune._checkpoint import Checkpoint
        from qc.passes.tune._loss import NetworkLoss

        shelf, checkpoint = Shelf(context.work, context.activations), None
        if context.journal is not None:
            facts = {
                "pipeline": str(Step(self)),
                "calibration data": digest_batches(batches),
                "model": digest_model(reference),
                "quantized model": digest_model(model),
            }
            checkpoint = Checkpoint(context.journal, facts)
        found, groups = self.train(
            model,
            context,
            layers,
            "",
            lambda learned, device: NetworkLoss(model, reference, batches, learned, shelf, device),
            checkpoint=checkpoint,
        )
        facts = {"before": found.before, "after": found.after}
        note = f"distance from the float outputs on batches not learned from: {found.before:.4g} to {found.after:.4g}"
        return Result.of(model, [*sites, *groups, *trained_sites(layers, found, facts)], [note])
