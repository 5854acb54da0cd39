from __future__ import annotations

import numpy as np

from qc.backends.ort.fuse.inline import InlineDialect

_X = np.random.default_rng(0).standard_normal((2, 4))


def test_operators_without_a_kernel_become_standard_ones(build, keeps):
    model = build("f (double[a,b] x) => (double[a,b] y) { y = qc.Swish <alpha = 1.5> (x) }")
    result = keeps(InlineDialect(), model, [{"x": _X}])
    assert len(result.sites) == 1
    assert not model.functions
    assert "qc" not in model.opset_imports
    assert {n.domain for n in model.graph} == {""}


def test_operators_in_subgraphs_are_replaced_too(build, keeps):
    text = """f (bool c, double[a,b] x) => (double[a,b] y) {
      y = If (c) <then_branch = t () => (double[a,b] p) { p = qc.Swish <alpha = 1.0> (x) },
                  else_branch = e () => (double[a,b] q) { q = Identity(x) }>
    }"""
    model = build(text)
    keeps(InlineDialect(), model, [{"c": np.array(v), "x": _X} for v in (True, False)])
    assert all(n.domain == "" for n in model.graph.all_nodes())


def test_a_model_without_them_is_unchanged(build, keeps):
    assert not keeps(
        InlineDialect(), build("f (float[a] x) => (float[a] y) { y = Exp(x) }"), [{"x": np.ones(2, np.float32)}]
    ).modified
