"""Models on an OpenCL device, against the verifying runtime."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qc.backends.target import backend_for, target_names
from qc.backends.tvm.gpu import products
from qc.backends.tvm.gpu.build import build_kernels
from qc.backends.tvm.gpu.caches import append
from qc.backends.tvm.gpu.images import pool
from qc.backends.tvm.gpu.kernels import attend, map_elements, normalize
from qc.backends.tvm.gpu.languages import LANGUAGES
from qc.backends.tvm.gpu.nvidia import ARCHITECTURES, COMPILER
from qc.backends.tvm.gpu.weights import Words
from qc.backends.tvm.kernels.attention import Heads
from qc.backends.tvm.kernels.caches import CELLS
from qc.backends.tvm.windows import Window
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.canonicalize.recurrent import RecogniseRecurrent

EM_CUDA = 190
"""The machine of an ELF file for NVIDIA's devices."""

Run = Callable[[Model, Path, dict[str, np.ndarray]], dict[str, np.ndarray]]


@pytest.mark.parametrize(
    "pipeline",
    [
        "quantize-weights{format=uint4,group=32}",
        "quantize-weights{format=int8,group=0}",
        "quantize-weights{format=uint2,group=16},quantize-activations{mode=static}",
        "quantize-weights{format=nf4:g32}",
        "quantize-weights{format=lut2+sparse0.45}",
    ],
)
def test_products_decode_weights_as_the_format_says(
    linear: Callable[[str], tuple[Model, np.ndarray]], on_device: Run, tmp_path: Path, pipeline: str
) -> None:
    """One row, and several: two kernels. The last format has no kernel, and is multiplied in float."""
    model, x = linear(pipeline)
    found = on_device(model, tmp_path, {"x": x})["y"]
    np.testing.assert_allclose(found, Session(model).run({"x": x})["y"], rtol=2e-5, atol=2e-5)
    runner = backend_for("tvm-opencl").open(tmp_path)
    for row in x:
        np.testing.assert_allclose(
            runner.run({"x": row[None]})["y"], Session(model).run({"x": row[None]})["y"], 2e-5, 2e-5
        )
    assert any("words" in p.name for p in (tmp_path / "kernels").iterdir()) == ("sparse" not in pipeline)


MANY = """
f (float[rows,n,6] x, int64[rows] index) => (float[a,b,c] y, float[d,e,g] z, int64[h] count, bool[o,p,q] less) {
  s = Softmax <axis = 1> (x)
  e = Erf (x)
  g = Gelu (e)
  m = ReduceMean <keepdims = 1> (x, last)
  v = ReduceMax <keepdims = 1> (x, last)
  c = Sub (g, m)
  w = Mul (c, s)
  a = Add (w, v)
  y = LayerNormalization <axis = -1> (a, gain)
  f = Transpose <perm = [2, 0, 1]> (y)
  k = Gather <axis = 1> (f, index)
  h = Sigmoid (k)
  i = Floor (k)
  less0 = Less (h, i)
  l = Where (less0, h, i)
  z = Clip (l, low, high)
  less = Not (less0)
  count = Add (index, index)
}
"""


@pytest.mark.slow
def test_operators_compute_what_the_standard_says(on_device: Run, tmp_path: Path) -> None:
    constants = {
        "last": np.array([-1]), "gain": np.linspace(1, 2, 6, dtype=np.float32),
        "low": np.array(-1, np.float32), "high": np.array(0.7, np.float32),
    }  # fmt: skip
    model = parse(MANY, weights=constants)
    rng = np.random.default_rng(0)
    inputs = {"x": 3 * rng.standard_normal((3, 5, 6), np.float32), "index": np.array([2, -1, 0])}
    found = on_device(model, tmp_path, inputs)
    for name, value in Session(model).run(inputs).items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5)
    with pytest.raises(Exception, match="outside of its table"):
        backend_for("tvm-opencl").open(tmp_path).run({**inputs, "index": np.array([0, 3, 0])})


def test_products_of_computed_values_broadcast(on_device: Run, tmp_path: Path) -> None:
    model = parse("f (float[a,1,m,k] x, float[h,k,n] z) => (float[a,h,m,n] y) { y = MatMul (x, z) }")
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 1, 5, 7), np.float32), "z": rng.standard_normal((3, 7, 40), np.float32)}
    found = on_device(model, tmp_path, inputs)["y"]
    np.testing.assert_allclose(found, inputs["x"] @ inputs["z"], rtol=1e-5, atol=1e-5)


