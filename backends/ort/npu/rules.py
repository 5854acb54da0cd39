"""What an execution provider that is not here would take of a graph, by rules that are data.

A rule is one form in which a provider takes an operator. A node is taken if one of its operator's forms fits; if none
does, the reason is what the form that fits best misses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qc.backends.target import Coverage
from qc.passes.canonicalize._graph import attribute, constant, made_by, stored

__all__ = ["Provider", "Rule", "coverage", "placement"]

_FLOAT, _BYTE = ir.DataType.FLOAT, ir.DataType.UINT8


@dataclasses.dataclass(frozen=True)
class Rule:
    """A form in which a provider takes an operator.

    Attributes:
        types: Element types of its first input.
        ranks: Smallest and largest rank of its first input.
        constants: Inputs that, where present, must be known when the graph is loaded.
        attributes: Values that an attribute may have, where present.
        batches: Whether all axes but the last two must be the same in both inputs.
        quantized: Whether it is a product of codes, ``Quantize(op(Dequantize(x), Dequantize(w)))``: x and the result on
            one grid of uint8 each, w of int8 or uint8 with a scale per tensor or, if `per_channel`, per output channel.
        per_channel: See there.
        scale: The step that codes of the result must have, with the zero point 0.
        per_tensor: Whether the operator rounds, and its scale is one number and its codes are uint8.
        produced: Whether a node must make its first input: it is no input of the graph.
    """

    types: Sequence[ir.DataType] = (_FLOAT,)
    ranks: tuple[int, int] = (0, 5)
    constants: Sequence[int] = ()
    attributes: Mapping[str, Sequence[object]] = dataclasses.field(default_factory=dict)
    batches: bool = False
    quantized: bool = False
    per_channel: bool = False
    scale: float | None = None
    per_tensor: bool = False
    produced: bool = False


@dataclasses.dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        title: Its name, for people.
        rules: The forms of each operator, by its name, with its domain if that is not the standard one.
    """

    title: str
    rules: Mapping[str, Sequence[Rule]]


def placement(graph: ir.Graph, provider: Provider) -> list[tuple[ir.Node, str]]:
    """Each node that runs, with the reason why it stays on the processor; empty if the provider takes it.

    Nodes that depend on constants alone do not run: the runtime folds them when it loads the graph. A decode node of a
    constant stays if a form wants the codes.

    Args:
        graph: A graph of fixed shapes.
        provider: The provider.
    """
    known = _Known()
    groups = {
        n: r for n in graph for r in provider.rules.get(_name(n), ()) if r.quantized and not _misses(n, r, known)[1]
    }
    inside = {m for n in groups for m in _around(n)}
    found = []
    for node in graph:
        if known.folds(node) and node not in inside:
            continue
        reason = "" if node in groups or node in inside else _why_not(node, provider, known)
        found.append((node, reason))
    return found


def coverage(model: ir.Model, provider: Provider) -> Coverage:
    """Counts the nodes of a graph of fixed shapes by operator and by the reason why they stay on the processor."""
    placed = placement(model.graph, provider)
    return Coverage.counted(
        ((node, f"runs on the processor: {reason}" if reason else "") for node, reason in placed),
        f"{provider.title}, by its rules",
    )


class _Known:
    """Which values are known when a graph is loaded."""

    def __init__(self) -> None:
        self._found: dict[ir.Value, bool] = {}

    def __call__(self, value: ir.Value | None) -> bool:
        if value is None or stored(value) is not None:
            return True
        node = value.producer()
        if value not in self._found:
            self._found[value] = node is not None and self.folds(node)
        return self._found[value]

    def folds(self, node: ir.Node) -> bool:
        """Whether the runtime computes the results of a node when it loads the graph."""
        return all(map(self, node.inputs)) and not (node.op_type == "DequantizeLinear" and node.domain == "")


def _name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _why_not(node: ir.Node, provider: Provider, known: _Known) -> str:
    rules = provider.rules.get(_name(node))
    if rules is None:
        return f"{provider.title} has no {node.op_type}"
    return max((_misses(node, rule, known) for rule in rules if not rule.quantized), key=lambda m: m[0])[1]


def _misses(node: ir.Node, rule: Rule, known: _Known) -> tuple[int, str]:
    """How many checks of a form a node passes, and what it lacks then; nothing if it fits."""
    for passed, check in enumerate(_CHECKS):
        reason = check(node, rule, known)
        if reason:
            return passed, reason
    return len(_CHECKS), ""


