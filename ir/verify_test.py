"""Tolerances of models that round activations."""

from __future__ import annotations

import pytest

from qc.ir import dialect
from qc.ir.text import parse
from qc.ir.verify import tolerance


@pytest.mark.parametrize(("bits", "expected"), [(8, 0.05), (6, 0.05), (4, 0.2)])
def test_the_coarser_the_grid_the_more_an_exact_pass_may_differ(bits: int, expected: float) -> None:
    model = parse("g (float[n,4] x) => (float[n,4] y) { h = Identity (x)  y = Identity (h) }")
    assert tolerance(model, 1e-4) == 1e-4
    first, last = model.graph
    node = dialect.dynamic_quantize(first.outputs[0], bits=bits, token=True, symmetric=False)
    model.graph.insert_before(last, node)
    last.replace_input_with(0, node.outputs[0])
    assert tolerance(model, 1e-4) == pytest.approx(expected)
    assert tolerance(model, 0.5) == 0.5
