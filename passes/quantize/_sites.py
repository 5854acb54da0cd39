"""Finds every place where a network reads a large constant, and says what it is."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from qc.ir import dialect
from qc.ir.model import port_of
from qc.ir.quant import Format, Weight, read_weight
from qc.ir.recurrent import STACKS, is_recurrent, is_stack, stack_readers
from qc.passes.base import site_name
from qc.passes.statistics import Request, Statistic

__all__ = ["LARGE", "Kind", "Use", "weight_uses"]

LARGE = 4096
"""Elements from which on a constant counts as a weight: smaller ones are scalars, axes, biases and norm weights,
together less than a thousandth of a network, and a table that small would save less than its decode node costs."""

_REASONS = {
    "ConvTranspose": "weights of transposed convolutions are not quantized yet",
}


_PLANNED = "qc.format"


class Kind(enum.Enum):
    """What a consumer does with its weight."""

    LINEAR = "linear"
    HEAD = "head"
    VALUE = "value projection"
    CACHED_VALUE = "value projection in front of a cache"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"
    RECURRENT = "recurrent layer"
    OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Use:
    """A node that reads a weight.

    Attributes:
        node: The consumer.
        slot: Which of its inputs.
        kind: What it is.
        weight: The constant; None if the operand of a Linear is computed.
        reason: Why it cannot be quantized; empty if it can.
    """

    node: ir.Node
    slot: int
    kind: Kind
    weight: Weight | None
    reason: str = ""

    @property
    def name(self) -> str:
        """The module path of the consumer if known, else the weight's name."""
        recorded = self.node.metadata_props.get("qc.scope")
        return recorded or (self.weight.name if self.weight is not None else "") or site_name(self.node)

    def statistic(self, statistic: Statistic) -> Request | None:
        """The request for a statistic of what the weight of a Linear, or that of a recurrent layer's input, meets."""
        value = None if self.reason else self._operand()
        if value is None or value.shape is None or value.dtype != ir.DataType.FLOAT:
            return None
        return Request(statistic, value)

    def _operand(self) -> ir.Value | None:
        """The value that the weight is multiplied with, if it is one."""
        if self.node.op_type == "Linear":
            return self.node.inputs[0]
        if self.kind is not Kind.RECURRENT:
            return None
        readers = stack_readers(self.node)
        return readers[0][0].inputs[0] if len(readers) == 1 and readers[0][1] == STACKS[0] else None

    @property
    def planned(self) -> Format | None:
        """The format that an allocation gave this weight: the property ``qc.format`` of the node."""
        text = self.node.metadata_props.get(_PLANNED)
        return None if text is None else Format.parse(text)

    def plan(self, format: Format | None) -> None:
        """Says which format the weight shall have, or, once it has it, that nothing is planned any more."""
        if format is None:
            self.node.metadata_props.pop(_PLANNED, None)
        else:
            self.node.metadata_props[_PLANNED] = str(format)


def weight_uses(model: ir.Model) -> list[Use]:
    """Lists the readers of weights in graph order: Linears, convolutions, nodes with a constant of at least `LARGE`.

    Nodes in subgraphs are listed with a reason; bodies of model-local functions hold no weights.
    """
    kinds = _kinds(model)
    uses = []
    for node in model.graph.all_nodes():
        found = _uses(node, kinds)
        if node.graph is not model.graph:
            found = (dataclasses.replace(u, reason=u.reason or "lies in a subgraph (If, Loop or Scan)") for u in found)
        uses.extend(found)
    return uses


def _uses(node: ir.Node, kinds: Mapping[ir.Node, Kind]) -> Iterator[Use]:
    if dialect.is_op(node, "Linear"):
        weight = read_weight(node.inputs[1])
        reason = "" if weight is not None else "its weight is computed, or stored in a form that no format describes"
        yield Use(node, 1, kinds.get(node, Kind.LINEAR), weight, reason)
        return
    if node.op_type == "Conv" and node.domain == "":
        weight = read_weight(node.inputs[1])
        yield Use(node, 1, Kind.CONVOLUTION, weight, "" if weight is not None else "its weight is computed")
        return
    if node.op_type in ("Cast", "DequantizeLinear", "Decode") and read_weight(node.outputs[0]) is not None:
        return  # a decode node: its consumer is the site
    if is_stack(node):
        weight = read_weight(node.inputs[0])
        if weight is not None:
            yield Use(node, 0, Kind.RECURRENT, weight)
        return
    if node.op_type == "RotaryEmbedding":
        return  # its tables of cosines and sines are no weights
    for slot, value in enumerate(node.inputs):
        weight = read_weight(value)
        if weight is None or _size(weight) < LARGE or (is_recurrent(node) and slot not in STACKS):
            continue
        if node.op_type == "Gather" and node.domain == "" and slot == 0:
            yield Use(node, slot, Kind.EMBEDDING, weight, _gather_reason(node, weight))
        else:
            yield Use(node, slot, Kind.OTHER, weight, _other_reason(node, weight))


def _gather_reason(node: ir.Node, weight: Weight) -> str:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if len(weight.shape) > 2 and axis == 0:
        return "batched (expert) weights are not quantized yet"
    if len(weight.shape) != 2 or axis != 0:
        return f"looks up axis {axis} of a table of rank {len(weight.shape)}; only rows of a matrix are quantized"
    if not weight.dtype.is_floating_point() and weight.format is None:
        return f"its table holds {weight.dtype.name} numbers"
    return ""


def _other_reason(node: ir.Node, weight: Weight) -> str:
    if node.op_type in ("MatMul", "Gemm") or is_recurrent(node):
        if len(weight.shape) > 2 and not is_recurrent(node):
            return "batched (expert) weights are not quantized yet"
        return f"a product that is not in canonical form ({node.op_type}); canonicalize the model first"
    if node.op_type == "DequantizeLinear":
        return "already quantized, in a form that no format describes"
    return _REASONS.get(node.op_type, f"{node.op_type} is neither a product with a weight nor an embedding look-up")


def _kinds(model: ir.Model) -> dict[ir.Node, Kind]:
    """The Linears that are heads, or that make the values of an attention and neither its queries nor its keys."""

    def behind(role: str) -> set[ir.Node]:
        return _products_before(v for v in model.graph.outputs if port_of(v).role == role)

    operands: dict[int, list[ir.Value]] = {0: [], 1: [], 2: []}
    for node in model.graph:
        if node.op_type == "Attention" and node.domain == "":
            for slot, found in operands.items():
                found.extend(v for v in node.inputs[slot : slot + 1] if v is not None)
    values = _products_before(operands[2]) - _products_before(operands[0]) - _products_before(operands[1])
    kinds = dict.fromkeys(values, Kind.VALUE)
    kinds |= dict.fromkeys(values & behind("present_value"), Kind.CACHED_VALUE)
    return kinds | dict.fromkeys(behind("logits"), Kind.HEAD)


def _products_before(starts: Iterable[ir.Value]) -> set[ir.Node]:
    """The Linears from which one of `starts` is reached without another product in between."""
    products = {"MatMul", "Gemm", "Conv", "Attention"}
    pending, seen, found = list(starts), set(), set()
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if dialect.is_op(node, "Linear"):
            found.add(node)
        elif node.op_type not in products:
            pending.extend(v for v in node.inputs if v is not None)
    return found


def _size(weight: Weight) -> int:
    size = 1
    for dim in weight.shape:
        size *= dim
    return size
