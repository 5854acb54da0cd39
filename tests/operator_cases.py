"""Small graphs, one for each operator that the channel analysis knows, with what it must admit there."""

from __future__ import annotations

import dataclasses

import numpy as np

from qc.ir.channels import ChannelGroup, find_groups
from qc.ir.model import Model
from qc.ir.text import parse

__all__ = ["CASES", "LINEARS", "TOKENS", "Case", "between", "build", "forced", "group_of", "run"]

TOKENS = "g (float[batch,seq,6] x) => (float[batch,seq,5] y)"
IMAGES = "g (float[batch,3,9,9] x) => (float[batch,5,H,W] y)"
BIASES = {"b1": (8,), "b2": (5,)}
LINEARS = {"w1": (8, 6), "w2": (5, 8), **BIASES}
CONVS = {"w1": (8, 3, 3, 3), "w2": (5, 8, 3, 3), **BIASES}
HEADS = """
  q0 = qc.Linear:bias (x, wq, bq)  k0 = qc.Linear:bias (x, wk, bk)  v0 = qc.Linear:bias (x, w1, b1)
  q1 = Reshape (q0, to_q)  k1 = Reshape (k0, to_k)  v1 = Reshape (v0, to_k)
  q = Transpose <perm=[0,2,1,3]> (q1)  k = Transpose <perm=[0,2,1,3]> (k1)  v = Transpose <perm=[0,2,1,3]> (v1)
"""
JOIN = "  t = Transpose <perm=[0,2,1,3]> (a)  h = Reshape (t, to_o)  y = qc.Linear:bias (h, w2, b2)"
ATTENTION = {"wq": (16, 6), "wk": (8, 6), "w1": (8, 6), "w2": (5, 16), "bq": (16,), "bk": (8,), **BIASES}
INTEGERS = {"to_q": [0, 0, 4, 4], "to_k": [0, 0, 2, 4], "to_o": [0, 0, 16]}


def between(middle: str) -> str:
    """``h`` is produced by w1, ``z`` is consumed by w2."""
    return f"{TOKENS} {{ h = qc.Linear:bias (x, w1, b1) {middle} y = qc.Linear:bias (z, w2, b2) }}"


def images(middle: str, first: str = "", second: str = "") -> str:
    return f"{IMAGES} {{ h = Conv {first} (x, w1, b1) {middle} y = Conv {second} (z, w2, b2) }}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph, and what the group of the channels that `weight` produces admits."""

    text: str
    admits: str
    weights: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: LINEARS)
    weight: str = "w1"
    role: str = "producers"


