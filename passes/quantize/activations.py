"""Rounds the inputs of linear layers to a few bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.quant import read_weight
from qc.passes.base import BlockPass, Context, Contract, Lossy, Outcome, Result, Site, check_patterns, site_name
from qc.passes.quantize._attention import operands, why_not, write_out
from qc.passes.quantize._copies import copy_offsets
from qc.passes.quantize._ranges import RULES, Grid, choose
from qc.passes.quantize._static import STATIC_BITS, needed_opset, observed, requests, shifted, write
from qc.passes.statistics import Request

__all__ = ["QuantizeActivations"]

_BITS = {"dynamic": (4, 5, 6, 7, 8, 16), "static": STATIC_BITS}
_GRANULARITIES = {"dynamic": ("tensor", "token"), "static": ("tensor", "channel")}

_WIDE = 16

_DYNAMIC_BYTES, _AXES_ARE_INPUTS = 11, 18
"""The first opset with ``DynamicQuantizeLinear``, and the first in which reductions read their axes as an input."""


@dataclasses.dataclass(frozen=True)
class QuantizeActivations(BlockPass):
    """Quantizes the inputs of linear layers with quantized weights, at run time or to ranges from calibration.

    ``x -> x'``: with a grid of ``2^bits`` points from the smallest to the largest entry (and zero),
    ``|x - x'| <= (max - min) / (2 (2^bits - 1))`` for every entry in the range, and others are clipped.

    * dynamic: the range is that of the tensor or token at hand. Asymmetric 8 bits per tensor are written as
      ``DequantizeLinear(DynamicQuantizeLinear(x))``, everything else as ``qc.DynamicQuantize`` (see `qc.ir.dialect`).
    * static: the range is chosen once, from what is seen on calibration data, by one of the rules in
      `qc.passes.quantize._ranges`, and written as ``DequantizeLinear(QuantizeLinear(x))``.

    Layers that read the same value share one grid. Integer kernels compute the same product without the float round
    trip; choosing them is the target's work.

    The codes of channels that are copies of one are split (see `qc.passes.quantize._copies`), which costs one addition.

    Left alone, with the reason: layers with float weights unless `float_weights`, and in static mode inputs that were
    not observed, or were not finite.

    Attributes:
        mode: When ranges are found: dynamic, from each input at run time; static, on calibration data.
        bits: Width of the codes: 4 to 8, or 16; static: 4, 8, 16.
        granularity: What shares a range: tensor; token (each vector along the last axis), dynamic only; channel (each
            position along it), static only.
        symmetric: Whether ranges are symmetric around zero.
        clip: What dynamic ranges are multiplied with, at most 1; entries beyond are clipped.
        range: How static ranges are chosen: minmax, percentile, mse, output. More than 8 bits, and channels, have
            minmax.
        percentile: The share of entries that `range=percentile` covers at either end, in percent.
        least_sqnr: Static values that keep less than this on their grid, in decibels, get 16 bits; 0 for none.
        float_weights: Whether to quantize the inputs of layers with float weights too.
        attention: Whether both products of attentions without a cache are quantized too; static only.
        exclude: Regular expressions of layers whose input is left as it is.
    """

    contract: ClassVar[Contract] = Lossy()

    mode: str = "dynamic"
    bits: int = 8
    granularity: str = "tensor"
    symmetric: bool = False
    clip: float = 1.0
    range: str = "output"
    percentile: float = 99.99
    least_sqnr: float = 0.0
    float_weights: bool = False
    attention: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._expect("mode", tuple(_BITS))
        self._expect("bits", _BITS[self.mode])
        self._expect("granularity", _GRANULARITIES[self.mode])
        self._expect("range", RULES)
        if not 0 < self.clip <= 1:
            raise InputError(f"Expected clip of quantize-activations above 0 and at most 1, found {self.clip}.")
        if not 50 < self.percentile <= 100:
            raise InputError(f"Expected percentile of quantize-activations in 50 to 100, found {self.percentile}.")
        if self.attention and self.mode != "static":
            raise InputError("Expected attention of quantize-activations in mode static, found mode dynamic.")
        check_patterns(self.exclude)

    def _expect(self, option: str, choices: tuple[object, ...]) -> None:
        found = getattr(self, option)
        if found not in choices:
            known, mode = " or ".join(map(str, choices)), "" if option == "mode" else f" in mode {self.mode}"
            raise InputError(f"Expected {option} of quantize-activations{mode} to be {known}, found {found!r}.")

    def needs(self, model: ir.Model) -> list[Request]:
        if self.mode == "dynamic":
            return []
        read = dict.fromkeys(n.inputs[0] for n in _linears(model) if not self._why_not(n))
        found = [r for x in read for r in requests(x, self._rule, points=self._wants_points)]  # type: ignore[arg-type]
        products = [v for n in self._attentions(model) if not why_not(n) for v in operands(n)]
        return found + [r for x in products for r in requests(x, self._plain_rule, points=self._wants_points)]

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        context = dataclasses.replace(context, exclude=(*context.exclude, *self.exclude))
        work = _Work(self, model, context)
        sites = [self._site(n, work) for n in _linears(model) if context.covers(n)]
        sites += [self._attention_site(n, work) for n in self._attentions(model) if context.covers(n)]
        return Result.of(model, sites)

    def _site(self, node: ir.Node, work: _Work) -> Site:
        name, x = site_name(node), node.inputs[0]
        pattern = work.context.excluded(name)
        if pattern is not None:
            return Site(name, Outcome.SKIPPED, f"excluded by {pattern}")
        if reason := self._why_not(node):
            return Site(name, Outcome.SKIPPED, reason)
        assert x is not None
        if _is_rounded(x):
            return Site(name, Outcome.MATCHED, "its input is already quantized")
        rounded, facts = work.rounded(x, node)
        if rounded is None:
            return Site(
                name, Outcome.SKIPPED, "its input was not observed on calibration data, or is not finite", facts
            )
        node.replace_input_with(0, rounded)
        return Site(name, Outcome.CHANGED, "", facts | {"value": x.name})

    def _attention_site(self, node: ir.Node, work: _Work) -> Site:
        name = site_name(node)
        pattern = work.context.excluded(name)
        reason = f"excluded by {pattern}" if pattern is not None else why_not(node) or self._too_old(node)
        if reason:
            return Site(name, Outcome.SKIPPED, reason)
        grids = []
        for x in operands(node):
            seen = observed(x, self._plain_rule, work.context.statistics)
            if seen is None:
                return Site(name, Outcome.SKIPPED, "its operands were not observed on calibration data")
            grids.append(choose(seen, self._plain_rule, self.bits, self.symmetric, self.percentile))
        work.write_out(node, grids)
        return Site(name, Outcome.CHANGED, "", {"bits": self.bits, "mode": self.mode, "granularity": "tensor"})

    def _attentions(self, model: ir.Model) -> list[ir.Node]:
        return [n for n in model.graph if n.op_type == "Attention" and n.domain == ""] if self.attention else []

    def _why_not(self, node: ir.Node) -> str:
        """Why the input of a Linear cannot be quantized; empty if it can, or is already."""
        x, weight = node.inputs[0], read_weight(node.inputs[1])
        if x is None or not (self.float_weights or (weight is not None and weight.format is not None)):
            return "its weight is float: quantize weights first, or set float_weights"
        if x.dtype not in (None, ir.DataType.FLOAT):
            return f"its input is {x.dtype.name}, not FLOAT"
        if self.mode == "static" and x.shape is None:
            return "the rank of its input is not known"
        return self._too_old(node)

    def _too_old(self, node: ir.Node) -> str:
        """Whether the opset of the model lacks what would be written, as a reason."""
        found, needed = _opset(node), self._needed_opset
        return (
            f"the model imports opset {found}, expected at least {needed}; convert it first" if found < needed else ""
        )

    @property
    def _needed_opset(self) -> int:
        if self.mode == "static":
            return needed_opset(_WIDE if self.least_sqnr else self.bits, channels=self.granularity == "channel")
        return _AXES_ARE_INPUTS if self._has_body else _DYNAMIC_BYTES

    @property
    def _has_body(self) -> bool:
        """Whether dynamic rounding is written as an operator of ours."""
        return (self.bits, self.granularity, self.symmetric, self.clip) != (8, "tensor", False, 1.0)

    @property
    def _rule(self) -> str:
        return "minmax" if self.granularity == "channel" or self.bits == _WIDE else self.range

    @property
    def _plain_rule(self) -> str:
        """The rule for values that no weight reads."""
        return "mse" if self._rule == "output" else self._rule

    @property
    def _wants_points(self) -> bool:
        return self._rule != "minmax" or (self.least_sqnr > 0 and self.bits < _WIDE)

    def dynamic(self, x: ir.Value) -> list[ir.Node]:
        """The nodes that put `x` on a grid at run time."""
        if not self._has_body:
            return _standard(x)
        token = self.granularity == "token"
        return [dialect.dynamic_quantize(x, bits=self.bits, token=token, symmetric=self.symmetric, clip=self.clip)]

    def grid(self, x: ir.Value, statistics: Mapping[Request, np.ndarray]) -> tuple[Grid | None, dict[str, object]]:
        """The static grid of `x`, and facts about it; None if `x` was not observed."""
        seen = observed(x, self._rule, statistics)
        if seen is None:
            return None, {}
        if self.granularity == "channel":
            return Grid.of(seen.low, seen.high, self.bits, self.symmetric), {}
        grid = choose(seen, self._rule, self.bits, self.symmetric, self.percentile)
        facts: dict[str, object] = {"low": float(seen.low.min()), "high": float(seen.high.max())}
        if seen.points is not None:
            facts["sqnr_db"] = round(seen.sqnr(grid), 2)
            if seen.sqnr(grid) < self.least_sqnr:
                grid = choose(seen, "minmax", _WIDE, self.symmetric, self.percentile)
        return grid, facts


class _Work:
    """Puts each value on one grid, whatever the number of its readers."""

    def __init__(self, options: QuantizeActivations, model: ir.Model, context: Context) -> None:
        self.context = context
        self._options, self._model = options, model
        self._done: dict[ir.Value, tuple[ir.Value | None, dict[str, object]]] = context.memo  # type: ignore[assignment]

    def rounded(self, x: ir.Value, before: ir.Node) -> tuple[ir.Value | None, dict[str, object]]:
        """`x` on its grid, in front of the first layer that reads it, with facts for the report."""
        if x not in self._done:
            static = self._options.mode == "static"
            self._done[x] = self._static(x, before) if static else (self._dynamic(x, before), self._facts())
        return self._done[x]

    def _static(self, x: ir.Value, before: ir.Node) -> tuple[ir.Value | None, dict[str, object]]:
        grid, facts = self._options.grid(x, self.context.statistics)
        if grid is None:
            return None, {}
        facts = self._facts() | {"bits": grid.bits} | facts
        offsets = None
        if grid.scale.ndim == 0:
            facts["scale"] = float(grid.scale)
            offsets = copy_offsets(x)
        if offsets is not None:
            facts["split_codes"] = int(np.count_nonzero(offsets))
            facts["added"] = [{"operator": "Add", "operations": len(offsets)}]
            x = shifted(self._model, x, offsets * float(grid.scale), before)
        return write(self._model, x, grid, before), facts

    def write_out(self, node: ir.Node, grids: list[Grid]) -> None:
        """Puts the products of an attention on grids."""
        write_out(self._model, node, grids)

    def _dynamic(self, x: ir.Value, before: ir.Node) -> ir.Value:
        nodes = self._options.dynamic(x)
        out = nodes[-1].outputs[0]
        out.name, out.dtype, out.shape = f"{x.name}.quantized", ir.DataType.FLOAT, x.shape
        self._model.graph.insert_before(before, nodes)
        return out

    def _facts(self) -> dict[str, object]:
        return {k: getattr(self._options, k) for k in ("bits", "mode", "granularity", "symmetric")}


def _opset(node: ir.Node) -> int:
    return node.graph.opset_imports.get("", 1) if node.graph is not None else 1


def _linears(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if dialect.is_op(node, "Linear")]


def _is_rounded(x: ir.Value) -> bool:
    producer = x.producer()
    return producer is not None and (
        producer.op_type == "DequantizeLinear" or dialect.is_op(producer, "DynamicQuantize")
    )


def _standard(x: ir.Value) -> list[ir.Node]:
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    for value, suffix, dtype, shape in zip(
        quantize.outputs,
        ("codes", "scale", "zero_point"),
        (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
        (x.shape, ir.Shape([]), ir.Shape([])),
        strict=True,
    ):
        value.name, value.dtype, value.shape = f"{x.name}.{suffix}", dtype, shape
    return [quantize, ir.node("DequantizeLinear", list(quantize.outputs))]
