"""Forms of two computations that a graph of fixed structure can express, in place of those that PyTorch prefers.

Both are exact. They act on what is computed, not on which model computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

__all__ = ["explicit_attention_heads", "use_static_experts"]

_EXPERTS = "every_expert"


@contextlib.contextmanager
def explicit_attention_heads() -> Iterator[None]:
    """While active, a single key-value head that serves all query heads is expanded before the attention.

    PyTorch broadcasts it silently; the exporter's translation expects equal numbers of heads.
    """
    attention = torch.nn.functional.scaled_dot_product_attention

    def expanded(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        if key.dim() == 4 and key.shape[1] == 1 and query.shape[1] != 1:
            key, value = (t.expand(-1, query.shape[1], -1, -1) for t in (key, value))
        return attention(query, key, value, *args, **options)

    torch.nn.functional.scaled_dot_product_attention = expanded
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention


def use_static_experts(model: transformers.PreTrainedModel) -> None:
    """Makes a mixture of experts run every expert on every token and weight the results; most weights are zero.

    Which experts run then depends on no data, every product is with a constant weight, and memory stays that of one
    expert's activations. The cost is arithmetic that a sparse kernel would save.
    """
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _run_every_expert)
    model.set_experts_implementation(_EXPERTS)


def _run_every_expert(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sum over experts e of share[t, e] * expert_e(hidden[t]).

    Args:
        experts: The module with stacked weights, [experts, out, in] or transposed.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k], the experts of each token.
        top_k_weights: [tokens, k], their weights.
    """
    total = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        share = torch.where(top_k_index == expert, top_k_weights, 0.0).sum(-1, keepdim=True)
        if experts.has_gate:
            result = experts._apply_gate(_linear(experts, "gate_up_proj", expert, hidden_states))
        else:
            result = experts.act_fn(_linear(experts, "up_proj", expert, hidden_states))
        result = _linear(experts, "down_proj", expert, result)
        if experts.has_post_expert_norm:
            result = experts.post_expert_norm(result)
        total = total + share * result
    return total


def _linear(experts: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return torch.nn.functional.linear(x, weight.transpose(0, 1) if experts.is_transposed else weight, bias)