def test_the_launch_table_names_everything_that_a_launch_needs(
    linear: Callable[[str], tuple[Model, np.ndarray]], on_device: Run, tmp_path: Path
) -> None:
    model, x = linear("quantize-weights{format=uint4,group=32}")
    on_device(model, tmp_path, {"x": x})
    table = json.loads((tmp_path / "launches.json").read_text())
    sizes = {"qc_div": lambda a, b: a // b, "qc_max": max, "qc_min": min}
    for launch in table["launches"]:
        kernel = table["kernels"][launch["kernel"]]
        source = (tmp_path / kernel["file"]).read_text()
        assert f"__kernel void {kernel['entry']}(" in source
        integers = {k: eval(v, sizes, {"d_rows": 3}) for k, v in launch["integers"].items()}
        assert len(launch["buffers"]) == len(kernel["buffers"])
        assert set(kernel["integers"]) <= set(integers)
        assert all(eval(g, sizes, integers) >= 1 for g in kernel["grid"])
        for place in launch["buffers"]:
            kind, _, number = place.partition(":")
            names = {"arena": "arena", "weight": "weights", "input": "inputs", "output": "outputs"}
            assert kind == "status" or int(number) < len(table[names[kind]])
    whens = [launch.get("when") for launch in table["launches"]]
    assert "d_rows != 1" in whens
    assert "d_rows == 1" in whens


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_every_language_has_the_kernels_of_a_decoder(language: str) -> None:
    words = Words(4, 32, None)
    kernels = {
        "rms": (normalize, ("rms", True, False)),
        "attend": (attend, (Heads(32, 32, 2, True, 0, False, 0.2),)),
        "codes": (attend, (Heads(32, 32, 2, True, 0, False, 0.2, cells=CELLS["uint4"]),)),
        "append": (append, (32, CELLS["float16"])),
        "row": (products.linear, (words, 384, 256, True, False, True, "none")),
        "rows": (products.linear, (words, 384, 256, False, True, False, "silu")),
    }
    for name, built in build_kernels(kernels, LANGUAGES[language]).items():
        assert built.entry in built.source
        assert set(built.parameters[: built.buffers]) == set(built.declared[: built.buffers_declared]), name


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_sources_hold_numbers_with_all_digits(language: str) -> None:
    number = float.fromhex("0x1.b6db6ep-4")
    kernels = {"scaled": (map_elements, (f"rintf({{a}} * {number.hex()}f)", ("float32",), "float32", 1))}
    source = build_kernels(kernels, LANGUAGES[language])["scaled"].source
    assert np.float32(number) in [np.float32(text) for text in re.findall(r"\d\.\d+e[+-]\d+", source)]
    rounding = {"cuda": "nearbyintf", "opencl": "rint", "metal": "rint", "webgpu": "round"}[language]
    assert re.search(rf"\b{rounding}\(", source)


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_no_number_of_a_source_is_beyond_the_largest_float(language: str) -> None:
    """WGSL refuses a decimal number that is larger, even if it rounds to the largest."""
    window = Window((1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (0, 1, 1))
    kernels = {"largest": (pool, ("largest", window)), "attend": (attend, (Heads(32, 32, 2, True, 0, False, 0.2),))}
    for name, built in build_kernels(kernels, LANGUAGES[language]).items():
        numbers = [float(text) for text in re.findall(r"\d\.\d+e[+-]\d+", built.source)]
        assert float(np.finfo(np.float32).max) >= max(numbers) > 1e37, name


def test_other_languages_run_as_opencl_where_their_device_is_missing(
    linear: Callable[[str], tuple[Model, np.ndarray]], on_device: Run, tmp_path: Path
) -> None:
    """Where it is there, a library for CUDA sums in another order."""
    model, x = linear("quantize-weights{format=uint4,group=32}")
    expected = on_device(model, tmp_path, {"x": x})["y"]
    for name in sorted(set(LANGUAGES) - {"opencl"}):
        backend, place = backend_for(f"tvm-{name}"), tmp_path / name
        place.mkdir()
        backend.emit(model, place)
        np.testing.assert_allclose(backend.open(place).run({"x": x})["y"], expected, rtol=2e-5, atol=2e-5)
        assert {p.suffix for p in (place / "kernels").iterdir()} == {f".{LANGUAGES[name].suffix}"}
        assert backend.coverage(model).off_target == 0


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")
def test_cuda_compiles_for_each_architecture(
    linear: Callable[[str], tuple[Model, np.ndarray]], on_device: Run, tmp_path: Path
) -> None:
    model, _ = linear("quantize-weights{format=uint4,group=32}")
    backend_for("tvm-cuda").emit(model, tmp_path)
    entries = [k["entry"] for k in json.loads((tmp_path / "launches.json").read_text())["kernels"].values()]
    for arch in ARCHITECTURES:
        code = (tmp_path / f"kernels.{arch}.cubin").read_bytes()
        assert code[:4] == b"\x7fELF"
        assert int.from_bytes(code[18:20], "little") == EM_CUDA
        assert all(f".text.{entry}".encode() in code for entry in entries)
    text = (tmp_path / "kernels.ptx").read_text()
    assert all(f".visible .entry {entry}(" in text for entry in entries)
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-c", "model.c", "-o", "model.o"]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_an_operator_without_a_kernel_is_named(tmp_path: Path) -> None:
    model = parse(
        "f (float[n,1,2] x) => (float[n,1,1,3] y) { y = RNN <hidden_size = 3> (x, w, r) }",
        weights={"w": np.ones((1, 3, 2), np.float32), "r": np.ones((1, 3, 3), np.float32)},
    )
    RecogniseRecurrent()(model)
    with pytest.raises(UnsupportedError, match=r"no kernel for .*RNN.*: a table of launches has no loop"):
        backend_for("tvm-opencl").emit(model, tmp_path)


def test_every_language_is_a_target() -> None:
    assert {f"tvm-{name}" for name in LANGUAGES} <= set(target_names())
