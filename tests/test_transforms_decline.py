"""A transform that cannot act leaves the model as it is, bit for bit, and says why at each site."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from qc.ir.model import Model
from qc.ir.text import parse, to_text
from qc.passes.base import Outcome
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline, pass_class, pass_names

TRANSFORMS = [name for name in pass_names() if ".transform." in pass_class(name).__module__]
REFUSALS = {
    "quantized": (
        "g (float[n,32] x) => (float[n,8] y) {"
        " h = qc.Linear (x, w1)  d = DequantizeLinear <axis=0> (codes, scale)  y = qc.Linear (h, d) }"
    ),
    "read by a product of two activations": (
        "g (float[n,32] x) => (float[n,n] y) { h = qc.Linear (x, w1)  t = Transpose <perm=[1,0]> (h)"
        "  y = MatMul (h, t) }"
    ),
    "behind an unknown operator": (
        "g (float[n,32] x) => (float[n,8] y) {"
        " h = qc.Linear (x, w1)  p = CumSum (h, last)  s = Hardmax (p)  y = qc.Linear (s, w2) }"
    ),
}


def build(text: str) -> Model:
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((32, 32)).astype(np.float32),
        "w2": rng.standard_normal((8, 32)).astype(np.float32),
        "codes": rng.integers(-127, 127, (8, 32)).astype(np.int8),
        "scale": np.ones(8, np.float32),
        "last": np.array(1, np.int64),
    }
    return parse(text, weights={n: w for n, w in weights.items() if n in text})


def fingerprint(model: Model) -> tuple[str, dict[str, str]]:
    held = {n: hashlib.sha256(v.const_value.tobytes()).hexdigest() for n, v in model.graph.initializers.items()}
    return to_text(model), held


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("case", REFUSALS)
def test_a_transform_that_cannot_act_changes_no_bit_and_says_why(name: str, case: str) -> None:
    model = build(REFUSALS[case])
    before = fingerprint(model)
    x = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    steps = parse_pipeline(f"{name}{{optional=true}}")
    model, (report,) = PassManager(steps).run(model, calibration=[{"x": x}], probe=[{"x": x}])
    assert not report.modified
    assert fingerprint(model) == before
    assert report.sites
    assert all(site.reason for site in report.sites)
    assert all(site.outcome is not Outcome.CHANGED for site in report.sites)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_excluded_is_left_as_it_is(name: str) -> None:
    text = "g (float[n,32] x) => (float[n,8] y) { h = qc.Linear (x, w1)  y = qc.Linear (h, w2) }"
    model = build(text)
    before = fingerprint(model)
    x = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    steps = parse_pipeline(f"{name}{{optional=true,exclude=[w1,w2]}}")
    model, (report,) = PassManager(steps).run(model, calibration=[{"x": x}], probe=[{"x": x}])
    assert not report.modified
    assert fingerprint(model) == before
    assert report.sites
    assert all(site.reason for site in report.sites)
