from __future__ import annotations

import numpy as np

from qc.passes.fuse.attention import MergeHeads

_RNG = np.random.default_rng(0)
_SIZES = {"s4": np.array([0, 0, 4, 8]), "s2": np.array([0, 0, 2, 8]), "s": np.array([0, 0, 32])}
_HEAD = (
    "f (float[b,n,32] q, float[b,n,{kv}] k, float[b,n,{kv}] v, bool[b,1,n,n] m, "
    "int64[4] s4, int64[4] s2, int64[3] s) => "
)
_BODY = """
 q4 = Reshape(q, s4)
 k4 = Reshape(k, {split})
 v4 = Reshape(v, {split})
 qt = Transpose <perm = [0, 2, 1, 3]> (q4)
 kt = Transpose <perm = [0, 2, 1, 3]> (k4)
 vt = Transpose <perm = [0, 2, 1, 3]> (v4)
 o = Attention <scale = 0.3> (qt, kt, vt, m)
 ot = Transpose <perm = [0, 2, 1, 3]> (o)
"""


def _feed(kv: int = 32) -> dict[str, np.ndarray]:
    arrays = {n: _RNG.standard_normal((2, 5, 32 if n == "q" else kv), np.float32) for n in "qkv"}
    mask = np.ones((2, 1, 5, 5), bool)
    mask[1, ..., 3:] = False
    return arrays | {"m": mask}


def _text(outputs: str, tail: str, kv: int = 32) -> str:
    split = "s4" if kv == 32 else "s2"
    return _HEAD.format(kv=kv) + outputs + " {" + _BODY.format(split=split) + tail + "}"


def test_attention_reads_the_projections_as_they_are(build, keeps):
    model = build(_text("(float[b,n,32] y)", "t = Reshape(ot, s)\n y = Neg(t)"), **_SIZES)
    keeps(MergeHeads(), model, [_feed()])
    assert [n.op_type for n in model.graph] == ["Attention", "Neg"]


def test_fewer_key_heads_are_kept(build, keeps):
    model = build(_text("(float[b,n,32] y)", "t = Reshape(ot, s)\n y = Neg(t)", kv=16), **_SIZES)
    keeps(MergeHeads(), model, [_feed(16)])
    node = model.graph.node(0)
    assert (node.attributes["q_num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()) == (4, 2)


def test_heads_that_are_a_graph_output_are_split_again(build, keeps):
    model = build(_text("(float[b,n,4,8] ot)", ""), **_SIZES)
    keeps(MergeHeads(), model, [_feed()])
    assert [n.op_type for n in model.graph] == ["Attention", "Reshape"]


def test_a_merge_that_is_a_graph_output_keeps_its_name(build, keeps):
    model = build(_text("(float[b,n,32] y)", "y = Reshape(ot, s)"), **_SIZES)
    keeps(MergeHeads(), model, [_feed()])
    assert [n.op_type for n in model.graph] == ["Attention", "Reshape", "Reshape"]


def test_attention_on_normalised_heads_stays_and_says_why(build, keeps):
    body = _BODY.format(split="s4").replace("(qt, kt", "(qn, kt").replace(" o = ", " qn = Relu(qt)\n o = ")
    model = build(_HEAD.format(kv=32) + "(float[b,n,4,8] ot) {" + body + "}", **_SIZES)
    result = keeps(MergeHeads(), model, [_feed()])
    assert not result.modified
    assert "transposed projections" in result.sites[0].reason


def test_attention_whose_heads_are_read_apart_stays(build, keeps):
    model = build(_text("(float[b,4,n,8] o, float[b,n,4,8] ot)", ""), **_SIZES)
    assert not keeps(MergeHeads(), model, [_feed()]).modified
