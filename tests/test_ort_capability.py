"""Every row of the table of attribute limits, proven on the installed runtime with models of one node.

A slow path cannot be shown by a clock in a test, but it shows in the numbers: the fast kernels of accuracy level 4
round activations to int8, which leaves an error of some thousandths; the slow paths ignore the level and are exact.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qc.backends.ort.capability import LIMITS, MATMUL_BLOCKS, limit_of, matmul_limit
from qc.backends.ort.packing import pack_codes

ort = pytest.importorskip("onnxruntime")

K, N = 512, 24
_X = np.random.default_rng(0).standard_normal((3, K), np.float32)


def _run(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> np.ndarray:
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, {"x": _X})[0]


def _error(bits: int, block: int, level: int, *, zero_points: str = "", g_idx: bool = False) -> float:
    """Largest error of ``MatMulNBits`` relative to the largest exact result."""
    rng = np.random.default_rng(1)
    groups = K // block
    codes = rng.integers(0, 1 << bits, (N, K)).astype(np.uint8)
    scales = (rng.random((N, groups), np.float32) + 0.5) / 100
    zeros = np.full((N, groups), 1 << (bits - 1), np.float32)
    constants = {"b": pack_codes(codes, bits).reshape(N, groups, -1), "s": scales}
    inputs = ["x", "b", "s"]
    if zero_points:
        zeros = rng.integers(0, 1 << bits, (N, groups)).astype(np.float32)
        constants["z"] = zeros if zero_points == "float" else pack_codes(zeros.astype(np.uint8), bits)
    if zero_points or g_idx:
        inputs.append("z" if zero_points else "")
    if g_idx:
        constants["g"] = (np.arange(K) // block).astype(np.int32)
        inputs.append("g")
    attributes = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes)
    weight = ((codes.reshape(N, groups, block) - zeros[..., None]) * scales[..., None]).reshape(N, K)
    exact = _X.astype(np.float64) @ weight.T.astype(np.float64)
    return float(np.abs(_run(node, constants) - exact).max() / np.abs(exact).max())


_ALL = [(bits, block) for bits in (2, 4, 8) for block in MATMUL_BLOCKS]
_FAST = [pair for pair in _ALL if matmul_limit(*pair, 4) is None]
_SLOW = [pair for pair in _ALL if matmul_limit(*pair, 4) is not None]


@pytest.mark.parametrize(("bits", "block"), _FAST)
@pytest.mark.parametrize("zero_points", ["", "integer"])
def test_formats_without_a_limit_run_on_the_int8_kernel(bits, block, zero_points):
    assert 1e-4 < _error(bits, block, 4, zero_points=zero_points) < 3e-2


@pytest.mark.parametrize(("bits", "block"), _SLOW)
def test_formats_with_a_block_limit_ignore_the_accuracy_level(bits, block):
    assert _error(bits, block, 4) < 1e-5


@pytest.mark.parametrize(("bits", "block"), _ALL)
def test_float_activations_are_exact_for_every_format(bits, block):
    assert _error(bits, block, 0) < 1e-5


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_other_widths_have_no_kernel(bits):
    assert not limit_of("com.microsoft::MatMulNBits", {"bits": bits}).runs
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft",
        K=K, N=N, bits=bits, block_size=32, accuracy_level=4,
    )  # fmt: skip
    constants = {"b": np.zeros((N, K // 32, 4 * bits), np.uint8), "s": np.ones((N, K // 32), np.float32)}
    with pytest.raises(Exception, match="bits"):
        _run(node, constants)


@pytest.mark.parametrize("bits", [2, 4])
def test_float_zero_points_ignore_the_accuracy_level(bits):
    assert (
        limit_of("com.microsoft::MatMulNBits", {"bits": bits, "accuracy_level": 4, "zero_points": "float"}) is not None
    )
    assert _error(bits, 32, 4, zero_points="float") < 1e-5


def test_a_group_index_ignores_the_accuracy_level():
    assert limit_of("com.microsoft::MatMulNBits", {"bits": 4, "accuracy_level": 4, "g_idx": True}) is not None
    assert _error(4, 32, 4, g_idx=True) < 1e-5


def test_float_tables_have_a_kernel_that_decodes():
    assert limit_of("com.microsoft::MatMulBnb4", {}).runs
    codes = np.random.default_rng(2).integers(0, 256, K * N // 2).astype(np.uint8)
    node = helper.make_node(
        "MatMulBnb4", ["x", "b", "s"], ["y"], domain="com.microsoft", K=K, N=N, block_size=64, quant_type=1
    )
    result = _run(node, {"b": codes, "s": np.ones(K * N // 64, np.float32)})
    assert np.abs(result).max() > 1, "float activations times a table with values up to 1"


def test_every_limit_names_its_way_out():
    for limit in LIMITS:
        assert "choose" in limit.reason or "permute" in limit.reason, limit
