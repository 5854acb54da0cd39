from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.passes.fuse.gqa import FuseGroupQueryAttention

HEADS, KV, D = 4, 2, 16
_RNG = np.random.default_rng(0)
_ANGLES = np.arange(64)[:, None] / 10.0 ** (np.arange(D // 2) / 2)
_CONSTANTS = {
    "cos": np.cos(_ANGLES).astype(np.float32),
    "sin": np.sin(_ANGLES).astype(np.float32),
    "sizes": np.array([HEADS * D, KV * D, KV * D]),
    "sq": np.array([0, 0, HEADS, D]),
    "skv": np.array([0, 0, KV, D]),
    "so": np.array([0, 0, HEADS * D]),
    "zero": np.array(0),
    "one": np.array(1),
    "ax1": np.array([1]),
    "ax12": np.array([1, 2]),
    "w": np.array(3),
    "gain": _RNG.standard_normal(D).astype(np.float32),
}
_TYPES = {np.dtype("float32"): "float", np.dtype("int64"): "int64"}

_MASK = """
 length = Shape <start = 1, end = 2> (qkv)
 s0 = Squeeze(length)
 cached = Shape <start = 2, end = 3> (past_key)
 before = Squeeze(cached)
 t0 = Add(before, s0)
 r = Range(zero, s0, one)
 p = Add(r, before)
 p2 = Unsqueeze(p, ax1)
 j = Range(zero, t0, one)
 seen = LessOrEqual(j, p2)
 {extra}
 keep = Cast <to = 9> (attention_mask)
 kept = Unsqueeze(keep, ax12)
 mask = And({seen}, kept)
"""
_CAUSAL = _MASK.format(extra="", seen="seen")
_WINDOW = _MASK.format(extra="d = Sub(p2, j)\n near = Less(d, w)\n both = And(seen, near)", seen="both")
_SPARSE = _MASK.format(
    extra="d = Sub(p2, j)\n e = Mod(d, w)\n f = Cast <to = 9> (e)\n both = Xor(seen, f)", seen="both"
)

_SPLIT = """
 q, k, v = Split <axis = -1> (qkv, sizes)
 q4 = Reshape(q, sq)
 k4 = Reshape(k, skv)
 v4 = Reshape(v, skv)
"""
_TURN = """
 qt = Transpose <perm = [0, 2, 1, 3]> ({q})
 kt = Transpose <perm = [0, 2, 1, 3]> ({k})
 vt = Transpose <perm = [0, 2, 1, 3]> (v4)
"""
_HEADS = _SPLIT + _TURN.format(q="q4", k="k4")
_NORMED = _SPLIT + " qn = RMSNormalization(q4, gain)\n kn = RMSNormalization(k4, gain)\n" + _TURN.format(q="qn", k="kn")
_ROTATE = """
 qr = RotaryEmbedding {options} (qt, cos, sin, position_ids)
 kr = RotaryEmbedding {options} (kt, cos, sin, position_ids)
"""
_PLAIN_ROTATE = _ROTATE.format(options="")
_ATTEND = """
 present_key = Concat <axis = -2> (past_key, {k})
 present_value = Concat <axis = -2> (past_value, vt)
 o = Attention <{attributes}> ({q}, present_key, present_value, mask)
 ot = Transpose <perm = [0, 2, 1, 3]> (o)
 merged = Reshape(ot, so)
 y = Neg(merged)
"""
_ROTATED = _ATTEND.format(q="qr", k="kr", attributes="scale = 0.25")
_ROLES = {
    "attention_mask": "mask",
    "position_ids": "positions",
    "past_key": "past_key.0",
    "past_value": "past_value.0",
    "present_key": "present_key.0",
    "present_value": "present_value.0",
}


def _model(build: Callable[..., Model], body: str, roles: dict[str, str] | None = None, **constants) -> Model:
    held = {k: v for k, v in (_CONSTANTS | constants).items() if k in body.replace(",", " ").replace(")", " ")}
    declared = "".join(f", {_TYPES[v.dtype]}[{','.join(map(str, v.shape))}] {k}" for k, v in held.items())
    declared = declared.replace("int64[] ", "int64 ")
    text = (
        "f (int64[batch,seq] ids, float[batch,seq,128] qkv, int64[batch,total] attention_mask, "
        "int64[batch,seq] position_ids, "
        f"float[batch,{KV},past,{D}] past_key, float[batch,{KV},past,{D}] past_value{declared}) => "
        f"(float[batch,seq,64] y, float[batch,{KV},all,{D}] present_key, float[batch,{KV},all,{D}] present_value)"
        " {" + body + "}"
    )
    return build(text, roles or _ROLES, **held)


def _feed(batch: int, seq: int, past: int) -> dict[str, np.ndarray]:
    return {
        "ids": np.zeros((batch, seq), np.int64),
        "qkv": _RNG.standard_normal((batch, seq, 128), np.float32),
        "attention_mask": np.ones((batch, past + seq), np.int64),
        "position_ids": np.broadcast_to(past + np.arange(seq), (batch, seq)).copy(),
        "past_key": _RNG.standard_normal((batch, KV, past, D), np.float32),
        "past_value": _RNG.standard_normal((batch, KV, past, D), np.float32),
    }


_FEEDS = [_feed(2, 7, 0), _feed(3, 1, 5), _feed(1, 4, 6)]


def _ops(model: Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_rotation_cache_and_causal_attention_become_one_kernel_on_the_packed_projection(build, keeps):
    model = _model(build, _CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED)
    result = keeps(FuseGroupQueryAttention(), model, _FEEDS)
    lengths = ["ReduceSum", "Sub", "Cast", "Shape", "Gather", "Cast"]
    assert _ops(model) == [*lengths, "GroupQueryAttention", "Neg"]
    assert result.sites[0].details == {
        "kernel": "GroupQueryAttention", "rotary": True, "window": -1, "copied": False,
    }  # fmt: skip
    assert [v.name for v in model.graph.inputs] == ["ids", "qkv", "attention_mask", "past_key", "past_value"]
    assert model.signature.output("present_key").index == 0


def test_a_window_and_a_soft_cap_become_attributes(build, keeps):
    attend = _ATTEND.format(q="qr", k="kr", attributes="scale = 0.25, softcap = 2.0")
    model = _model(build, _WINDOW + _HEADS + _PLAIN_ROTATE + attend)
    keeps(FuseGroupQueryAttention(), model, _FEEDS)
    node = next(n for n in model.graph if n.op_type == "GroupQueryAttention")
    assert node.attributes["local_window_size"].as_int() == 3
    assert node.attributes["softcap"].as_float() == 2.0


def test_norms_of_queries_and_keys_stay_in_front_of_the_kernel(build, keeps):
    model = _model(build, _CAUSAL + _NORMED + _PLAIN_ROTATE + _ROTATED)
    result = keeps(FuseGroupQueryAttention(), model, _FEEDS)
    assert _ops(model).count("RMSNormalization") == 2
    assert "Transpose" not in _ops(model)
    assert result.sites[0].details["rotary"]
    assert result.sites[0].details["copied"]


@pytest.mark.parametrize("options", ["<interleaved = 1>", "<rotary_embedding_dim = 8>"])
def test_an_interleaved_rotation_is_the_kernels_too_but_not_one_of_eight_channels(build, keeps, options):
    partial = "dim" in options
    table = {name: _CONSTANTS[name][:, :4].copy() for name in ("cos", "sin")} if partial else {}
    model = _model(build, _CAUSAL + _HEADS + _ROTATE.format(options=options) + _ROTATED, **table)
    result = keeps(FuseGroupQueryAttention(), model, _FEEDS)
    assert result.sites[0].details["rotary"] == (not partial)


def test_attention_without_rotation_is_fused_too(build, keeps):
    attend = _ATTEND.format(q="qt", k="kt", attributes="is_causal = 0")
    model = _model(build, _CAUSAL + _HEADS + attend)
    result = keeps(FuseGroupQueryAttention(), model, _FEEDS)
    assert not result.sites[0].details["rotary"]
    assert not result.sites[0].details["copied"]


def test_a_rotation_of_unknown_positions_stays_in_front_of_the_kernel(build, keeps):
    roles = _ROLES | {"position_ids": "other"}
    model = _model(build, _CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED, roles)
    shifted = [feed | {"position_ids": feed["position_ids"] * 2} for feed in _FEEDS]
    result = keeps(FuseGroupQueryAttention(), model, shifted)
    assert not result.sites[0].details["rotary"]
    assert _ops(model).count("RotaryEmbedding") == 2


def test_positions_computed_from_the_mask_are_recognised(build, keeps):
    rotate = _PLAIN_ROTATE.replace("position_ids", "running")
    positions = " row = Unsqueeze(p, zero)\n like = Shape <start = 0, end = 2> (qkv)\n running = Expand(row, like)\n"
    model = _model(build, _CAUSAL + positions + _HEADS + rotate + _ROTATED)
    result = keeps(FuseGroupQueryAttention(), model, _FEEDS)
    assert result.sites[0].details["rotary"]


def test_a_length_of_the_cache_that_is_read_elsewhere_comes_from_the_mask(build, keeps):
    body = _CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED.replace("Neg(merged)", "Mul(merged, far)")
    body = body.replace(" y = Mul", " far = Cast <to = 1> (before)\n y = Mul")
    model = _model(build, body, _ROLES | {"ids": "tokens"})
    keeps(FuseGroupQueryAttention(), model, _FEEDS)
    past = next(v for v in model.graph.inputs if v.name == "past_key")
    assert [use.node.op_type for use in past.uses()] == ["GroupQueryAttention"]


def test_the_right_padding_of_a_prompt_is_not_seen_by_real_tokens(build):
    model = _model(build, _CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED)
    feed = _feed(2, 6, 0)
    feed["attention_mask"][1, 4:] = 0
    before = Session(model).run(feed)["y"]
    FuseGroupQueryAttention()(model)
    after = Session(model).run(feed)["y"]
    np.testing.assert_allclose(after[0], before[0], atol=1e-5)
    np.testing.assert_allclose(after[1, :4], before[1, :4], atol=1e-5)


def test_past_and_present_may_be_one_buffer(build):
    import onnx_ir as ir
    import onnxruntime as ort

    model = _model(build, _CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED)
    feed = _feed(1, 1, 5)
    expected = Session(model).run(feed)
    FuseGroupQueryAttention()(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    binding, buffers = session.io_binding(), {}
    for name in ("key", "value"):
        buffer = np.zeros((1, KV, 12, D), np.float32)
        buffer[:, :, :5] = feed[f"past_{name}"]
        buffers[name] = ort.OrtValue.ortvalue_from_numpy(buffer)
        binding.bind_ortvalue_input(f"past_{name}", buffers[name])
        binding.bind_ortvalue_output(f"present_{name}", buffers[name])
    binding.bind_cpu_input("ids", feed["ids"])
    binding.bind_cpu_input("qkv", feed["qkv"])
    binding.bind_cpu_input("attention_mask", feed["attention_mask"])
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[-1], expected["y"], atol=1e-5)
    np.testing.assert_allclose(buffers["key"].numpy()[:, :, :6], expected["present_key"], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_SPARSE + _HEADS + _PLAIN_ROTATE + _ROTATED, "not causal"),
        (_CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED.replace("Neg(merged)", "Neg(merged)\n twice = Shape(present_key)"),
         "something else reads"),
        (_CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED.replace("(past_key, kr)", "(kr, past_key)"), "cache"),
    ],
    ids=["other mask", "present read again", "new keys first"],
)  # fmt: skip
def test_a_near_miss_is_left_alone_with_the_reason(build, keeps, body, reason):
    model = _model(build, body)
    before = _ops(model)
    result = keeps(FuseGroupQueryAttention(), model, _FEEDS[:1])
    assert not result.modified
    assert reason in result.sites[0].reason
    assert _ops(model) == before


def test_a_model_without_an_attention_mask_input_is_left_alone(build, keeps):
    model = _model(build, _CAUSAL + _HEADS + _PLAIN_ROTATE + _ROTATED, {k: v for k, v in _ROLES.items() if v != "mask"})
    result = keeps(FuseGroupQueryAttention(), model, _FEEDS[:1])
    assert not result.modified
