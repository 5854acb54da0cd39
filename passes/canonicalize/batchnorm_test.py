"""Batch normalizations behind convolutions."""

from __future__ import annotations

import numpy as np
import pytest

from qc.passes.canonicalize.batchnorm import FoldBatchNormalization

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 6, 6)).astype(np.float32)
STATISTICS = {
    "g": RNG.standard_normal(4).astype(np.float32),
    "b": RNG.standard_normal(4).astype(np.float32),
    "m": RNG.standard_normal(4).astype(np.float32),
    "v": (0.5 + RNG.random(4)).astype(np.float32),
}
W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
PORTS = "float[2,3,6,6] x, float[4,3,3,3] w, float[4] c, float[4] g, float[4] b, float[4] m, float[4] v"
NORM = "y = BatchNormalization <epsilon = 0.01> (h, g, b, m, v)"


@pytest.mark.parametrize("conv", ["Conv (x, w)", "Conv (x, w, c)", "Conv <pads = [1,1,1,1]> (x, w, c)"])
def test_a_norm_behind_a_convolution_becomes_its_weights(build, keeps, conv: str) -> None:
    model = build(
        f"g ({PORTS}) => (float[2,4,H,W] y) {{ h = {conv} {NORM} }}", w=W, c=np.ones(4, np.float32), **STATISTICS
    )
    keeps(FoldBatchNormalization(), model, x=X)
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert "w" in model.graph.initializers


def test_a_depthwise_filter_folds_and_a_filter_that_others_read_stays_for_them(build, keeps) -> None:
    model = build(
        f"g ({PORTS}, float[4,1,3,3] d) => (float[2,4,H,W] z) {{ h = Conv (x, w) {NORM} k = Conv <group = 4> (y, d)"
        " n = BatchNormalization (k, g, b, m, v) p = Conv (x, w) q = Conv <group = 4> (p, d) z = Add (n, q) }",
        w=W,
        c=np.ones(4, np.float32),
        d=RNG.standard_normal((4, 1, 3, 3)).astype(np.float32),
        **STATISTICS,
    )
    keeps(FoldBatchNormalization(), model, x=X)
    assert "BatchNormalization" not in {n.op_type for n in model.graph}
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), W)


@pytest.mark.parametrize(
    "body",
    [
        f"k = Conv (x, w) h = Relu (k) {NORM}",
        f"h = Conv (x, w) {NORM} z = Relu (h)",
        f"t = Mul (w, w) h = Conv (x, t) {NORM}",
    ],
)
def test_what_the_equation_does_not_cover_is_left_alone(build, keeps, body: str) -> None:
    model = build(f"g ({PORTS}) => (float[2,4,H,W] y) {{ {body} }}", w=W, c=np.ones(4, np.float32), **STATISTICS)
    before = [n.op_type for n in model.graph]
    result = keeps(FoldBatchNormalization(), model, x=X)
    assert not result.modified
    assert all(s.reason for s in result.sites)
    assert [n.op_type for n in model.graph] == before
