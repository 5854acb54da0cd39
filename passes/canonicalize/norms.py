"""Normalisations written out in elementary operators become LayerNormalization and RMSNormalization."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, site_name
from qc.passes.canonicalize._graph import (
    Decline,
    add_constant,
    attribute,
    drop_unused,
    integers,
    made_by,
    main_nodes,
    operands,
    replace,
    scalar,
    sole_consumer,
    stored,
    too_old,
)

__all__ = ["RecogniseNorms"]


@dataclasses.dataclass(frozen=True)
class RecogniseNorms(Pass):
    """Rewrites decomposed normalisations over the last axis to the standard operators.

    * ``x / sqrt(mean(x^2) + eps) * g`` -> ``RMSNormalization(x, g)``;
    * ``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * g + b`` -> ``LayerNormalization(x, g, b)``.

    The square may be Pow or Mul; the inverse root Reciprocal, Div or Pow. The gain may be missing (then it is ones),
    ``1 + w`` (computed when read), or come after a Cast back to the type of x. A gain that is not a constant vector
    stays a Mul behind a norm without gain.

    Exact up to the order of summation in the mean.
    """

    contract: ClassVar[Contract] = Exact(1e-4)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        if (note := too_old(model)) is not None:
            return Result(model, False, [], [note])
        kinds = ("LayerNormalization", "RMSNormalization")
        sites = [Site(site_name(n), Outcome.MATCHED, details={"op": n.op_type}) for n in main_nodes(model, *kinds)]
        for node in main_nodes(model, "Mul", "Div"):
            try:
                core = _match(node)
                if core is None:
                    continue
                op_type = _rewrite(core)
            except Decline as reason:
                sites.append(Site(site_name(node), Outcome.SKIPPED, str(reason)))
            else:
                sites.append(Site(site_name(node), Outcome.CHANGED, details={"op": op_type}))
        result = Result.of(model, sites)
        if result.modified:
            drop_unused(model)
        return result


@dataclasses.dataclass(frozen=True)
class _Core:
    """``root = x / sqrt(mean(x^2) + eps)``, or that of ``x - mean(x)`` if centred."""

    root: ir.Node
    x: ir.Value
    epsilon: float
    centred: bool
    width: int


def _match(node: ir.Node) -> _Core | None:
    """Matches ``v * (mean(v^2) + eps)^-1/2``.

    Raises:
        Decline: If it is one but not over the last axis, or its size is unknown.
    """
    for value, radicand in _quotients(node):
        add = made_by(radicand, "Add")
        if add is None:
            continue
        for mean, eps in operands(add):
            reduce, epsilon = made_by(mean, "ReduceMean"), scalar(eps)
            if reduce is None or epsilon is None or not _is_square(reduce.inputs[0], value):
                continue
            _check_last_axis(reduce)
            x = _uncentred(value)
            width = value.shape[-1] if value.shape is not None and len(value.shape) > 0 else None
            if not isinstance(width, int):
                raise Decline("the size of the normalised axis is unknown")
            return _Core(node, value if x is None else x, epsilon, x is not None, width)
    return None


def _quotients(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """The ways to read `node` as ``v / sqrt(u)``, as pairs (v, u)."""
    if node.op_type == "Div":
        return [(node.inputs[0], _under_root(node.inputs[1], 0.5))]
    return [(v, _under_inverse_root(r)) for v, r in operands(node)]


def _under_root(value: ir.Value | None, exponent: float) -> ir.Value | None:
    sqrt, power = made_by(value, "Sqrt"), made_by(value, "Pow")
    if sqrt is not None and exponent == 0.5:
        return sqrt.inputs[0]
    return power.inputs[0] if power is not None and scalar(power.inputs[1]) == exponent else None


def _under_inverse_root(value: ir.Value | None) -> ir.Value | None:
    reciprocal, quotient = made_by(value, "Reciprocal"), made_by(value, "Div")
    if reciprocal is not None:
        return _under_root(reciprocal.inputs[0], 0.5)
    if quotient is not None and scalar(quotient.inputs[0]) == 1.0:
        return _under_root(quotient.inputs[1], 0.5)
    return _under_root(value, -0.5)


def _is_square(value: ir.Value | None, of: ir.Value | None) -> bool:
    power, product = made_by(value, "Pow"), made_by(value, "Mul")
    if power is not None:
        return power.inputs[0] is of and scalar(power.inputs[1]) == 2.0
    return product is not None and product.inputs[0] is of and product.inputs[1] is of


def _check_last_axis(reduce: ir.Node) -> None:
    axes = attribute(reduce, "axes")
    if axes is None and len(reduce.inputs) > 1:
        axes = integers(reduce.inputs[1])
    x = reduce.inputs[0]
    last = {-1} if x.shape is None else {-1, len(x.shape) - 1}
    if axes is None or len(axes) != 1 or axes[0] not in last:
        raise Decline(f"the mean is over axes {axes}, expected the last one")
    if attribute(reduce, "keepdims", 1) != 1:
        raise Decline("the mean drops its axis")


def _uncentred(value: ir.Value) -> ir.Value | None:
    """X if `value` is ``x - mean(x)``, else None."""
    difference = made_by(value, "Sub")
    mean = made_by(difference.inputs[1], "ReduceMean") if difference is not None else None
    if mean is None or mean.inputs[0] is not difference.inputs[0]:
        return None
    try:
        _check_last_axis(mean)
    except Decline:
        return None
    return mean.inputs[0]


def _rewrite(core: _Core) -> str:
    x, out, graph = core.x, core.root.outputs[0], core.root.graph
    follower = sole_consumer(out)
    cast_in = made_by(x, "Cast")
    if follower is not None and follower.op_type == "Cast" and cast_in is not None:
        # Half-precision models normalise in float32 and go back: that is what stash_type 1 means.
        narrow = cast_in.inputs[0]
        multiply = sole_consumer(follower.outputs[0])
        gain = _gain(multiply, follower.outputs[0], core.width)
        if gain is not None and narrow.dtype == follower.outputs[0].dtype:
            x, out = narrow, multiply.outputs[0]
        else:
            gain = None
    else:
        gain = _gain(follower, out, core.width)
        out = out if gain is None else follower.outputs[0]
    bias = _bias(sole_consumer(out), out, core.width) if core.centred else None
    scale = gain if gain is not None else _ones(graph, core, x)
    if bias is not None:
        out = sole_consumer(out).outputs[0]
    op_type = "LayerNormalization" if core.centred else "RMSNormalization"
    inputs = [x, scale] if bias is None else [x, scale, bias]
    node = ir.node(op_type, inputs, {"axis": -1, "epsilon": core.epsilon, "stash_type": 1}, name=core.root.name)
    replace(out, [node], like=core.root)
    return op_type


def _is_vector(value: ir.Value | None, width: int) -> bool:
    return value is not None and value.shape is not None and value.shape.dims == (width,)


def _gain(multiply: ir.Node | None, normed: ir.Value, width: int) -> ir.Value | None:
    """The constant gain vector with which `multiply` scales `normed`, or None."""
    if multiply is None or multiply.domain != "" or multiply.op_type != "Mul":
        return None
    value = multiply.inputs[1] if multiply.inputs[0] is normed else multiply.inputs[0]
    if not _is_vector(value, width):
        return None
    if _plain(value) is not None:
        return value
    add = made_by(value, "Add")
    for weight, offset in operands(add) if add is not None else ():
        tensor, number = _plain(weight), scalar(offset)
        if tensor is None or number is None or not _is_vector(weight, width):
            continue
        source = weight if weight.producer() is None else weight.producer().inputs[0]
        return _offset_gain(multiply.graph, source.name, tensor, value.dtype or tensor.dtype, number)
    return None


def _offset_gain(graph: ir.Graph, name: str, tensor: ir.TensorProtocol, dtype: ir.DataType, number: float) -> ir.Value:
    def read() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(dtype.numpy()) + dtype.numpy().type(number))

    lazy = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(tensor.shape), name=name)
    return add_constant(graph, f"{name}_plus_{number:g}", lazy)


def _plain(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant, possibly behind a Cast that decodes it."""
    cast = made_by(value, "Cast")
    return stored(value if cast is None else cast.inputs[0])


def _bias(add: ir.Node | None, scaled: ir.Value, width: int) -> ir.Value | None:
    if add is None or add.domain != "" or add.op_type != "Add":
        return None
    value = add.inputs[1] if add.inputs[0] is scaled else add.inputs[0]
    return value if _is_vector(value, width) and _plain(value) is not None else None


def _ones(graph: ir.Graph, core: _Core, x: ir.Value) -> ir.Value:
    dtype = (x.dtype or ir.DataType.FLOAT).numpy()
    return add_constant(graph, f"{core.root.outputs[0].name}_ones", ir.tensor(np.ones(core.width, dtype)))
