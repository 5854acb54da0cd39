"""Re-encodes weights that no kernel reads into integers that one does, where that is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.backends.integers import KERNEL_BITS, integers_of
from qc.backends.ort.packed import consumes_weight, has_kernel, kernel_block
from qc.ir import dialect
from qc.ir.errors import UnsupportedError
from qc.ir.quant import (
    Affine,
    Format,
    Order,
    QuantizedTensor,
    Weight,
    emit,
    read_weight,
    require_opset,
)
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site

__all__ = ["WidenWeights", "runs_as", "wider"]


@dataclasses.dataclass(frozen=True)
class WidenWeights(Pass):
    """Stores a weight in 2, 4 or 8-bit integers that stand for the same numbers, so that a fused kernel reads it.

    ``table[q] * s = (m table[q]) * (s / m)`` with a power of two m that makes the table integers: 3-bit affine codes
    and BitMoD's 3 bits become 4 bits, ternary codes 2 bits, E2M1 (MXFP4, NVFP4), E2M3, IQ4_NL and powers of two 8 bits.
    Scales in two levels or as powers of two become floats. Exact, but for float32 products of scales.

    It takes more bytes: the report says how many, by site and in all. Tables of arbitrary numbers (NF4, learned ones),
    codebooks and remainders have no such form and are left to be decoded when the model is loaded.

    Attributes:
        accuracy_level: Of the kernels that are to read the result; see `LowerQuantizedWeights`.
    """

    accuracy_level: int = 4
    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        sites = []
        for node in tuple(model.graph):
            if node.op_type not in ("Decode", "DequantizeLinear"):
                continue
            weight = read_weight(node.outputs[0])
            if weight is not None and weight.format is not None and not has_kernel(weight.format):
                sites.append(self._site(model, node, weight, weight.format, context))
        return Result.of(model, sites, _costs(sites))

    def _site(self, model: ir.Model, node: ir.Node, weight: Weight, held: Format, context: Context) -> Site:
        if not all(consumes_weight(use.node) for use in node.outputs[0].uses()) or node.outputs[0].is_graph_output():
            return Site(weight.name, Outcome.SKIPPED, "something else than a product or a look-up reads it")
        linear = any(dialect.is_op(use.node, "Linear") for use in node.outputs[0].uses())
        if isinstance(held.remainder, Order):
            return Site(weight.name, Outcome.SKIPPED, "its columns are in another order", {"format": str(held)})
        format, reason = wider(held, weight.shape[1], self.accuracy_level if linear else None)
        if format is None:
            return Site(weight.name, Outcome.SKIPPED, reason, {"format": str(held)})
        before = weight.stored_bytes
        tensor = _reencoded(weight, format)
        new = emit(tensor, ir.Value(name=f"{weight.name}.{format}"), context.store)
        for value in new.inputs:
            if value is not None:
                model.graph.register_initializer(value)
        new.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, new)
        node.outputs[0].replace_all_uses_with(new.outputs[0])
        _remove(model.graph, node)
        require_opset(model, format)
        facts = {"format": str(held), "stored_as": str(format), "bytes_before": before}
        return Site(weight.name, Outcome.CHANGED, "", facts | {"bytes_after": tensor.stored_bits // 8})


def _costs(sites: Sequence[Site]) -> list[str]:
    """A sentence for each format that is stored as another: what that takes."""
    totals: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        if site.outcome is Outcome.CHANGED:
            facts = site.details
            total = totals.setdefault((str(facts["format"]), str(facts["stored_as"])), [0, 0, 0])
            for place, number in enumerate((1, facts["bytes_before"], facts["bytes_after"])):
                total[place] += number  # type: ignore[operator]
    return [
        f"{count} weights in {held} are stored as {stored}: {after:,} bytes instead of {before:,}"
        for (held, stored), (count, before, after) in totals.items()
    ]


def runs_as(format: Format, columns: int, accuracy_level: int = 4) -> str:
    """How a linear layer with such a weight runs: on which kernel, re-encoded to what, or decoded at load."""
    if has_kernel(format):
        try:
            kernel_block(format, columns, accuracy_level)
        except UnsupportedError:
            return "no kernel for these groups"
        return "MatMulNBits"
    found, _ = wider(format, columns, accuracy_level)
    return "float, decoded at load" if found is None else f"MatMulNBits, as {found}"


def wider(format: Format, columns: int, accuracy_level: int | None) -> tuple[Format | None, str]:
    """The format with a fast kernel that holds the same numbers in the fewest bits, or None and why there is none.

    Args:
        format: Any format.
        columns: Length of a row.
        accuracy_level: That of ``MatMulNBits``; None for a table that is only looked up.
    """
    if isinstance(format.remainder, Order):  # which is that of the inputs, see `OrderInputs`
        format = dataclasses.replace(format, remainder=None)
    if format.remainder is not None or format.axis == "out":
        return None, f"no kernel takes weights in {format}"
    integers = integers_of(format.values)
    if integers is None:
        return None, f"values of {format.values} are no multiples of one number that fit in 8 bits"
    reason = ""
    for bits in (b for b in KERNEL_BITS if b >= integers.bits):
        found = Format(Affine(bits, integers.codes is not None), format.group)
        try:
            kernel_block(found, columns, accuracy_level)
        except UnsupportedError as error:
            reason = reason or str(error)
        else:
            return found, ""
    return None, reason


def _reencoded(weight: Weight, format: Format) -> QuantizedTensor:
    tensor = weight.quantized()
    integers = integers_of(tensor.format.values)
    assert integers is not None
    rows, columns = tensor.shape
    groups = format.groups(columns)
    scale = tensor.format.scale.decode(tensor.params) / np.float32(integers.multiple)
    params = {"scale": np.array(np.broadcast_to(scale, (rows, groups)), np.float32)}
    if integers.codes is None:
        params["zero_point"] = np.array(np.broadcast_to(tensor.params["zero_point"], (rows, groups)))
        return QuantizedTensor(format, tensor.codes, params)
    return QuantizedTensor(format, integers.of(tensor), params)


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    held = [v for v in node.inputs if v is not None]
    graph.remove(node, safe=True)
    for value in held:
        if not value.uses() and not value.is_graph_output() and value.name is not None:
            graph.initializers.pop(value.name, None)