def _type(node: ir.Node, rule: Rule, known: _Known) -> str:
    held = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    if held in rule.types:
        return ""
    spelled = " or ".join(t.name.lower() for t in rule.types)
    return f"its input is {held.name.lower() if held is not None else 'unknown'}, not {spelled}"


def _shape(node: ir.Node, rule: Rule, known: _Known) -> str:
    for value in (*node.inputs, *node.outputs):
        shape = _shape_of(value) if value is not None else ()
        if shape is None or not all(isinstance(d, int) for d in shape):
            return f"the shape of {value.name!r} is not fixed"
    rank, (low, high) = len(_shape_of(node.inputs[0])), rule.ranks
    return "" if low <= rank <= high else f"its input has {rank} axes, not {low} to {high}"


def _shape_of(value: ir.Value) -> Sequence[object] | None:
    """The shape of a value; of a constant, that of its numbers, which may be known better."""
    held = stored(value) or value
    return None if held.shape is None else tuple(held.shape)


def _constants(node: ir.Node, rule: Rule, known: _Known) -> str:
    wrong = [slot for slot in rule.constants if slot < len(node.inputs) and not known(node.inputs[slot])]
    return f"its input {wrong[0]} is not constant" if wrong else ""


def _attributes(node: ir.Node, rule: Rule, known: _Known) -> str:
    for name, allowed in rule.attributes.items():
        held = attribute(node, name, allowed[0])
        if held not in allowed:
            return f"its {name} is {held}, not {' or '.join(map(str, allowed))}"
    return ""


def _batches(node: ir.Node, rule: Rule, known: _Known) -> str:
    if not rule.batches:
        return ""
    a, b = (list(_shape_of(v)) for v in node.inputs[:2])
    return "" if a[:-2] == b[:-2] else f"its operands have different batches, {a} and {b}"


def _rounding(node: ir.Node, rule: Rule, known: _Known) -> str:
    if not rule.per_tensor:
        return ""
    step, zero = constant(node.inputs[1]), (*node.inputs, None)[2]
    if step is None or step.size > 1:
        return "its scale is not one number"
    return "" if zero is None or zero.dtype == _BYTE else f"its codes are {zero.dtype.name.lower()}, not uint8"


def _produced(node: ir.Node, rule: Rule, known: _Known) -> str:
    return "it reads an input of the graph" if rule.produced and node.inputs[0].is_graph_input() else ""


def _codes(node: ir.Node, rule: Rule, known: _Known) -> str:
    if not rule.quantized:
        return ""
    decodes = [made_by(v, "DequantizeLinear") for v in node.inputs if v is not None]
    readers = [u.node for u in node.outputs[0].uses()]
    if any(d is None for d in decodes) or [r.op_type for r in readers] != ["QuantizeLinear"]:
        return "it is not between grids"
    steps = [*(d.inputs for d in decodes), readers[0].inputs]
    weights = 1 if _name(node) in _WEIGHED else None
    for place, (_, scale, zero) in enumerate(steps):
        dtype = zero.dtype
        step = constant(scale)
        if dtype != _BYTE and not (place == weights and dtype == ir.DataType.INT8):
            return f"its grid of {dtype.name.lower()} is not of uint8"
        if step is None or (step.size > 1 and not (place == weights and rule.per_channel)):
            return "its scales are not one constant"
    if rule.scale is not None and (float(steps[-1][1].const_value.numpy()), _zero(steps[-1][2])) != (rule.scale, 0):
        return f"its result is not in steps of {rule.scale}"
    return ""


def _zero(value: ir.Value) -> int:
    return int(value.const_value.numpy())


def _around(node: ir.Node) -> list[ir.Node]:
    """The decode nodes in front of a product of codes, and the encode node behind it."""
    decodes = [v.producer() for v in node.inputs if v is not None]
    return [n for n in (*decodes, node.outputs[0].uses()[0].node) if n is not None]


_WEIGHED = frozenset({"Conv", "Gemm", "MatMul"})

_CHECKS: Sequence[Callable[[ir.Node, Rule, _Known], str]] = (
    _type,
    _shape,
    _constants,
    _attributes,
    _batches,
    _rounding,
    _produced,
    _codes,
)
