"""Small models for the tests of the backends: a decoder with either kind of cache, one without, and an encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir.model import Model, set_role

VOCABULARY, WIDTH, HEADS, HEAD, POSITIONS = 96, 32, 2, 16, 48

_WEIGHTS = {
    "embed": (VOCABULARY, WIDTH),
    "place": (POSITIONS, WIDTH),
    "wq": (WIDTH, WIDTH),
    "wk": (WIDTH, WIDTH),
    "wv": (WIDTH, WIDTH),
    "wo": (WIDTH, WIDTH),
    "head": (WIDTH, VOCABULARY),
}

_EMBED = "e = Gather(embed, input_ids)\n p = Gather(place, position_ids)\n x = Add(e, p)"
_QKV = "q = MatMul(x, wq)\n k = MatMul(x, wk)\n v = MatMul(x, wv)"
_TAIL = "o = MatMul(y, wo)\n h = Add(x, o)\n logits = MatMul(h, head)"
_CACHES = "float[batch,2,past,16] past_key, float[batch,2,past,16] past_value"
_PRESENTS = "float[batch,2,total,16] present_key, float[batch,2,total,16] present_value"

_APPENDING = f"""<ir_version: 10, opset_import: ["" : 23]>
decoder (int64[batch,seq] input_ids, int64[batch,seq] position_ids, {_CACHES})
    => (float[batch,seq,96] logits, {_PRESENTS}) {{
 {_EMBED}
 {_QKV}
 y, present_key, present_value =
    Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2> (q, k, v, , past_key, past_value)
 {_TAIL}
}}"""

_SHARING = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
decoder (int64[batch,seq] input_ids, int64[batch,total] attention_mask, int64[batch,seq] position_ids, {_CACHES})
    => (float[batch,seq,96] logits, {_PRESENTS}) {{
 {_EMBED}
 {_QKV}
 axis = Constant <value = int64[1] {{1}}> ()
 one = Constant <value = int64[1] {{1}}> ()
 count = ReduceSum <keepdims = 0> (attention_mask, axis)
 last = Sub(count, one)
 lengths = Cast <to = 6> (last)
 size = Shape <start = 1, end = 2> (attention_mask)
 zero = Constant <value = int64 {{0}}> ()
 length = Gather(size, zero)
 longest = Cast <to = 6> (length)
 y, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>
    (q, k, v, past_key, past_value, lengths, longest)
 {_TAIL}
}}"""

_PLAIN = f"""<ir_version: 10, opset_import: ["" : 23]>
decoder (int64[batch,seq] input_ids, int64[batch,seq] position_ids) => (float[batch,seq,96] logits) {{
 {_EMBED}
 {_QKV}
 y = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 2> (q, k, v)
 {_TAIL}
}}"""

_ENCODER = """<ir_version: 10, opset_import: ["" : 23]>
encoder (int64[batch,seq] input_ids, int64[batch,seq] attention_mask) => (float[batch,seq,32] last_hidden_state) {
 e = Gather(embed, input_ids)
 x = MatMul(e, wq)
 last_hidden_state = Tanh(x)
}"""

_ROLES = {
    "input_ids": "tokens",
    "attention_mask": "mask",
    "position_ids": "positions",
    "past_key": "past_key.0",
    "past_value": "past_value.0",
    "present_key": "present_key.0",
    "present_value": "present_value.0",
    "logits": "logits",
    "last_hidden_state": "hidden",
}
_NAMES = {
    "past_key": "past_key_values.0.key",
    "past_value": "past_key_values.0.value",
    "present_key": "present.0.key",
    "present_value": "present.0.value",
}


def _build(text: str, seed: int = 0) -> Model:
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape, np.float32) * 0.4 for name, shape in _WEIGHTS.items()}
    values = {v.name: v for n in model.graph for v in n.inputs if v is not None}
    for name, array in arrays.items():
        if name not in values:
            continue
        value = values[name]
        value.const_value = ir.tensor(array, name=name)
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
        model.graph.register_initializer(value)
    for value in (*model.graph.inputs, *model.graph.outputs):
        set_role(value, _ROLES[value.name or ""])
        value.name = _NAMES.get(value.name or "", value.name)
    built = Model.of(model)
    built.record(max_positions=POSITIONS, eos=1)
    return built


_TEXTS = {"appending": _APPENDING, "sharing": _SHARING, "plain": _PLAIN, "encoder": _ENCODER}


@pytest.fixture
def build() -> Callable[..., Model]:
    """Builds a model by kind: ``appending``, ``sharing``, ``plain`` (decoders with the same weights), ``encoder``."""
    return lambda kind, seed=0: _build(_TEXTS[kind], seed)


@pytest.fixture
def decoder_files(tmp_path: Path) -> dict[str, Path]:
    """The configuration files of a decoder, as a checkpoint has them."""
    config = {
        "model_type": "llama",
        "max_position_embeddings": POSITIONS,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    file = tmp_path / "source" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(config))
    return {"config.json": file}
