"""The replaced computations equal those they replace."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="these rewrites act on torch modules")
transformers = pytest.importorskip("transformers", reason="these rewrites act on transformers models")

from qc.frontend.hf_rewrites import explicit_attention_heads, use_static_experts  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_running_every_expert_equals_running_the_chosen_ones() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM._from_config(config, experts_implementation="eager").eval()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = model(ids).logits
        use_static_experts(model)
        actual = model(ids).logits
    assert torch.allclose(actual, expected, atol=1e-6)
    assert model.get_experts_implementation() not in ("eager", None)


def test_an_expanded_key_value_head_gives_the_same_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = (torch.randn(2, 1, 5, 8, generator=generator) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    original = torch.nn.functional.scaled_dot_product_attention
    with explicit_attention_heads():
        actual = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(actual, expected, atol=1e-6)
    assert torch.nn.functional.scaled_dot_product_attention is original
