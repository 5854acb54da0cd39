"""Tiny random models of every supported architecture, as Hugging Face directories. Needs torch and transformers.

``ARCHITECTURES[name](directory)`` writes ``config.json`` and ``model.safetensors``. Two layers, hidden sizes that are
multiples of 32, seeded weights; norm gains, biases and running statistics are random too, because a gain of one and a
bias of zero hide mistakes. Each also has a few outlier-free but uneven rows, as trained weights do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ARCHITECTURES", "randomize", "write"]

VOCAB = 128


def randomize(model: Any, seed: int = 0) -> None:
    """Fills every parameter and floating buffer of a module with seeded values of a healthy scale."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted({**dict(model.named_parameters()), **_persistent(model)}.items()):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                values = 1 + 0.3 * noise.abs()
            elif tensor.dim() >= 2:
                values = noise / tensor[0].numel() ** 0.5
            elif name.endswith("weight"):  # the gain of a norm
                values = 1 + 0.2 * noise
            else:
                values = 0.1 * noise
            tensor.copy_(values)


def write(directory: Path, class_name: str, config: Any, *, dtype: str = "float32", shard: str | None = None) -> None:
    """Builds the model of a configuration, randomizes and saves it."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    randomize(model)
    model.to(getattr(torch, dtype)).save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))


def _persistent(model: Any) -> dict[str, Any]:
    names = set(model.state_dict())
    return {n: b for n, b in model.named_buffers() if n in names and b.is_floating_point()}


def _maker(class_name: str, config_name: str, /, **options: Any) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        import transformers

        write(directory, class_name, getattr(transformers, config_name)(**options))

    return make


_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip

ARCHITECTURES: dict[str, Callable[[Path], None]] = {
    "llama": _maker("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    "mistral": _maker("MistralForCausalLM", "MistralConfig", **_DECODER, sliding_window=4),
    "qwen2": _maker("Qwen2ForCausalLM", "Qwen2Config", **_DECODER, tie_word_embeddings=True),
    "qwen3": _maker("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=32),
    "gemma3": _maker(
        "Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=32, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _maker("Phi3ForCausalLM", "Phi3Config", **_DECODER),
    "gpt2": _maker(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=0, eos_token_id=1,
    ),
    "opt": _maker(
        "OPTForCausalLM", "OPTConfig", vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64, bos_token_id=0, eos_token_id=1,
    ),
    "gpt-neox": _maker(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", vocab_size=VOCAB, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    ),
    "falcon": _maker(
        "FalconForCausalLM", "FalconConfig", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    ),
    "mixtral": _maker("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4, num_experts_per_tok=2),
    "bert": _maker("BertModel", "BertConfig", **_ENCODER),
    "roberta": _maker("RobertaModel", "RobertaConfig", **(_ENCODER | {"pad_token_id": 1, "type_vocab_size": 1})),
    "distilbert": _maker(
        "DistilBertModel", "DistilBertConfig", vocab_size=VOCAB, dim=64, hidden_dim=96, n_layers=2, n_heads=4,
        max_position_embeddings=64,
    ),
    "vit": _maker(
        "ViTForImageClassification", "ViTConfig", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=8, num_labels=10,
    ),
    "clip": _maker(
        "CLIPModel", "CLIPConfig", projection_dim=32,
        text_config=_ENCODER | {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8,
        },
    ),
    "resnet": _maker(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1],
        layer_type="bottleneck", num_labels=10,
    ),
    "mobilenetv2": _maker(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25, image_size=64, num_labels=10,
    ),
    "convnext": _maker(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[32, 64], depths=[1, 1], num_stages=2,
        image_size=32, num_labels=10,
    ),
    "t5": _maker(
        "T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2,
        num_heads=4, decoder_start_token_id=0,
    ),
}  # fmt: skip
"""Writer of each tiny model by a short name."""
