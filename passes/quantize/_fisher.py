"""How much the loss of the whole network depends on each single weight: the diagonal of the Fisher information.

    F_nk = mean over samples of (d loss / d w_nk)^2

is, up to a factor, the curvature of the loss at a network that models its data well, so that an error ``d`` of the
weights costs about ``sum F_nk d_nk^2 / 2`` (SqueezeLLM, arXiv 2306.07629, section 4.1). The loss is the cross
entropy of the next token of the calibration text where there are logits and tokens. Any other network has no labels;
its outputs count as means of normal variables: the gradient of their sum with random normal weights, squared, has the
diagonal of ``J^T J`` as its mean, J the derivatives of all outputs.

Needs torch, and as much memory as the float weights take beside the activations of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.model import port_of
from qc.ir.quant import Weight
from qc.ir.store import Store

if TYPE_CHECKING:
    import torch

__all__ = ["FISHER_BYTES", "FISHER_TOKENS", "fisher"]

FISHER_TOKENS = 16384
"""Each window of text is one sample, so it takes a few dozen."""

FISHER_BYTES = 16
"""Memory for each weight: the weight in float, its gradient, the square of that, and the sum of squares."""

_MOST = 1 << 27
"""Elements whose gradients are held at a time: further ones take a run over the data of their own."""

_CACHE = frozenset({"present_key", "present_value"})


def fisher(
    model: ir.Model, weights: Sequence[Weight], batches: Sequence[Mapping[str, np.ndarray]], seed: int, threads: int
) -> dict[ir.Value, ir.TensorProtocol]:
    """Measures the diagonal Fisher information of float weights.

    Args:
        model: The network, not changed.
        weights: Weights that it reads.
        batches: Inputs; each row of a batch counts as a sample.
        seed: Of the random weights of outputs, where there are no labels.
        threads: Number of threads.

    Returns:
        By what consumers read, ``[N, K]`` in float32, in a file.

    Raises:
        InputError: If torch is not installed, or no output depends on the weights.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError("Fisher information needs PyTorch: pip install 'qc-compiler[torch]'.") from error
    store, found, before = Store(), {}, torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        for group in _groups(weights):
            loss = _Loss(model, group, seed)
            totals = [np.zeros(w.matrix, np.float32) for w in group]
            for sample in _samples(batches):
                for total, gradient in zip(totals, loss.gradients(sample), strict=True):
                    np.add(total, np.square(gradient.reshape(total.shape)), out=total)
            for weight, total in zip(group, totals, strict=True):
                found[weight.value] = store.put(f"{weight.name}.fisher", total)
    finally:
        torch.set_num_threads(before)
    return found


def _groups(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Weights in groups of at most `_MOST` elements, or of one weight."""
    groups: list[list[Weight]] = []
    room = 0
    for weight in {w.value: w for w in weights}.values():
        size = weight.matrix[0] * weight.matrix[1]
        if size > room or not groups:
            groups.append([])
            room = _MOST
        groups[-1].append(weight)
        room -= size
    return groups


def _samples(batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The rows of all batches whose inputs agree in their number of rows, else the batches."""
    samples = []
    for batch in batches:
        counts = {array.shape[0] if array.ndim else 1 for array in batch.values()}
        rows = range(counts.pop()) if len(counts) == 1 else []
        samples += [{n: a[i : i + 1] for n, a in batch.items()} for i in rows] or [dict(batch)]
    return samples


class _Loss:
    """The loss of a network as a function of some of its weights."""

    def __init__(self, model: ir.Model, weights: Sequence[Weight], seed: int) -> None:
        import torch

        from qc.ir.execute import Executor

        self._torch, self._rng = torch, torch.Generator().manual_seed(seed)
        self._leaves = [torch.from_numpy(np.array(w.numpy())).requires_grad_() for w in weights]
        ports = [port_of(v) for v in model.graph.outputs]
        logits = [p.name for p in ports if p.role == "logits"]
        self._tokens, self._mask = (
            next((port_of(v).name for v in model.graph.inputs if port_of(v).role == role), None)
            for role in ("tokens", "mask")
        )
        self._logits = logits[0] if logits and self._tokens is not None else None
        floats = [p.name for p in ports if p.role not in _CACHE and p.dtype.is_floating_point()]
        self._names = [self._logits] if self._logits is not None else floats
        if not self._names:
            raise InputError("Expected a network with outputs of floating point, whose loss depends on its weights.")
        given = {w.value: leaf for w, leaf in zip(weights, self._leaves, strict=True)}
        self._run = Executor(model, outputs=self._names, parameters=given, straight_through=True)

    def gradients(self, sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The derivative of the loss by each weight; zeros where there is none."""
        outputs = self._run(sample)
        loss = self._cross_entropy(outputs[self._logits], sample) if self._logits else self._projection(outputs, sample)
        found = self._torch.autograd.grad(loss, self._leaves, allow_unused=True)
        return [
            np.zeros(leaf.shape, np.float32) if g is None else g.numpy()
            for leaf, g in zip(self._leaves, found, strict=True)
        ]

    def _cross_entropy(self, logits: torch.Tensor, sample: Mapping[str, np.ndarray]) -> torch.Tensor:
        tokens = self._torch.from_numpy(np.asarray(sample[str(self._tokens)], np.int64))
        scores, labels = logits[:, :-1].float(), tokens[:, 1:]
        losses = self._torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
        seen = self._seen(sample)
        return losses.sum() if seen is None else (losses * seen[:, 1:].flatten()).sum()

    def _projection(self, outputs: Mapping[str, torch.Tensor], sample: Mapping[str, np.ndarray]) -> torch.Tensor:
        total, seen = self._torch.zeros(()), self._seen(sample)
        for name in self._names:
            output = outputs[str(name)].float()
            random = self._torch.randn(output.shape, generator=self._rng)
            if seen is not None and output.ndim == 3 and output.shape[:2] == seen.shape:
                random *= seen[..., None]
            total = total + (output * random).sum()
        return total

    def _seen(self, sample: Mapping[str, np.ndarray]) -> torch.Tensor | None:
        """Where there are tokens, of inputs of that length."""
        if self._mask is None or self._tokens is None or self._mask not in sample:
            return None
        mask = np.asarray(sample[self._mask])
        return self._torch.from_numpy(mask.astype(np.float32)) if mask.shape == sample[self._tokens].shape else None
