"""Caches on a device hold what the definition says, bit for bit, and attention reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.gpu.backend import TvmGpu
from qc.backends.tvm.gpu.languages import OPENCL
from qc.backends.tvm.kernels.caches import CELLS
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.text import parse

KV, SHARE, WIDTH, SCALE = 2, 2, 32, 0.2

DECODER = """
<ir_version: 10, opset_import: ["": 23, "qc": 1, "com.microsoft": 1]>
f (int64[b,s] ids, int64[b,t] mask, float[b,{kv},p,{width}] k, float[b,{kv},p,{width}] v)
  => (float[b,s,{out}] y, float[b,{kv},t,{width}] k1, float[b,{kv},t,{width}] v1) {{
  x = Gather (table, ids)
  n = ReduceSum <keepdims = 0> (mask, last)
  before = Sub (n, one)
  lengths = Cast <to = 6> (before)
  y, k1, v1 = com.microsoft.GroupQueryAttention
    <num_heads = {heads}, kv_num_heads = {kv}, scale = {scale}> (x, , , k, v, lengths, total)
}}
"""
ROLES = {"ids": "tokens", "mask": "mask", "k": "past_key.0", "v": "past_value.0"}
ROLES |= {"y": "logits", "k1": "present_key.0", "v1": "present_value.0"}


def decoder(table: np.ndarray) -> Model:
    """Attention on rows of a table: queries, keys and values of each token, ``[tokens, heads, channels]``."""
    (rows, _, width), heads = table.shape, KV * SHARE
    text = DECODER.format(kv=KV, width=width, heads=heads, out=heads * width, scale=SCALE)
    constants = {"last": np.array([1]), "one": np.array(1), "total": np.array(rows, np.int32)}
    return parse(text, weights={"table": table.reshape(rows, -1), **constants}, roles=ROLES)


@pytest.mark.parametrize("kv", [name for name, cells in CELLS.items() if cells.narrow])
def test_a_narrow_cache_holds_the_bits_of_its_definition(on_device, tmp_path: Path, kv: str) -> None:
    """Behind a part of the text: its codes go to the device again."""
    rows, past, cells, rng = 70, 66, CELLS[kv], np.random.default_rng(0)
    table = rng.standard_normal((rows, KV * (SHARE + 2), WIDTH)).astype(np.float32)
    table[:, KV * SHARE :] *= np.exp(rng.uniform(-20, 0, (rows, 2 * KV, 1)))  # numbers below the least normal one too
    table[0, KV * SHARE :] = 2.5
    table[1, KV * SHARE :] = 0
    table[2, -1, :2] = 1e6, -1e6
    heads = table.transpose(1, 0, 2)[None]
    q, k, v = (np.split(heads, [KV * SHARE, KV * SHARE + KV], 1)[i] for i in range(3))
    held = [cells.decode(cells.encode(x)) for x in (k, v)]
    inputs = {"ids": np.arange(past, rows)[None], "mask": np.ones((1, rows), np.int64)}
    inputs |= {"k": k[:, :, :past], "v": v[:, :, :past]}
    found = on_device(decoder(table), tmp_path, inputs, kv)
    for name, expected in zip(("k1", "v1"), held, strict=True):
        np.testing.assert_array_equal(found[name], expected)
    for i, place in enumerate(range(past, rows)):
        for head in range(KV * SHARE):
            seen = [x[0, head // SHARE, : place + 1].astype(np.float64) for x in held]
            powers = np.exp(SCALE * (seen[0] @ q[0, head, place]))
            expected = powers / powers.sum() @ seen[1]
            np.testing.assert_allclose(found["y"][0, i].reshape(-1, WIDTH)[head], expected, rtol=1e-4, atol=1e-4)


def test_heads_that_fill_no_words_are_refused(tmp_path: Path) -> None:
    model = decoder(np.zeros((3, KV * (SHARE + 2), 12), np.float32))
    with pytest.raises(
        UnsupportedError, match="its cache, of 12 channels, cannot be kept as uint4 in units of 4 bytes"
    ):
        TvmGpu(OPENCL, "uint4").emit(model, tmp_path)


def test_an_unknown_option_is_refused() -> None:
    for options in ("avx2", "kv=int5", "kv"):
        with pytest.raises(InputError, match=r"kv=\.\.\.|float16"):
            TvmGpu.parse(OPENCL, options)
