"""What learning makes small: the distance of a network, or of a part of one, from what its float original yields."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir
import torch

from qc.ir.execute import Executor
from qc.passes._partition import Partition

if TYPE_CHECKING:
    from qc.ir.model import Model
    from qc.passes._activations import Shelf
    from qc.passes.sweep import BlockData

__all__ = ["BlockLoss", "Learned", "Loss", "NetworkLoss", "Parameters"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

Batch = Mapping[str, np.ndarray]


class Parameters(Protocol):
    """What is learned, by name."""

    parameters: dict[str, torch.Tensor]

    def bound(self) -> None:
        """Brings the parameters back into their bounds."""
        ...


class Learned(Parameters, Protocol):
    """A value of a network as a differentiable function of parameters."""

    def __call__(self) -> torch.Tensor:
        """The value."""
        ...

    def stored(self) -> torch.Tensor:
        """The value as it would be stored: with integers as integers."""
        ...


class Loss(abc.ABC):
    """A loss over calibration batches, as a function of what is learned.

    Attributes:
        count: Number of batches.
    """

    def __init__(
        self,
        model: ir.Model,
        outputs: Sequence[str],
        learned: Mapping[str, Learned],
        count: int,
        device: str,
    ) -> None:
        """Prepares to run `model`.

        Args:
            model: What is quantized.
            outputs: Names of the values to compute.
            learned: What is learned, by the name of the value that it is of.
            count: Number of batches.
            device: Where to compute.
        """
        self.count, self._learned, self._device = count, learned, device
        self._executor = Executor(model, outputs=outputs, device=device, straight_through=True)
        values = {str(v.name): v for n in model.graph for v in n.outputs} | dict(model.graph.initializers)
        self._values = {name: values[name] for name in learned}
        self._executor.parameters |= {v: torch.empty(0) for v in self._values.values()}  # what is behind is not read

    @abc.abstractmethod
    def of(self, batch: int) -> torch.Tensor:
        """The loss on one batch with the weights as they are set."""

    def backward(self, batches: Sequence[int]) -> None:
        """Adds the gradient over some batches to everything that is learned."""
        made = {name: value() for name, value in self._learned.items()}
        # The gradient of each weight is summed over the batches first: it is decoded once.
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in made.items()}
        self._set(leaves)
        for batch in batches:
            (self.of(batch) / len(batches)).backward()
        pairs = [(tensor, leaves[name].grad) for name, tensor in made.items() if tensor.requires_grad]
        pairs = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])

    @torch.no_grad()
    def judge(self, batches: Sequence[int]) -> float:
        """The loss with the integers and scales as they would be stored."""
        self._set({name: learned.stored() for name, learned in self._learned.items()})
        return sum(float(self.of(batch)) for batch in batches) / len(batches)

    def _set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._executor.parameters[self._values[name]] = tensor


class BlockLoss(Loss):
    """Squared distance of a part's outputs from those of the float part, relative to the square of the latter.

    Caches do not count: what factors of channel groups make of them is undone where they are read.
    """

    def __init__(
        self,
        block: BlockData,
        learned: Mapping[str, Learned],
        both: bool,
        device: str,
    ) -> None:
        """Takes a part of a sweep; `both`: the distance to the float part on the quantized inputs counts too."""
        part = block.part()
        outputs = (p for p in part.signature.outputs if p.role not in _CACHES and p.dtype in _FLOATS)
        self._names = [p.name for p in outputs if p.name in block.targets]
        super().__init__(part, self._names, learned, block.count, device)
        self._block, self._inputs = block, {str(v.name) for v in part.graph.inputs}
        self._float = Executor(block.reference, outputs=self._names, device=device) if both else None

    def of(self, batch: int) -> torch.Tensor:
        inputs = {n: x for n, x in self._block.inputs(batch).items() if n in self._inputs}
        found, expected = self._executor(inputs), self._block.expected(batch)
        total = _relative(found, {n: _tensor(expected[n], self._device) for n in self._names})
        if self._float is not None:
            with torch.no_grad():
                local = self._float(inputs)
            total = total + _relative(found, local)
        return total


class NetworkLoss(Loss):
    """Distance of a network's outputs from those of the float network.

    Of logits it is ``KL(softmax(float) || softmax(quantized))`` in nats per position, of other outputs the squared
    distance relative to the square. Caches do not count: what is written there is read again for the logits.

    The float network runs once: what its last part reads is kept, which is far less than logits are.
    """

    def __init__(
        self,
        model: Model,
        reference: Model,
        batches: Sequence[Batch],
        learned: Mapping[str, Learned],
        shelf: Shelf,
        device: str,
    ) -> None:
        """Takes a network and its float original; `shelf` keeps what the latter's last part reads."""
        self._logits = [p.name for p in model.signature.outputs if p.role == "logits" and p.dtype in _FLOATS]
        self._others = [p.name for p in model.signature.outputs if p.role not in _UNCOUNTED and p.dtype in _FLOATS]
        super().__init__(model, self._logits + self._others, learned, len(batches), device)
        self._batches = batches
        self._tail = Executor(tail := _tail(reference, self._names), outputs=self._names, device=device)
        self._kept = _run(reference, tail, batches, shelf, device)

    @property
    def _names(self) -> list[str]:
        return self._logits + self._others

    def of(self, batch: int) -> torch.Tensor:
        with torch.no_grad():
            expected = self._tail(self._kept[batch])
        found = self._executor(self._batches[batch])
        parts = [_divergence(expected[n].float(), found[n].float()) for n in self._logits]
        parts += [_relative(found, expected, [n]) for n in self._others]
        return torch.stack(parts).sum()


_CACHES = frozenset({"present_key", "present_value"})
_UNCOUNTED = _CACHES | {"logits"}


def _tail(reference: Model, outputs: Sequence[str]) -> Model:
    """The last part of a network if it makes all outputs, else the network."""
    partition = Partition(reference)
    last = partition.cut(len(partition.labels) - 1, to_the_end=True)
    return last if {v.name for v in last.graph.outputs} >= set(outputs) else reference


@torch.no_grad()
def _run(reference: Model, tail: Model, batches: Sequence[Batch], shelf: Shelf, device: str) -> list[Batch]:
    """What `tail` reads on each batch."""
    read = [str(v.name) for v in tail.graph.inputs]
    inner = [name for name in read if name not in {v.name for v in reference.graph.inputs}]
    executor = Executor(reference, outputs=inner, device=device)
    kept = []
    for batch in batches:
        found = executor(batch) if inner else {}
        kept.append({n: shelf.keep(found[n].cpu().numpy()) if n in found else batch[n] for n in read})
    return kept


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    wanted, given = torch.log_softmax(expected, -1), torch.log_softmax(found, -1)
    return (wanted.exp() * (wanted - given)).sum(-1).mean()


def _relative(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], names: Iterable[str] | None = None
) -> torch.Tensor:
    parts = []
    for name in found if names is None else names:
        target = expected[name].float()
        parts.append((found[name].float() - target).square().mean() / target.square().mean().clamp(min=1e-20))
    return torch.stack(parts).mean()


def _tensor(array: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device)
