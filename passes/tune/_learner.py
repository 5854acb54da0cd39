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
from qc.ir.quant import Weight, read_weight
from qc.passes.base import Context, Outcome, Pass, Site, check_patterns, site_name
from qc.passes.tune._groups import transformable
from qc.passes.tune._stored import float_vectors, float_weight, replace_codes, replace_vector, static_steps

if TYPE_CHECKING:
    from qc.passes.tune._checkpoint import Checkpoint
    from qc.passes.tune._loop import Trained
    from qc.passes.tune._loss import Learned, Loss

__all__ = ["Layer", "Learner", "require_torch", "trained_sites"]

_LEARNED = ("rounding", "weights", "low-rank", "range", "scale", "norms", "activations", "transforms")
_OPTIMIZERS = ("sign", "adam")

_TOKENS = 1 << 15
"""128 windows of 256: with fewer, what is learned fits them and little else."""


@dataclasses.dataclass(frozen=True, eq=False)
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
        learn: What is learned: rounding, weights, low-rank, range, scale, norms, activations, transforms.
        optimizer: sign (the sign of the gradient) or adam.
        steps: Number of steps.
        batch: Calibration batches in a step.
        rate: Length of a step of rounding, weights and low-rank, in code units; falls linearly to zero.
        range_rate: Length of a step of range, scale, activations and transforms, as a factor; likewise.
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
        loss: Callable[[Mapping[str, Learned], str], Loss],
        *,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Trained, list[Site]]:
        """Learns, and writes what was learned into the model if it is better.

        Args:
            model: Changed in place.
            context: What the pass may use.
            layers: The layers, see `layers`.
            label: Of the part of the network, for the seed.
            loss: Makes the loss, from what is learned by name, and the device.
            checkpoint: Where the state is written down, and read from.

        Returns:
            What was found, and the sites of channel groups if ``transforms`` are learned.
        """
        import torch

        from qc.passes.tune._factors import LearnedVector, scalings
        from qc.passes.tune._grid import LearnedGrid
        from qc.passes.tune._loop import Schedule, train
        from qc.passes.tune._weight import LearnedWeight

        device = "cuda" if torch.cuda.is_available() else "cpu"
        rng = np.random.default_rng([context.seed, zlib.crc32(label.encode())])
        groups, sites = [], []
        if "transforms" in self.learn:
            groups, sites = transformable(model, context, {layer.weight.value for layer in layers})
        factors, scaling = scalings([inputs.group for inputs in groups], device)
        weights = {
            layer: LearnedWeight(
                layer.original,
                layer.weight.quantized(),
                self.learn,
                scaling=scaling.get(layer.weight.value),
                rank=self.rank,
                seed=int(rng.integers(1 << 31)),
                device=device,
            )
            for layer in layers
        }
        steps = (
            {v: LearnedGrid(n, device) for v, n in static_steps(model, context)} if "activations" in self.learn else {}
        )
        norms = dict.fromkeys(float_vectors(model, context)) if "norms" in self.learn else {}
        vectors = [
            (vector, LearnedVector(vector.numpy(), value in norms, scaling.get(value), device))
            for value in dict.fromkeys([*scaling, *norms])
            if (vector := read_weight(value)) is not None and vector.format is None
        ]
        learned = {str(layer.weight.value.name): weight for layer, weight in weights.items()}
        learned |= {str(vector.value.name): held for vector, held in vectors}
        learned |= {str(value.name): grid for value, grid in steps.items()}
        schedule = Schedule(self.optimizer, self.steps, self.batch, self.rate, self.range_rate)
        with _threads(context.threads):
            found = train(
                loss(learned, device),
                [*learned.values(), *factors],
                schedule,
                rng,
                checkpoint=checkpoint,
                tick=lambda step: context.progress(step - 1, self.steps, f"step {step}"),
            )
        if found.after < found.before:
            for layer, weight in weights.items():
                replace_codes(layer.weight, weight.export(), context)
            for value, grid in steps.items():
                value.const_value = context.store.put(str(value.name), grid.stored().cpu().numpy())
            for vector, held in vectors:
                replace_vector(model, vector, held.stored().cpu().numpy(), context)
            if context.block is not None:
                for layer in (layer for layer in layers if layer.weight.value in scaling):
                    folded = scaling[layer.weight.value].folded(torch.from_numpy(np.array(layer.original)).to(device))
                    held = float_weight(layer.weight.name, folded.cpu().numpy(), context)
                    context.block.originals[layer.weight.value] = held
        sites += [
            _site(inputs.names[0], found, inputs.facts | held.facts())
            for inputs, held in zip(groups, factors, strict=True)
        ]
        return found, sites


def trained_sites(layers: Sequence[Layer], found: Trained, facts: Mapping[str, object]) -> list[Site]:
    """The sites of layers that were learned together."""
    return [_site(layer.name, found, facts) for layer in layers]


def _site(name: str, found: Trained, facts: Mapping[str, object]) -> Site:
    if found.after < found.before:
        return Site(name, Outcome.CHANGED, "", facts)
    return Site(name, Outcome.MATCHED, "no step made what is judged better", facts)


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
