"""Every supported architecture: each product, norm, activation, rotation and attention becomes one node, and it still
computes what it computed."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

from qc.passes.canonicalize import canonicalize_passes
from qc.passes.canonicalize.masks import describe_mask

pytest.importorskip("torch", reason="the models are exported by torch")
pytest.importorskip("transformers", reason="the models are those of transformers")

from architectures import exported
from test_frontend_architectures import example_feeds, open_session

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours

_LLAMA = {"Linear": 15, "RMSNormalization": 5, "Swish": 2, "RotaryEmbedding": 4, "Attention": 2}
_BERT = {"Linear": 13, "LayerNormalization": 5, "Gelu": 2, "Attention": 2}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"RMSNormalization": 9},
    "gemma3": {"Linear": 15, "RMSNormalization": 13, "Gelu": 2, "RotaryEmbedding": 4, "Attention": 2},
    "phi3": _LLAMA | {"Linear": 9},
    "gpt2": {"Linear": 9, "LayerNormalization": 5, "Gelu": 2, "Attention": 2},
    "opt": {"Linear": 13, "LayerNormalization": 5, "Relu": 2, "Attention": 2},
    "gpt-neox": {"Linear": 9, "LayerNormalization": 5, "Gelu": 2, "RotaryEmbedding": 4, "Attention": 2},
    "falcon": {"Linear": 9, "LayerNormalization": 3, "Gelu": 2, "RotaryEmbedding": 4, "Attention": 2},
    "bert": _BERT,
    "vit": {"Linear": 13, "LayerNormalization": 5, "Gelu": 2, "Attention": 2},
    "t5": {"Linear": 33, "RMSNormalization": 12, "Relu": 4, "Attention": 6},
}
ELEMENTARY = {"Softmax", "Erf", "Tanh", "Sigmoid", "Sqrt", "Cos", "Sin", "Gemm", "MatMul", "ReduceMean"}
"""What must not be left over where everything is recognised."""

MASKS = {
    "llama": ["causal", "causal"],
    "mistral": ["causal_window", "causal_window"],
    "gemma3": ["causal_window", "causal"],
    "bert": ["padding", "padding"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_everything_is_recognised_and_computes_the_same(name: str, models: Path, tmp_path: Path) -> None:
    _, model = exported(name, models)
    feeds = [example_feeds(model, batch, seq, past, seed=seq) for batch, seq, past in ((2, 5, 4), (1, 7, 0), (2, 1, 3))]
    session = open_session(model, tmp_path / "before")
    before = [session.run(None, f) for f in feeds]

    for rewrite in canonicalize_passes():
        rewrite(model)
    assert not any(rewrite(model).modified for rewrite in canonicalize_passes()), "a second run finds nothing to do"

    session = open_session(model, tmp_path / "after")
    for batch, expected in zip(feeds, before, strict=True):
        for actual, wanted in zip(session.run(None, batch), expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))
    ops = collections.Counter(n.op_type for n in model.graph)
    allowed = {"Tanh": 1} if name == "bert" else {"Log": 0}  # the pooler
    assert {op: ops[op] for op in EXPECTED[name]} == EXPECTED[name]
    left = {op: ops[op] for op in ELEMENTARY if ops[op] > allowed.get(op, 0)}
    assert not left
    if name in MASKS:
        masks = [describe_mask(model, n.inputs[3]) for n in model.graph if n.op_type == "Attention"]
        assert [m.kind for m in masks] == MASKS[name]
