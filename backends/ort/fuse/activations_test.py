from __future__ import annotations

import numpy as np
import pytest

from qc.backends.ort.fuse.activations import FuseSwish

_X = np.random.default_rng(0).standard_normal((2, 5), np.float32) * 4


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_swish_becomes_one_kernel(build, keeps, alpha):
    model = build(f"f (float[a,b] x) => (float[a,b] y) {{ y = qc.Swish <alpha = {alpha}> (x) }}")
    keeps(FuseSwish(), model, [{"x": _X}])
    assert [n.op_type for n in model.graph] == ["QuickGelu"]
    assert not model.functions


def test_a_swish_that_is_read_twice_and_an_output_keeps_its_readers(build, keeps):
    text = "f (float[a,b] x) => (float[a,b] y, float[a,b] z) { y = qc.Swish <alpha = 1.0> (x)\n z = Mul(y, y) }"
    model = build(text)
    keeps(FuseSwish(), model, [{"x": _X}])
    assert [n.op_type for n in model.graph] == ["QuickGelu", "Mul"]


def test_a_swish_in_double_precision_has_no_kernel_and_says_so(build, keeps):
    model = build("f (double[a,b] x) => (double[a,b] y) { y = qc.Swish <alpha = 1.0> (x) }")
    result = keeps(FuseSwish(), model, [{"x": _X.astype(np.float64)}])
    assert not result.modified
    assert "float32" in result.sites[0].reason
