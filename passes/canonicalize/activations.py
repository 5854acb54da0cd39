"""Activations written out in elementary operators become Gelu and ``qc::Swish``; gated linear units are found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import attribute, drop_unused, main_nodes, replace, scalar, stored, too_old

__all__ = ["Glu", "RecogniseActivations", "glu_of"]

_TRIGGERS = ("Erf", "Tanh", "Sigmoid")
_BACK, _FORTH = 8, 4  # the longest known spelling of GELU has 6 nodes before its Tanh and 3 behind it
_GRID = np.concatenate([np.linspace(-12, 12, 193), np.linspace(-1, 1, 64)])
_TOLERANCE = 2e-5  # above what constants rounded to float32 or to 7 digits cause, below any two different functions


@dataclasses.dataclass(frozen=True)
class RecogniseActivations(Pass):
    """Rewrites unary elementwise subgraphs that compute a known activation to one node.

    | function | node |
    |---|---|
    | ``x/2 (1 + erf(x / sqrt 2))`` | ``Gelu`` |
    | ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`` | ``Gelu(approximate="tanh")`` |
    | ``x sigmoid(a x)``, a = 1 or 1.702, and Swish | ``qc::Swish(alpha=a)`` |

    No spelling is matched: the subgraph around each Erf, Tanh or Sigmoid that depends on one value is evaluated on
    [-12, 12] in float64 and compared with the functions above. Equal means within 2e-5 everywhere.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        if (note := too_old(model)) is not None:
            return Result(model, False, [], [note])
        done = [n for n in model.graph if dialect.is_op(n, "Swish") or (n.domain == "" and n.op_type == "Gelu")]
        sites = [Site(site_name(n), Outcome.MATCHED, details={"activation": n.op_type}) for n in done]
        for node in main_nodes(model, "Swish"):
            new = dialect.swish(node.inputs[0], float(attribute(node, "alpha", 1.0)), name=node.name)
            sites.append(Site(site_name(node), Outcome.CHANGED, details={"activation": "Swish"}))
            replace(node.outputs[0], [new], like=node)
        sites += [_site(node) for node in main_nodes(model, *_TRIGGERS)]
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
            dialect.sync_functions(model)
        return result


@dataclasses.dataclass(frozen=True)
class Glu:
    """A gated linear unit ``act(gate) * up``: the three values, and the node that applies ``act``."""

    gate: ir.Value
    up: ir.Value
    activation: ir.Node


def glu_of(node: ir.Node) -> Glu | None:
    """Reads `node` as the product of a gated linear unit, in canonical form; None if it is not one."""
    if node.domain != "" or node.op_type != "Mul":
        return None
    for i in (0, 1):
        act, up = node.inputs[i].producer(), node.inputs[1 - i]
        known = act is not None and act.domain == "" and act.op_type in _GLU_ACTIVATIONS
        if not (known or dialect.is_op(act, "Swish")) or stored(up) is not None or up is act.inputs[0]:
            continue
        return Glu(act.inputs[0], up, act)
    return None


_GLU_ACTIVATIONS = frozenset({"Gelu", "Relu", "Sigmoid", "Tanh"})


def _site(trigger: ir.Node) -> Site:
    name = site_name(trigger)
    leaves = _ancestors(trigger)
    for root in _descendants(trigger):
        for leaf in leaves:
            known = _identify(root.outputs[0], leaf)
            if known is None:
                continue
            replace(root.outputs[0], [known.build(leaf, trigger.name)], like=root)
            return Site(name, Outcome.CHANGED, details={"activation": known.name})
    return Site(name, Outcome.SKIPPED, f"{trigger.op_type} is not part of a known activation")


@dataclasses.dataclass(frozen=True)
class _Known:
    name: str
    function: Callable[[np.ndarray], np.ndarray]
    build: Callable[[ir.Value, str | None], ir.Node]


def _gelu(x: ir.Value, name: str | None, approximate: str) -> ir.Node:
    return ir.node("Gelu", [x], {"approximate": approximate}, name=name)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


_ERF = np.vectorize(math.erf)
_KNOWN = (
    _Known("Gelu", lambda x: x / 2 * (1 + _ERF(x / math.sqrt(2))), lambda x, n: _gelu(x, n, "none")),
    _Known(
        "Gelu tanh",
        lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x, n: _gelu(x, n, "tanh"),
    ),
    _Known("Swish", lambda x: x * _sigmoid(x), lambda x, n: dialect.swish(x, 1.0, name=n)),
    _Known("Swish 1.702", lambda x: x * _sigmoid(1.702 * x), lambda x, n: dialect.swish(x, 1.702, name=n)),
)
_TARGETS = tuple(known.function(_GRID) for known in _KNOWN)

_ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Reciprocal": np.reciprocal,
    "Tanh": np.tanh,
    "Erf": _ERF,
    "Sigmoid": _sigmoid,
}


def _identify(root: ir.Value, leaf: ir.Value) -> _Known | None:
    """The activation that `root` is of `leaf`, or None."""
    with np.errstate(all="ignore"):
        values = _evaluate(root, leaf, {})
    if values is None or not np.all(np.isfinite(values)):
        return None
    return next((k for k, t in zip(_KNOWN, _TARGETS, strict=True) if np.abs(values - t).max() < _TOLERANCE), None)


def _evaluate(value: ir.Value, leaf: ir.Value, seen: dict[int, np.ndarray | None]) -> np.ndarray | None:
    """`value` as a function of `leaf` on the grid; None where it depends on anything else but scalars."""
    if value is leaf:
        return _GRID
    number = scalar(value)
    if number is not None:
        return np.float64(number)
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in _ELEMENTWISE:
        return None
    if id(value) not in seen:
        inputs = [_evaluate(v, leaf, seen) for v in node.inputs]
        known = all(v is not None for v in inputs)
        seen[id(value)] = np.asarray(_ELEMENTWISE[node.op_type](*inputs), np.float64) if known else None
    return seen[id(value)]


def _ancestors(trigger: ir.Node) -> list[ir.Value]:
    """The values, nearest first, that the trigger may be seen as a function of."""
    found: list[ir.Value] = []
    level = [v for v in trigger.inputs if v is not None]
    for _ in range(_BACK):
        found += [v for v in level if all(v is not f for f in found) and scalar(v) is None]
        makers = [v.producer() for v in level]
        level = [v for n in makers if n is not None and n.domain == "" and n.op_type in _ELEMENTWISE for v in n.inputs]
    return found


def _descendants(trigger: ir.Node) -> list[ir.Node]:
    """The elementwise nodes behind the trigger, nearest first."""
    found: list[ir.Node] = []
    level = [trigger]
    for _ in range(_FORTH):
        readers = [u.node for n in level for u in n.outputs[0].uses()]
        level = [n for n in readers if n.domain == "" and n.op_type in _ELEMENTWISE]
        found += [n for n in level if n not in found]
    return found
