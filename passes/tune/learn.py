"""Learns the codes, ranges and scales of quantized weights, block by block."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.quant import QuantizedTensor, Weight, emit, read_weight
from qc.passes.base import BlockPass, Context, Contract, Lossy, Outcome, Result, Site, check_patterns, site_name

if TYPE_CHECKING:
    import torch

    from qc.passes.sweep import BlockData

__all__ = ["Tune"]

_LEARNED = ("rounding", "weights", "low-rank", "range", "scale", "norms")
_OPTIMIZERS = ("sign", "adam")
_LOSSES = ("float", "both")

_TOKENS = 1 << 15
"""128 windows of 256: with fewer, what is learned fits them and little else."""

_VECTORS = {"RMSNormalization": (1,), "LayerNormalization": (1, 2), "Linear": (2,)}
"""Where gains and biases are read."""


@dataclasses.dataclass(frozen=True)
class Tune(BlockPass):
    """Learns quantized weights by gradients: each block comes as close as it can to what the float block yields.

    The loss is the squared error of a block's outputs, on what the quantized blocks before it yield, against the float
    block's on the float activations, relative to their square. One calibration batch in eight is not learned from: on
    these, the integers and scales as they would be stored are judged ten times, and the best are kept. So a block never
    becomes worse by this measure, whatever the rates.

    It goes on from the codes that the `quantize-weights` before it chose, in the same sweep. What may be learned
    together: rounding, weights, low-rank, range, scale (formulas: `qc.passes.tune._weight`), and norms, the gains
    and biases of the block. Published methods are choices among these: AutoRound is rounding and range with the
    optimizer sign; Block-AP of EfficientQAT is weights and range with adam; OmniQuant's LWC is range with adam.

    Left alone, with the reason: parts without a weight on a uniform grid, or whose outputs are too wide to hold.
    Needs torch; computes on CUDA where there is one.

    Attributes:
        learn: What is learned: rounding, weights, low-rank, range, scale, norms.
        optimizer: sign (the sign of the gradient) or adam.
        steps: Number of steps per block.
        batch: Calibration batches in a step.
        rate: Length of a step of rounding, weights and low-rank, in code units; falls linearly to zero.
        range_rate: Length of a step of range and scale, as a factor; likewise.
        loss: float, or both: the distance to the float block on the quantized inputs counts as much.
        rank: Of low-rank.
        exclude: Regular expressions of layers that are left as they are.
    """

    contract: ClassVar[Contract] = Lossy()

    learn: tuple[str, ...] = ("rounding", "range")
    optimizer: str = "sign"
    steps: int = 200
    batch: int = 8
    rate: float = 0.005
    range_rate: float = 0.005
    loss: str = "float"
    rank: int = 4
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.learn) - set(_LEARNED))
        if unknown or not self.learn:
            raise InputError(
                f"Expected tune to learn some of {', '.join(_LEARNED)}; found {', '.join(unknown) or 'none'}."
            )
        for option, choices in (("optimizer", _OPTIMIZERS), ("loss", _LOSSES)):
            if getattr(self, option) not in choices:
                raise InputError(
                    f"Expected {option} of tune to be {' or '.join(choices)}, found {getattr(self, option)!r}."
                )
        for option in ("steps", "batch", "rank", "rate", "range_rate"):
            if not getattr(self, option) > 0:
                raise InputError(f"Expected {option} of tune above 0, found {getattr(self, option)}.")
        check_patterns(self.exclude)

    @property
    def sequential(self) -> bool:
        return True

    @property
    def learns(self) -> bool:
        return True

    @property
    def calibration_tokens(self) -> int:
        return _TOKENS

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        if context is None or context.block is None:
            raise InputError(
                "Expected tune to run in a pass manager, which gives it calibration data; see PassManager."
            )
        try:
            import torch
        except ImportError as error:
            raise InputError("Learning needs PyTorch: pip install 'qc-compiler[torch]'.") from error
        block, exclusion = context.block, dataclasses.replace(context, exclude=tuple(self.exclude))
        weights, sites = self._weights(model, block, exclusion)
        if not weights:
            return Result.of(model, sites)
        if not block.targets or not block.count:
            reason = (
                "its outputs are too wide to hold for all batches" if block.count else "there is nothing to learn from"
            )
            return Result.of(model, [*sites, *(Site(n, Outcome.SKIPPED, reason) for n, _, _ in weights)])
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, context.threads))
        try:
            return Result.of(model, [*sites, *self._train(model, block, context, weights)])
        finally:
            torch.set_num_threads(threads)

    def _weights(
        self, model: ir.Model, block: BlockData, context: Context
    ) -> tuple[list[tuple[str, Weight, Weight]], list[Site]]:
        """The layers that can be learned: name, quantized weight, float weight; and the sites of the others."""
        from qc.passes.tune._weight import learnable

        found, sites, seen = [], [], set()
        for node in (n for n in model.graph if dialect.is_op(n, "Linear") and context.covers(n)):
            name, weight = site_name(node), read_weight(node.inputs[1])
            original = block.originals.get(weight.value) if weight is not None else None
            pattern = context.excluded(name)
            if weight is None or weight.format is None:
                sites.append(Site(name, Outcome.SKIPPED, "its weight is float: quantize weights first"))
            elif pattern is not None:
                sites.append(Site(name, Outcome.SKIPPED, f"excluded by {pattern}"))
            elif original is None:
                reason = "it was quantized elsewhere: its float weight is not known here"
                sites.append(Site(name, Outcome.SKIPPED, reason))
            elif reason := learnable(weight.format):
                sites.append(Site(name, Outcome.SKIPPED, reason))
            elif weight.value not in seen:
                seen.add(weight.value)
                found.append((name, weight, original))
        return found, sites

    def _train(
        self, model: ir.Model, block: BlockData, context: Context, weights: list[tuple[str, Weight, Weight]]
    ) -> list[Site]:
        import torch

        from qc.passes.tune._loop import Schedule, train
        from qc.passes.tune._weight import LearnedWeight

        device = "cuda" if torch.cuda.is_available() else "cpu"
        learned = {}
        for number, (_, weight, original) in enumerate(weights):
            learned[str(weight.value.name)] = LearnedWeight(
                original.numpy(),
                weight.quantized(),
                self.learn,
                rank=self.rank,
                seed=int(_rng(context, block, number).integers(1 << 31)),
                device=device,
            )
            original.release()
        vectors = _vectors(model, context, device) if "norms" in self.learn else {}
        schedule = Schedule(self.optimizer, self.steps, self.batch, self.rate, self.range_rate, self.loss == "both")
        tensors = {name: tensor for name, (_, tensor) in vectors.items()}
        found = train(block, learned, tensors, schedule, _rng(context, block, len(weights)), device)
        facts = {"before_db": _db(found.before), "after_db": _db(found.after)}
        if not found.after < found.before:
            return [Site(n, Outcome.MATCHED, "no step made the block better", facts) for n, _, _ in weights]
        for _, weight, _ in weights:
            _replace(weight, learned[str(weight.value.name)].export(), context)
        for vector, tensor in vectors.values():
            _replace_vector(model, vector, tensor.detach().cpu().numpy(), context)
        return [Site(n, Outcome.CHANGED, "", facts) for n, _, _ in weights]


def _rng(context: Context, block: BlockData, number: int) -> np.random.Generator:
    return np.random.default_rng([context.seed, zlib.crc32(block.label.encode()), number])


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


def _db(loss: float) -> float | None:
    return round(-10 * math.log10(loss), 3) if loss > 0 and math.isfinite(loss) else None