EVERYTHING = "permute scale sign shift orthogonal split merge"
GATE = {**LINEARS, "w3": (8, 6), "b3": (8,)}
VECTOR = {**LINEARS, "g": (8,)}
CASES = {
    "nothing": Case(between("z = Identity (h)"), EVERYTHING),
    "residual": Case(between("p = qc.Linear:bias (x, w3, b3) z = Add (p, h)"), EVERYTHING, GATE),
    "Neg": Case(between("z = Neg (h)"), "permute scale sign orthogonal split merge"),
    "Relu": Case(between("z = Relu (h)"), "permute scale split"),
    "LeakyRelu": Case(between("z = LeakyRelu <alpha=0.1> (h)"), "permute scale split"),
    "Abs": Case(between("z = Abs (h)"), "permute scale split"),
    "Relu squared": Case(between("r = Relu (h) z = Mul (r, r)"), "permute scale split"),
    "Pow": Case(between("r = Relu (h) c = Constant <value_float=2.0> () z = Pow (r, c)"), "permute scale split"),
    "Sqrt": Case(between("r = Abs (h) z = Sqrt (r)"), "permute scale split"),
    "Tanh": Case(between("z = Tanh (h)"), "permute sign split"),
    "Gelu": Case(between("z = Gelu (h)"), "permute split"),
    "Sigmoid": Case(between("z = Sigmoid (h)"), "permute split"),
    "Swish": Case(between("z = qc.Swish <alpha=1.0> (h)"), "permute split"),
    "Clip": Case(
        between("lo = Constant <value_float=0.0> () hi = Constant <value_float=1.0> () z = Clip (h, lo, hi)"),
        "permute split",
    ),
    "Min": Case(between("z = Min (h, g)"), "permute scale split", VECTOR),
    "Max": Case(between("z = Max (g, h)"), "permute scale split", VECTOR),
    "Min of two": Case(between("p = qc.Linear:bias (x, w3, b3) z = Min (p, h)"), "permute scale split", GATE),
    "Min with one number": Case(
        between("c = Constant <value_float=0.3> () z = Min (h, c)"), "permute split"
    ),
    "gate": Case(
        between("p = qc.Linear:bias (x, w3, b3) s = qc.Swish <alpha=1.0> (p) z = Mul (s, h)"),
        "permute scale sign split",
        GATE,
    ),
    "gate, its nonlinear side": Case(
        between("p = qc.Linear:bias (x, w3, b3) s = qc.Swish <alpha=1.0> (p) z = Mul (s, h)"),
        "permute split",
        GATE,
        "w3",
    ),
    "product": Case(
        between("p = qc.Linear:bias (x, w3, b3) z = Mul (p, h)"), "permute scale sign split", GATE
    ),
    "layer scale": Case(between("z = Mul (h, g)"), "permute scale sign orthogonal split", VECTOR),
    "scalar factor": Case(
        between("c = Constant <value_float=3.0> () z = Mul (h, c)"), "permute scale sign orthogonal split merge"
    ),
    "scalar term": Case(between("c = Constant <value_float=3.0> () z = Add (h, c)"), "permute shift split"),
    "constant vector": Case(between("z = Add (h, g)"), EVERYTHING, VECTOR),
    "RMSNormalization, input": Case(between("z = RMSNormalization (h, g)"), "permute sign orthogonal", VECTOR),
    "RMSNormalization, output": Case(
        between("z = RMSNormalization (h, g)"), "permute scale sign orthogonal", VECTOR, "w2", "consumers"
    ),
    "LayerNormalization, input": Case(
        between("z = LayerNormalization (h, g, b3)"), "permute orthogonal", {**VECTOR, "b3": (8,)}
    ),
    "LayerNormalization, output": Case(
        between("z = LayerNormalization (h, g, b3)"),
        "permute scale sign shift orthogonal",
        {**VECTOR, "b3": (8,)},
        "w2",
        "consumers",
    ),
    "Concat": Case(
        between("p = qc.Linear:bias (x, w3, b3) z = Concat <axis=-1> (p, h)"),
        "permute scale sign shift orthogonal",
        {**LINEARS, "w3": (4, 6), "b3": (4,), "w2": (5, 12)},
    ),
    "Slice": Case(
        f"{TOKENS} {{ p = qc.Linear:bias (x, w1, b1) z = Slice (p, one, eight, last) y = qc.Linear:bias (z, w2, b2) }}",
        "permute scale sign shift orthogonal",
        {**LINEARS, "w2": (5, 7)},
        "w2",
        "consumers",
    ),
    "output": Case(
        "g (float[batch,6] x) => (float[batch,5] y, float[batch,8] h)"
        " { h = qc.Linear:bias (x, w1, b1) y = qc.Linear:bias (h, w2, b2) }",
        "",
    ),
    "unknown operator": Case(between("z = Softmax <axis=-1> (h)"), ""),
    "query and key": Case(
        f"{TOKENS} {{ {HEADS} a = Attention (q, k, v) {JOIN} }}",
        "permute scale sign shift orthogonal",
        ATTENTION,
        "wk",
    ),
    "query and key, rotated": Case(
        f"{TOKENS} {{ {HEADS} qr = RotaryEmbedding (q, cos, sin) kr = RotaryEmbedding (k, cos, sin)"
        f" a = Attention (qr, kr, v) {JOIN} }}",
        "scale sign orthogonal",
        {**ATTENTION, "cos": (2, 7, 2), "sin": (2, 7, 2)},
        "wk",
    ),
    "key under a soft cap": Case(
        f"{TOKENS} {{ {HEADS} a = Attention <softcap=1.0> (q, k, v) {JOIN} }}",
        "permute scale sign orthogonal",
        ATTENTION,
        "wk",
    ),
    "value": Case(
        f"{TOKENS} {{ {HEADS} a = Attention (q, k, v) {JOIN} }}", "permute scale sign shift orthogonal", ATTENTION
    ),
    "Conv": Case(images("z = Identity (h)"), EVERYTHING, CONVS),
    "Conv, padded": Case(
        images("z = Identity (h)", second="<pads=[1,1,1,1]>"), "permute scale sign orthogonal split merge", CONVS
    ),
    "Conv, depthwise": Case(
        images("z = Conv <group=8> (h, w3, b3)"), "permute scale sign split", {**CONVS, "w3": (8, 1, 3, 3), "b3": (8,)}
    ),
    "Conv, grouped": Case(
        images("z = Identity (h)", second="<group=2>").replace("[batch,5", "[batch,6"),
        "permute scale sign shift orthogonal",
        {**CONVS, "w2": (6, 4, 3, 3), "b2": (6,)},
    ),
    "BatchNormalization": Case(
        images("z = BatchNormalization (h, g, b3, m, v)"),
        "permute scale sign shift split",
        {**CONVS, "g": (8,), "b3": (8,), "m": (8,), "v": (8,)},
    ),
    "MaxPool": Case(
        images("z = MaxPool <kernel_shape=[2,2]> (h)"), "permute scale shift split", CONVS
    ),
    "AveragePool": Case(images("z = AveragePool <kernel_shape=[2,2]> (h)"), EVERYTHING, CONVS),
    "AveragePool, padding counted": Case(
        images("z = AveragePool <kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1> (h)"),
        "permute scale sign orthogonal split merge",
        CONVS,
    ),
    "Pad": Case(images("z = Pad (h, pads)"), "permute scale sign orthogonal split merge", CONVS),
    "mean over space": Case(
        "g (float[batch,3,9,9] x) => (float[batch,5] y) { h = Conv (x, w1, b1) axes = Constant <value_ints=[2,3]> ()"
        " z = ReduceMean <keepdims=0> (h, axes) y = qc.Linear:bias (z, w2, b2) }",
        EVERYTHING,
        {**CONVS, "w2": (5, 8)},
    ),
    "embedding": Case(
        "g (int64[batch,seq] x) => (float[batch,seq,5] y) { h = Gather (w1, x) y = qc.Linear:bias (h, w2, b2) }",
        EVERYTHING,
        {"w1": (10, 8), "w2": (5, 8), "b2": (5,)},
    ),
    "experts": Case(
        "g (float[3,seq,6] x) => (float[3,seq,5] y) { h = MatMul (x, w1) z = Relu (h) y = MatMul (z, w2) }",
        "permute scale",
        {"w1": (3, 6, 8), "w2": (3, 8, 5)},
    ),
}  # fmt: skip

