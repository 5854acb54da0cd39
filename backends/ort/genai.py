"""``genai_config.json``: what makes a decoder's directory one that onnxruntime-genai loads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from qc.ir.model import Model, Port

__all__ = ["CONFIG", "genai_config", "shares_buffer"]

CONFIG = "genai_config.json"

_TYPE = "decoder"  # genai's name for any decoder-only network whose inputs and outputs the file describes


def genai_config(model: Model, filename: str) -> dict[str, Any] | None:
    """Describes a decoder to onnxruntime-genai.

    Args:
        model: The lowered model.
        filename: Name of the ONNX file.

    Returns:
        The content of the file, or None if the model is no decoder with a cache, if the names of its cache do not
        follow a pattern with the layer index, or if its context length is unknown: genai needs each.
    """
    signature = model.signature
    tokens, logits = signature.input("tokens"), signature.output("logits")
    if not signature.is_decoder or tokens is None or logits is None or signature.input("decoder_tokens") is not None:
        return None
    names = {
        role: _template([p for p in (*signature.inputs, *signature.outputs) if p.role == role])
        for role in ("past_key", "past_value", "present_key", "present_value")
    }
    facts = _facts(model)
    vocabulary, context = logits.shape[-1], facts.get("max_position_embeddings")
    if None in names.values() or not isinstance(vocabulary, int) or not isinstance(context, int):
        return None
    cache = signature.input("past_key")
    assert cache is not None
    inputs = {"input_ids": tokens.name, "past_key_names": names["past_key"], "past_value_names": names["past_value"]}
    for key, role in (("attention_mask", "mask"), ("position_ids", "positions")):
        if (port := signature.input(role)) is not None:
            inputs[key] = port.name
    eos = facts.get("eos_token_id")
    bos = facts.get("bos_token_id")
    pad = facts.get("pad_token_id")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    decoder = {
        "filename": filename,
        "inputs": inputs,
        "outputs": {
            "logits": logits.name,
            "present_key_names": names["present_key"],
            "present_value_names": names["present_value"],
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "num_hidden_layers": sum(p.role == "past_key" for p in signature.inputs),
        "num_key_value_heads": cache.shape[1],
        "num_attention_heads": _query_heads(model) or facts.get("num_attention_heads"),
        "head_size": cache.shape[3],
        "hidden_size": facts.get("hidden_size"),
    }
    body = {
        "type": _TYPE,
        "vocab_size": vocabulary,
        "context_length": context,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
        "decoder": {k: v for k, v in decoder.items() if v is not None},
    }
    return {
        "model": {k: v for k, v in body.items() if v is not None},
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": shares_buffer(model)},
    }


def shares_buffer(model: Model) -> bool:
    """Whether past and present of every layer may be one buffer: only if GroupQueryAttention writes each of them."""
    caches = [v for v, p in zip(model.graph.outputs, model.signature.outputs, strict=True) if p.role == "present_key"]
    writers = [v.producer() for v in caches]
    return bool(writers) and all(n is not None and n.op_type == "GroupQueryAttention" for n in writers)


def _template(ports: Sequence[Port]) -> str | None:
    """The pattern with ``%d`` that gives the name of each port from its layer index."""
    for match in re.finditer(r"\d+", ports[0].name) if ports else ():
        pattern = ports[0].name[: match.start()] + "%d" + ports[0].name[match.end() :]
        if pattern.count("%") == 1 and all(p.name == pattern % (p.index or 0) for p in ports):
            return pattern
    return None


def _query_heads(model: Model) -> int | None:
    """Number of query heads, from the attention that writes the first cache."""
    for value, port in zip(model.graph.outputs, model.signature.outputs, strict=True):
        node = value.producer()
        if port.role == "present_key" and node is not None and "num_heads" in node.attributes:
            return node.attributes["num_heads"].as_int()
    return None


def _facts(model: Model) -> dict[str, Any]:
    """The model's own configuration files, the later over the earlier; the provenance where they are silent."""
    facts: dict[str, Any] = {}
    for key, name in (("max_positions", "max_position_embeddings"), ("bos", "bos_token_id"), ("eos", "eos_token_id")):
        if (value := model.provenance.get(key)) is not None:
            facts[name] = json.loads(value)
    for asset in ("config.json", "generation_config.json"):
        if asset in model.assets:
            held = json.loads(model.assets[asset].read_text("utf-8"))
            facts |= {k: v for k, v in {**held, **held.get("text_config", {})}.items() if v is not None}
    return facts
