"""Convolutions and pooling on an OpenCL device, against the verifying runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qc.backends.target import backend_for
from qc.backends.tvm.backend import TvmCpu
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step
from qc.passes.quantize.weights import QuantizeWeights

Run = Callable[[Model, Path, dict[str, np.ndarray]], dict[str, np.ndarray]]

IMAGES = """
f (float[batch,3,high,wide] x) => (float[batch,9,h,w] y, float[batch,1,h2,w2] one) {
  first = Conv <strides = [2, 1], pads = [1, 0, 2, 3], dilations = [1, 2]> (x, w1, b1)
  active = Relu (first)
  grouped = Conv <group = 2, pads = [0, 1, 0, 1]> (active, w2)
  sum = Add (grouped, active)
  gated = HardSwish (sum)
  each = Conv <group = 16, strides = [1, 2], auto_pad = "VALID"> (gated, w3, b3)
  capped = Clip (each, low, high6)
  pooled = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], ceil_mode = 1> (capped)
  y = Conv (pooled, w4)
  same = Conv <auto_pad = "SAME_UPPER"> (pooled, w5)
  one = Sigmoid (same)
}
"""
SHAPES = {
    "w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 8, 1, 3), "w3": (32, 1, 2, 3), "b3": (32,), "w4": (9, 32, 1, 1),
    "w5": (1, 32, 2, 2),
}  # fmt: skip
POOLS = """
f (float[batch,4,9,8] x, float[batch,6,len] z)
  => (float[batch,4,h,w] a, float[batch,4,h2,w2] b, float[batch,4,1,1] c, float[batch,6,l2] d, float[batch,16,l3] e) {
  a = AveragePool <kernel_shape = [3, 3], strides = [2, 3], pads = [1, 2, 1, 0]> (x)
  b = AveragePool <kernel_shape = [2, 3], pads = [1, 0, 1, 2], strides = [2, 2], count_include_pad = 1, ceil_mode = 1>
    (x)
  c = GlobalAveragePool (x)
  d = MaxPool <kernel_shape = [3], strides = [2]> (z)
  e = Conv <pads = [2, 0], dilations = [2]> (z, w)
}
"""
RESIZED = [
    ("linear", "half_pixel", "floor", "more"),
    ("linear", "align_corners", "floor", "less"),
    ("nearest", "asymmetric", "floor", "less"),
    ("nearest", "pytorch_half_pixel", "ceil", "less"),
    ("nearest", "half_pixel", "round_prefer_ceil", "more"),
    ("nearest", "asymmetric", "round_prefer_floor", "more"),
]
SIZES = f"""
f (float[n,2,h,w] x, float[n,2,3,b] other, int64[n,k] i)
  => ({", ".join(f"float[n,2,a{i},b{i}] y{i}" for i in range(len(RESIZED)))}, float[n,2,3,b] y, int64[n] mean,
      int64[n] length) {{
  more = Constant <value = float[4] {{1.0, 1.0, 2.0, 1.4}}> ()
  less = Constant <value = float[4] {{1.0, 1.0, 0.6, 0.5}}> ()
  {
    " ".join(
        f'y{i} = Resize <mode = "{mode}", coordinate_transformation_mode = "{place}", nearest_mode = "{nearest}">'
        f" (x, , {scales})"
        for i, (mode, place, nearest, scales) in enumerate(RESIZED)
    )
}
  sizes = Shape (other)  y = Resize <mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel">
    (x, , , sizes)
  last = Constant <value = int64[1] {{1}}> ()  mean = ReduceMean <keepdims = 0> (i, last)
  length = ReduceL2 <keepdims = 0> (i, last)
}}
"""
"""Fractions of integers, too."""
SAMPLED = [
    ("linear", "zeros", 0),
    ("linear", "border", 1),
    ("linear", "reflection", 0),
    ("nearest", "zeros", 1),
    ("nearest", "reflection", 1),
]
PLACES = f"""
f (float[n,3,h,w] x, float[n,a,b,2] grid) => ({", ".join(f"float[n,3,a,b] y{i}" for i in range(len(SAMPLED)))}) {{{
    " ".join(
        f'y{i} = GridSample <mode = "{mode}", padding_mode = "{padding}", align_corners = {aligned}> (x, grid)'
        for i, (mode, padding, aligned) in enumerate(SAMPLED)
    )
}}}
"""
VOLUMES = """
f (float[batch,4,deep,high,wide] x)
  => (float[batch,6,d1,h1,w1] a, float[batch,4,d2,h2,w2] b, float[batch,6,d3,h3,w3] c, float[batch,4,d4,h4,w4] d,
      float[batch,4,d5,h5,w5] e, float[batch,4,d6,h6,w6] g, float[batch,4,1,1,1] h) {
  a = Conv <strides = [2, 1, 1], pads = [1, 0, 1, 0, 1, 2], dilations = [1, 2, 1]> (x, w1, b1)
  b = Conv <group = 4, auto_pad = "SAME_UPPER"> (x, w2)
  c = ConvTranspose <group = 2, strides = [2, 1, 3], pads = [0, 1, 0, 1, 0, 1], output_padding = [1, 0, 2],
    dilations = [1, 2, 1]> (x, w3, b3)
  d = MaxPool <kernel_shape = [2, 3, 2], strides = [1, 2, 2], pads = [1, 1, 0, 0, 1, 1], ceil_mode = 1> (x)
  e = AveragePool <kernel_shape = [3, 2, 2], strides = [2, 1, 2], pads = [1, 1, 0, 1, 0, 1]> (x)
  g = AveragePool <kernel_shape = [2, 2, 2], pads = [0, 1, 1, 1, 0, 1], count_include_pad = 1> (x)
  h = GlobalAveragePool (x)
}
"""
VOLUME_SHAPES = {"w1": (6, 4, 2, 2, 3), "b1": (6,), "w2": (4, 1, 2, 3, 1), "w3": (4, 3, 2, 2, 2), "b3": (6,)}


def constants(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {n: rng.standard_normal(s, np.float32) / 4 for n, s in shapes.items()}


def agree(model: Model, on_device: Run, directory: Path, batches: Sequence[dict[str, np.ndarray]]) -> None:
    """On a processor and on a device, with one library each."""
    (directory / "here").mkdir()
    TvmCpu(level="x86-64").emit(model, directory / "here")
    on_device(model, directory, batches[0])
    runners = TvmCpu(level="x86-64").open(directory / "here"), backend_for("tvm-opencl").open(directory)
    for batch in batches:
        for name, value in Session(model).run(batch).items():
            for runner in runners:
                found = runner.run(batch)[name]
                assert (found.shape, found.dtype) == (value.shape, value.dtype)
                np.testing.assert_allclose(found, value, rtol=2e-5, atol=1e-5, err_msg=name)


def test_a_network_of_convolutions_computes_what_the_standard_says(on_device: Run, tmp_path: Path) -> None:
    """Two images of one size, and then one of another, with the same library; two weights are quantized."""
    model = parse(IMAGES, weights={**constants(SHAPES), "low": np.float32(0), "high6": np.float32(6)})
    quantize = QuantizeWeights(convolution="int8", exclude=("w[145]",))
    model = Model.of(PassManager([Step(quantize)], verify=False).run(model)[0])
    rng, reference, runner = np.random.default_rng(0), Session(model), None
    for shape in ((2, 3, 13, 11), (1, 3, 8, 20)):
        x = rng.standard_normal(shape, np.float32)
        found = on_device(model, tmp_path, {"x": x}) if runner is None else runner.run({"x": x})
        runner = backend_for("tvm-opencl").open(tmp_path)
        for name, value in reference.run({"x": x}).items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5)
    coded = {p.name.split("_")[1] for p in (tmp_path / "kernels").iterdir() if "scale_ptr" in p.read_text()}
    assert coded == {"conv"}


def test_pooling_and_signals_of_one_axis(on_device: Run, tmp_path: Path) -> None:
    rng, model = np.random.default_rng(0), parse(POOLS, weights=constants({"w": (16, 6, 3)}))
    x, z = (rng.standard_normal(shape, np.float32) for shape in ((2, 4, 9, 8), (2, 6, 15)))
    agree(model, on_device, tmp_path, [{"x": x, "z": z}])


def test_windows_move_over_three_axes(on_device: Run, tmp_path: Path) -> None:
    rng, model = np.random.default_rng(0), parse(VOLUMES, weights=constants(VOLUME_SHAPES))
    shapes = ((2, 4, 5, 4, 6), (1, 4, 3, 3, 2))
    agree(model, on_device, tmp_path, [{"x": rng.standard_normal(s, np.float32)} for s in shapes])


def test_images_in_other_sizes_and_fractions_of_integers(on_device: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [
        {
            "x": rng.standard_normal((n, 2, h, w), np.float32), "other": np.zeros((n, 2, 3, b), np.float32),
            "i": rng.integers(-99, 99, (n, 6)),
        }
        for n, h, w, b in ((1, 5, 7, 1), (2, 2, 3, 4))
    ]  # fmt: skip
    batches[0]["i"][0] = [46340, -9, 2, 0, 0, 0]
    agree(parse(SIZES), on_device, tmp_path, batches)


def test_images_at_the_places_of_a_grid(on_device: Run, tmp_path: Path) -> None:
    """Also far beyond, and where images are mirrored several times."""
    rng, batches = np.random.default_rng(0), []
    for n, h, w, a, b in ((2, 4, 5, 3, 14), (1, 2, 7, 0, 2)):
        grid = rng.uniform(-4, 4, (n, a, b, 2)).astype(np.float32)
        batches.append({"x": rng.standard_normal((n, 3, h, w), np.float32), "grid": grid})
    batches[0]["grid"][0, 0, :4] = [[-1, 1], [0, 0], [9, 0], [-1, -9]]
    agree(parse(PLACES), on_device, tmp_path, batches)