_ELEMENTWISE = {
    "permute sign split": ("Erf", "Sin", "Atan", "Sign", "Softsign"),
    "permute split": (
        "HardSigmoid", "HardSwish", "Mish", "Softplus", "Elu", "Selu", "Celu", "Exp", "Cos",
    ),
}  # fmt: skip
CASES |= {name: Case(between(f"z = {name} (h)"), admits) for admits, names in _ELEMENTWISE.items() for name in names}
CASES |= {
    "Cast": Case(between("z = Cast <to=1> (h)"), EVERYTHING),
    "Dropout": Case(between("z = Dropout (h)"), EVERYTHING),
    "Log": Case(between("r = Abs (h) z = Log (r)"), "permute split"),
    "Reciprocal": Case(between("z = Reciprocal (h)"), "permute scale sign split"),
    "Sum": Case(between("p = qc.Linear:bias (x, w3, b3) z = Sum (p, h, g)"), EVERYTHING, {**GATE, "g": (8,)}),
    "Sub": Case(
        between("p = qc.Linear:bias (x, w3, b3) z = Sub (p, h)"), "permute scale sign orthogonal split merge", GATE
    ),
    "Where": Case(
        between(
            "m = ReduceMean (x, last) zero = Constant <value_float=0.0> () c = Greater (m, zero) z = Where (c, h, zero)"
        ),
        "permute scale sign orthogonal split merge",
    ),
    "quotient": Case(between("p = qc.Linear:bias (x, w3, b3) z = Div (p, h)"), "permute scale sign split", GATE),
    "vector divisor": Case(between("z = Div (h, g)"), "permute scale sign orthogonal split", VECTOR),
    "Unsqueeze, Expand, Squeeze": Case(
        between("u = Unsqueeze (h, one) e = Expand (u, three) r = ReduceMean (e, one) z = Squeeze (r, one)"),
        EVERYTHING,
    ),
    "Split": Case(
        f"{TOKENS} {{ h = qc.Linear:bias (x, w1, b1) p, q = Split <axis=-1, num_outputs=2> (h)"
        " z = Add (p, q) y = qc.Linear:bias (z, w2, b2) }",
        "permute scale sign shift orthogonal",
        {**LINEARS, "w2": (5, 4)},
        "w2",
        "consumers",
    ),
    "Shape": Case(
        between("s = Shape <start=-1> (h) c = Cast <to=1> (s) z = Mul (h, c)"), "permute scale sign orthogonal"
    ),
    "mean over the channels": Case(
        between("m = ReduceMean (h, last) z = Add (h, m)"), "permute", {**LINEARS}
    ),
    "channels on two axes": Case(
        "g (float[batch,8,6] x) => (float[batch,8,5] y)"
        " { h = qc.Linear:bias (x, w1, b1) t = Transpose <perm=[0,2,1]> (h) z = Add (h, t)"
        " y = qc.Linear:bias (z, w2, b2) }",
        "",
    ),
    "input": Case(between("z = Identity (h)"), "", LINEARS, "w1", "consumers"),
    "GlobalMaxPool": Case(
        "g (float[batch,3,9,9] x) => (float[batch,5] y)"
        " { h = Conv (x, w1, b1) p = GlobalMaxPool (h) z = Squeeze (p, space) y = qc.Linear:bias (z, w2, b2) }",
        "permute scale shift split",
        {**CONVS, "w2": (5, 8)},
    ),
    "Flatten": Case(
        "g (float[batch,3,9,9] x) => (float[batch,5] y)"
        " { h = Conv (x, w1, b1) z = Flatten (h) y = qc.Linear:bias (z, w2, b2) }",
        "permute scale sign shift orthogonal",
        {**CONVS, "w2": (5, 392)},
    ),
    "GlobalAveragePool": Case(
        "g (float[batch,3,9,9] x) => (float[batch,5] y)"
        " { h = Conv (x, w1, b1) p = GlobalAveragePool (h) z = Squeeze (p, space) y = qc.Linear:bias (z, w2, b2) }",
        EVERYTHING,
        {**CONVS, "w2": (5, 8)},
    ),
    "sum over space": Case(
        "g (float[batch,3,9,9] x) => (float[batch,5] y)"
        " { h = Conv (x, w1, b1) z = ReduceSum <keepdims=0> (h, space) y = qc.Linear:bias (z, w2, b2) }",
        "permute scale sign orthogonal split merge",
        {**CONVS, "w2": (5, 8)},
    ),
    "maximum over space": Case(
        "g (float[batch,3,9,9] x) => (float[batch,5] y)"
        " { h = Conv (x, w1, b1) z = ReduceMax <keepdims=0> (h, space) y = qc.Linear:bias (z, w2, b2) }",
        "permute scale shift split",
        {**CONVS, "w2": (5, 8)},
    ),
    "DepthToSpace": Case(
        images("z = DepthToSpace <blocksize=2> (h)"), "", {**CONVS, "w2": (5, 2, 3, 3)}
    ),
    "GatherND": Case(
        "g (float[3,seq,6] x) => (float[2,seq,5] y)"
        " { h = MatMul (x, w1) z = GatherND (h, chosen) y = MatMul (z, w2) }",
        "permute scale sign orthogonal",
        {"w1": (3, 6, 8), "w2": (2, 8, 5)},
        "w2",
        "consumers",
    ),
}  # fmt: skip


