"""What every operator lets through to its channels: the one table that channel groups are made from.

A line names an operator, or one operand of it, how its channels travel (the name of a tracer) and which
actions it forbids, with the reason. To teach the analysis an elementwise operator, add a line.

The actions, on a tensor ``z`` whose channels are along one axis:

| word | action | admitted by ``f`` if |
|---|---|---|
| permute | ``z[:, p]`` | ``f`` treats every channel alike |
| scale | ``z * s`` with ``s > 0`` | ``f(s z) = s^k f(z)``; ``k`` is the degree |
| sign | ``z * s`` with ``s = -1`` or ``1`` | ``f(-z) = -f(z)`` |
| shift | ``z + c`` | ``f(z + c) = f(z) + e`` with ``e`` the same for all ``z`` |
| mix | ``z @ A`` | ``f(z A) = f(z) A`` for orthogonal (or all invertible) ``A`` |
| lift | copies of channels, or fewer channels | ``f`` does not depend on the number of channels |
"""

from __future__ import annotations

import dataclasses

__all__ = ["OPERATORS", "ROUNDING", "Rule"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        tracer: How channels travel through the operator.
        forbids: The forbidden actions, by the words above.
        why: The reason, which completes "<operator> forbids it: ...".
        degree: Degree of homogeneity where scale is not forbidden.
    """

    tracer: str
    forbids: frozenset[str] = frozenset()
    why: str = ""
    degree: float = 1.0


def _rule(tracer: str, forbids: str = "", why: str = "", degree: float = 1.0) -> Rule:
    return Rule(tracer, frozenset(forbids.split()), why, degree)


_LINEAR = _rule("elementwise")
_NONLINEAR = _rule("elementwise", "scale sign shift mix", "it is neither homogeneous nor odd")
_POSITIVE = _rule("elementwise", "sign shift mix", "it is homogeneous for positive factors only")
_ODD = _rule("elementwise", "scale shift mix", "it is odd but not homogeneous")
_EVERYTHING = "permute scale sign shift mix lift"

OPERATORS: dict[str, Rule] = {
    # elementwise, of one operand
    "Identity": _LINEAR,
    "Cast": _LINEAR,
    "Dropout": _LINEAR,
    "Neg": _rule("elementwise", "shift", "it turns the sign of a shift"),
    "Relu": _POSITIVE,
    "LeakyRelu": _POSITIVE,
    "Abs": _POSITIVE,
    "Sqrt": _rule("elementwise", "sign shift mix", "it is homogeneous of degree one half", degree=0.5),
    "Reciprocal": _rule("elementwise", "shift mix", "it is homogeneous of degree minus one", degree=-1.0),
    "Tanh": _ODD,
    "Erf": _ODD,
    "Sin": _ODD,
    "Atan": _ODD,
    "Sign": _ODD,
    "Softsign": _ODD,
    "Gelu": _NONLINEAR,
    "qc::Swish": _NONLINEAR,
    "Sigmoid": _NONLINEAR,
    "HardSigmoid": _NONLINEAR,
    "HardSwish": _NONLINEAR,
    "Mish": _NONLINEAR,
    "Softplus": _NONLINEAR,
    "Elu": _NONLINEAR,
    "Selu": _NONLINEAR,
    "Celu": _NONLINEAR,
    "Exp": _NONLINEAR,
    "Log": _NONLINEAR,
    "Cos": _NONLINEAR,
    "Clip": _rule("elementwise", "scale sign shift mix", "its bounds are one number for all channels"),
    "Max": _rule("extremum", "sign shift mix", "it is homogeneous for positive factors only"),
    "Min": _rule("extremum", "sign shift mix", "it is homogeneous for positive factors only"),
    "Pow": _rule("power", "sign shift mix", "a power is homogeneous for positive factors only"),
    # elementwise, of several operands
    "Add": _rule("add"),
    "Sum": _rule("add"),
    "Sub": _rule("add", "shift", "it turns the sign of a shift"),
    "Add:scalar": _rule("", "scale sign mix", "it adds one number to all channels"),
    "Where": _rule("where", "shift", "it replaces elements by zero"),
    "Mul": _rule("multiply", "shift mix", "a product of channels only commutes with scaling and permutation"),
    "Div": _rule("multiply", "shift mix", "a quotient of channels only commutes with scaling and permutation"),
    "Mul:vector": _rule("", "shift", "it scales a shift"),
    "Mul:scalar": _rule("", "shift", "it scales a shift"),
    # products with weights
    "qc::Linear": _rule("linear"),
    "MatMul": _rule("matmul"),
    "MatMul:stacked": _rule("", "lift", "all experts keep one width"),
    "Gather": _rule("gather"),
    "Conv": _rule("conv"),
    "Conv:padded": _rule("", "shift", "it pads with zeros, which a shift does not reach"),
    "Conv:depthwise": _rule("", "shift mix", "every channel has a filter of its own"),
    "Conv:grouped": _rule("", "lift", "the number of channels of a group is fixed"),
    # normalizations
    "RMSNormalization": _rule("norm"),
    "RMSNormalization:input": _rule(
        "", "scale shift lift", "the root mean square of all channels divides each; only rotations and signs keep it"
    ),
    "RMSNormalization:output": _rule("", "shift lift", "it adds no bias, and its channels are those of its input"),
    "LayerNormalization": _rule("norm"),
    "LayerNormalization:input": _rule(
        "", "scale sign shift lift", "it subtracts the mean of all channels and divides by their deviation"
    ),
    "LayerNormalization:output": _rule("", "lift", "its channels are those of its input"),
    "BatchNormalization": _rule("batchnorm", "mix", "it is a factor and a shift per channel"),
    # attention
    "RotaryEmbedding": _rule("rotary"),
    "RotaryEmbedding:rotated": _rule(
        "", "permute shift lift", "its table gives every pair of channels a frequency of its own"
    ),
    "Attention": _rule("attention"),
    "Attention:query": _rule("", "shift lift", "a shifted query adds a number per key to the scores"),
    "Attention:key": _rule("", "lift", "the scores are sums over the channels of a head"),
    "Attention:softcap": _rule("", "shift", "the soft cap is not invariant to a shift of the scores"),
    "Attention:value": _rule("", "lift", "all heads must keep one width"),
    # over space
    "MaxPool": _rule("pool", "sign mix", "the maximum is homogeneous for positive factors only"),
    "GlobalMaxPool": _rule("pool", "sign mix", "the maximum is homogeneous for positive factors only"),
    "AveragePool": _rule("pool"),
    "AveragePool:padded": _rule("", "shift", "it averages padding in"),
    "GlobalAveragePool": _rule("pool"),
    "Resize": _rule("pool"),
    "ReduceMean": _rule("reduce"),
    "ReduceSum": _rule("reduce", "shift", "it multiplies a shift by the number of elements"),
    "ReduceMax": _rule("reduce", "sign mix", "the maximum is homogeneous for positive factors only"),
    "Pad": _rule("pad", "shift", "it pads with zeros, which a shift does not reach"),
    # moving channels
    "Reshape": _rule("reshape", "lift", "it holds the number of channels as a constant"),
    "Flatten": _rule("reshape", "lift", "it fixes where each channel lies"),
    "Squeeze": _rule("reshape"),
    "Unsqueeze": _rule("reshape"),
    "Transpose": _rule("transpose"),
    "Expand": _rule("expand"),
    "Concat": _rule("concat", "lift", "it fixes where the channels of each part begin"),
    "Split": _rule("split", "lift", "it holds the number of channels of each part as a constant"),
    "Slice": _rule("slice", "lift", "it holds the range of channels as a constant"),
    "GatherND": _rule("gathernd", "lift", "it holds the range of channels as a constant"),
    "DepthToSpace": _rule("opaque", _EVERYTHING, "it moves channels into space"),
    # what only reads shapes
    "Shape": _rule("shape", "lift", "it reads the number of channels"),
    # the boundary
    "input": _rule("", _EVERYTHING, "the caller gives it"),
    "output": _rule("", _EVERYTHING, "the caller reads it"),
    "reduced": _rule("", _EVERYTHING.replace("permute ", ""), "it joins all channels in one number"),
    "mixed axes": _rule("", _EVERYTHING, "its operands carry channels on different axes"),
    "opaque": _rule("opaque", _EVERYTHING, "the analysis does not know this operator"),
}
"""Rules by operator (``domain::name`` outside of the standard domain), or ``operator:operand``."""

ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantize"})
"""Types of the operators that bring activations to a grid: but for the rounding, every action commutes with them."""
