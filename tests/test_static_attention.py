"""Attention on grids: what is written out, what is left alone, and how it is multiplied."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qc.backends.ort.integers import LowerIntegerMatMul
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.verify import compare
from qc.passes.base import Outcome
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline
from qc.passes.quantize.activations import QuantizeActivations

_HEADER = '<ir_version: 10, opset_import: ["" : 23]> f (float[b,2,s,8] q, float[b,2,t,8] k, float[b,2,t,4] v, '
_MASKS = {
    "none": ("bool[1] unused", "Attention (q, k, v)"),
    "bool": ("bool[b,1,s,t] mask", "Attention (q, k, v, mask)"),
    "float": ("float[b,1,s,t] mask", "Attention <scale = 0.2> (q, k, v, mask)"),
}
_PIPELINE = "quantize-activations{mode=static,attention=true}"


def build(mask: str, node: str) -> Model:
    return Model.of(ir.from_onnx_text(f"{_HEADER}{mask}) => (float[b,2,s,4] y) {{ y = {node} }}"))


def batch(seed: int, keys: int, mask: str = "none") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (2, 2, 3, 8), "k": (2, 2, keys, 8), "v": (2, 2, keys, 4)}
    found = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    seen = rng.random((2, 1, 3, keys)) < 0.7
    seen[..., 0] = True
    masks = {"none": ("unused", np.ones(1, bool)), "bool": ("mask", seen)}
    name, value = masks.get(mask, ("mask", np.where(seen, 0, np.float32(-1e4)).astype(np.float32)))
    return found | {name: value}


@pytest.mark.parametrize("mask", _MASKS)
def test_both_products_run_on_integers_and_masks_are_kept(mask: str) -> None:
    model = build(*_MASKS[mask])
    batches = [batch(seed, keys, mask) for seed, keys in ((0, 5), (1, 7))]
    before = [Session(model).run(b) for b in batches]
    model, reports = PassManager(parse_pipeline(_PIPELINE)).run(model, calibration=batches)
    assert [s.outcome for s in reports[-1].sites] == [Outcome.CHANGED]
    assert [n.op_type for n in model.graph].count("QuantizeLinear") == 4
    written = [Session(model).run(b) for b in batches]
    assert all(d.sqnr > 30 for old, new in zip(before, written, strict=True) for d in compare(old, new))
    assert LowerIntegerMatMul()(model).modified
    ops = [n.op_type for n in model.graph]
    assert ops.count("MatMulIntegerToFloat") == 2
    assert not {"MatMul", "DequantizeLinear", "Attention"} & set(ops)
    for optimize in (False, True):
        lowered = [Session(model, optimize=optimize).run(b) for b in batches]
        assert all(d.max_abs < 1e-4 for old, new in zip(written, lowered, strict=True) for d in compare(old, new))
    assert not LowerIntegerMatMul()(model).modified


@pytest.mark.parametrize(
    ("node", "reason"),
    [("Attention <is_causal = 1> (q, k, v)", "causal"), ("Attention <softcap = 3.0> (q, k, v)", "caps its scores")],
)
def test_other_attentions_are_left_alone_with_the_reason(node: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        PassManager(parse_pipeline(_PIPELINE)).run(build("bool[1] unused", node), calibration=[batch(0, 5)])


def test_only_static_grids_are_for_attention() -> None:
    with pytest.raises(InputError, match="attention"):
        QuantizeActivations(attention=True)