def build(case: Case) -> Model:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in case.weights.items():
        values = rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 1)
        if name in ("g", "v"):
            values = 1 + 0.3 * np.abs(values)
        arrays[name] = values.astype(np.float32)
    words = set(case.text.replace(",", " ").replace(")", " ").split())
    used = {n: np.array(v, np.int64) for n, v in (INTEGERS | _SMALL).items() if n in words}
    return parse(case.text, weights=arrays | used)


_SMALL = {
    "pads": [0, 0, 1, 1, 0, 0, 1, 1],
    "one": [1],
    "eight": [8],
    "last": [-1],
    "space": [2, 3],
    "three": [1, 3, 1, 1],
    "chosen": [[2], [0]],
}


def group_of(model: Model, case: Case) -> ChannelGroup:
    groups = [g for g in find_groups(model) if g.kind != "heads"]
    groups = [g for g in groups if any(u.name == case.weight and u.index.max() >= 0 for u in getattr(g, case.role))]
    assert len(groups) == 1, [g.id for g in groups]
    return groups[0]


def run(model: Model) -> list[dict[str, np.ndarray]]:
    """The outputs on random inputs, in float64."""
    import torch

    from qc.ir.execute import Executor

    rng = np.random.default_rng(1)
    sizes = {"batch": 2, "seq": 7}
    feeds = {}
    for port in model.signature.inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in port.shape]
        feeds[port.name] = rng.integers(0, 10, shape) if port.dtype.is_integer() else rng.standard_normal(shape)
    return [{n: t.numpy() for n, t in Executor(model, dtype=torch.float64)(feeds).items()}]


def forced(group: ChannelGroup) -> ChannelGroup:
    """The group as one would have it who does not know the operators in between."""
    signs = {"consumer": -1.0, "producer": 1.0, "bias": 1.0}
    uses = [
        dataclasses.replace(u, power=signs[u.role], parity=1, lead=True) for u in group.family.uses if u.role in signs
    ]
    return dataclasses.replace(group, uses=tuple(uses))
