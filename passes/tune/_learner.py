"""What passes that learn have in common: their options, what they learn, and how it is written back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.quant import QuantizedTensor, Weight, emit, read_weight
from qc.passes.base import Context, Outcome, Pass, Site, check_patterns, site_name

if TYPE_CHECKING:
    import torch

    from qc.passes.tune._checkpoint import Checkpoint
    from qc.passes.tune._loop import Trained
    from qc.passes.tune._loss import Learned, Loss

__all__ = ["Layer", "Learner", "require_torch", "trained_sites"]

_LEARNED = ("rounding", "weights", "low-rank", "range", "scale", "norms", "activations")
_OPTIMIZERS = ("sign", "adam")

_TOKENS = 1 << 15
"""128 windows of 256: with fewer, what is learned fits them and little else."""

_VECTORS = {"RMSNormalization": (1,), "LayerNormalization": (1, 2), "Linear": (2,)}
"""Where gains and biases are read."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A product whose weight is learned.

    Attributes:
        name: What a user calls it.
        weight: Its quantized weight.
        original: The float weight.
    """

    name: str
    weight: Weight
    original: np.ndarray


@dataclasses.dataclass(frozen=True)
class Learner(Pass):
    """Options of everything that learns.

    Attributes:
        learn: What is learned: rounding, weights, low-rank, range, scale, norms, activations.
        optimizer: sign (the sign of the gradient) or adam.
        steps: Number of steps.
        batch: Calibration batches in a step.
        rate: Length of a step of rounding, weights and low-rank, in code units; falls linearly to zero.
        range_rate: Length of a step of range, scale and activations, as a factor; likewise.
        rank: Of low-rank.
        exclude: Regular expressions of layers that are left as they are.
    """

    learn: tuple[str, ...] = ("rounding", "range")
    optimizer: str = "sign"
    steps: int = 200
    batch: int = 8
    rate: float = 0.005
    range_rate: float = 0.005
    rank: int = 4
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        name, unknown = self.spec_name(), sorted(set(self.learn) - set(_LEARNED))
        if unknown or not self.learn:
            raise InputError(
                f"Expected {name} to learn some of {', '.join(_LEARNED)}; found {', '.join(unknown) or 'none'}."
            )
        if self.optimizer not in _OPTIMIZERS:
            raise InputError(
                f"Expected optimizer of {name} to be {' or '.join(_OPTIMIZERS)}, found {self.optimizer!r}."
            )
        for option in ("steps", "batch", "rank", "rate", "range_rate"):
            if not getattr(self, option) > 0:
                raise InputError(f"Expected {option} of {name} above 0, found {getattr(self, option)}.")
        check_patterns(self.exclude)

    @property
    def calibration_tokens(self) -> int:
        return _TOKENS

    def layers(
        self, model: ir.Model, context: Context, original: Callable[[ir.Node, Weight], np.ndarray | str]
    ) -> tuple[list[Layer], list[Site]]:
        """The layers that can be learned, and the sites of the others.

        Args:
            model: The model.
            context: Says which nodes the pass may touch.
            original: The float weight of a quantized one, or why there is none.
        """
        from qc.passes.tune._weight import learnable

        exclusion, seen = dataclasses.replace(context, exclude=tuple(self.exclude)), set()
        found: list[Layer] = []
        sites: list[Site] = []
        for node in (n for n in model.graph if dialect.is_op(n, "Linear") and context.covers(n)):
            name, weight = site_name(node), read_weight(node.inputs[1])
            reason, float_ = "", None
            if weight is None or weight.format is None:
                reason = "its weight is float: quantize weights first"
            elif (pattern := exclusion.excluded(name)) is not None:
                reason = f"excluded by {pattern}"
            elif not (reason := learnable(weight.format)):
                float_ = original(node, weight)
                reason = float_ if isinstance(float_, str) else ""
            if reason:
                sites.append(Site(name, Outcome.SKIPPED, reason))
            elif weight is not None and weight.value not in seen:
                assert isinstance(float_, np.ndarray)
                seen.add(weight.value)
                found.append(Layer(name, weight, float_))
        return found, sites

    def train(
        self,
        model: ir.Model,
        context: Context,
        layers: Sequence[Layer],
        label: str,
        loss: Callable[[Mapping[str, Learned], Mapping[str, torch.Tensor], str], Loss],
        *,
        checkpoint: Checkpoint | None = None,
    ) -> Trained:
        """Learns, and writes what was learned into the model if it is better.

        Args:
            model: Changed in place.
            context: What the pass may use.
            layers: The layers, see `layers`.
            label: Of the part of the network, for the seed.
            loss: Makes the loss, from what is learned by name, the float vectors, and the device.
            checkpoint: Where the state is written down, and read from.
        """
        import torch

        from qc.passes.tune._grid import LearnedGrid
        from qc.passes.tune._loop import Schedule, train
        from qc.passes.tune._weight import LearnedWeight

        device = "cuda" if torch.cuda.is_available() else "cpu"
        rng = np.random.default_rng([context.seed, zlib.crc32(label.encode())])
        weights = {
            str(layer.weight.value.name): LearnedWeight(
                layer.original,
                layer.weight.quantized(),
                self.learn,
                rank=self.rank,
                seed=int(rng.integers(1 << 31)),
                device=device,
            )
            for layer in layers
        }
        steps = {v: LearnedGrid(n, device) for v, n in _grids(model, context)} if "activations" in self.learn else {}
        learned = weights | {str(v.name): grid for v, grid in steps.items()}
        vectors = _vectors(model, context, device) if "norms" in self.learn else {}
        tensors = {name: tensor for name, (_, tensor) in vectors.items()}
        schedule = Schedule(self.optimizer, self.steps, self.batch, self.rate, self.range_rate)
        with _threads(context.threads):
            found = train(
                loss(learned, tensors, device),
                learned,
                tensors,
                schedule,
                rng,
                checkpoint=checkpoint,
                tick=lambda step: context.progress(step - 1, self.steps, f"step {step}"),
            )
        if found.after < found.before:
            for layer in layers:
                _replace(layer.weight, weights[str(layer.weight.value.name)].export(), context)
            for value, grid in steps.items():
                value.const_value = context.store.put(str(value.name), grid.stored().cpu().numpy())
            for vector, tensor in vectors.values():
                _replace_vector(model, vector, tensor.detach().cpu().numpy(), context)
        return found


def trained_sites(layers: Sequence[Layer], found: Trained, whole: str, facts: Mapping[str, object]) -> list[Site]:
    """The sites of layers that were learned together; `whole` names what they are judged in."""
    better = found.after < found.before
    outcome, reason = (Outcome.CHANGED, "") if better else (Outcome.MATCHED, f"no step made the {whole} better")
    return [Site(layer.name, outcome, reason, facts) for layer in layers]


def require_torch() -> None:
    """Raises InputError unless torch is there."""
    if importlib.util.find_spec("torch") is None:
        raise InputError("Learning needs PyTorch: pip install 'qc-compiler[torch]'.")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _grids(model: ir.Model, context: Context) -> list[tuple[ir.Value, np.ndarray]]:
    """The stored steps of static grids of activations that only this part reads, and their numbers."""
    found = {}
    for node in (n for n in model.graph if n.op_type == "QuantizeLinear" and not n.domain and context.covers(n)):
        scale = node.inputs[1]
        assert scale is not None
        inside = all(context.covers(user) for user, _ in scale.uses())
        if inside and scale.const_value is not None and scale.is_initializer() and scale.dtype == ir.DataType.FLOAT:
            found[scale] = scale.const_value.numpy()
    return list(found.items())


def _vectors(model: ir.Model, context: Context, device: str) -> dict[str, tuple[Weight, torch.Tensor]]:
    """Gains of norms and biases that only this part reads, by the name under which they are read."""
    import torch

    found = {}
    for node in (n for n in model.graph if context.covers(n)):
        for value in (node.inputs[i] for i in _VECTORS.get(node.op_type, ()) if i < len(node.inputs)):
            weight = read_weight(value)
            if weight is None or weight.format is not None or len(weight.shape) != 1 or weight.value.dtype is None:
                continue
            inside = all(context.covers(user) for user, _ in weight.value.uses())
            if inside and weight.value.dtype == ir.DataType.FLOAT:
                numbers = torch.from_numpy(np.array(weight.numpy(), np.float32)).to(device)
                found[str(weight.value.name)] = weight, numbers.requires_grad_()
    return found


def _replace(weight: Weight, tensor: QuantizedTensor, context: Context) -> None:
    """Puts other codes and parameters behind a decode node."""
    node = weight.value.producer()
    assert node is not None
    for old, new in zip(node.inputs, emit(tensor, ir.Value(name=weight.name), context.store).inputs, strict=True):
        assert old is not None
        assert new is not None
        old.const_value = new.const_value


def _replace_vector(model: ir.Model, vector: Weight, numbers: np.ndarray, context: Context) -> None:
    """Makes the readers of a float vector read other numbers, in single precision."""
    old, node = vector.value, vector.value.producer()
    if node is None:
        old.const_value = context.store.put(str(old.name), numbers)
        return
    new = ir.Value(name=f"{old.name}.tuned", shape=ir.Shape(numbers.shape), type=ir.TensorType(ir.DataType.FLOAT))
    new.const_value = context.store.put(str(new.name), numbers)
    model.graph.register_initializer(new)
    old.replace_all_uses_with(new)
    model.graph.remove(node, safe=True)
    if not vector.data.uses():
        model.graph.initializers.pop(str(vector.data.name), None)
