"""Whole models on an OpenCL device: they compute what a processor does with the same weights."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from qc.backends.inputs import text_inputs
from qc.backends.target import Runner
from qc.backends.tvm.backend import TvmCpu
from qc.backends.tvm.gpu.backend import TvmGpu
from qc.backends.tvm.gpu.languages import OPENCL, WEBGPU
from qc.backends.tvm.toolchain import require_header
from qc.frontend import load
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

pytestmark = pytest.mark.slow

INT4 = "quantize-weights{format=uint4,group=32}"
PROMPT = [3, 17, 200, 5, 1000]


def emitted(backend: TvmCpu | TvmGpu, model: Model, directory: Path) -> None:
    """Compiles the model into the directory."""
    try:
        require_header("cc", OPENCL.header, OPENCL.package)
    except UnsupportedError as error:
        pytest.skip(str(error))
    lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(model.clone())
    directory.mkdir(parents=True, exist_ok=True)
    backend.emit(Model.of(lowered), directory)


def opened(backend: TvmCpu | TvmGpu, model: Model, directory: Path) -> Runner:
    """The model, compiled into the directory and loaded."""
    emitted(backend, model, directory)
    try:
        return backend.open(directory, threads=1)
    except UnsupportedError as error:
        pytest.skip(str(error))


def agree(ours: Runner, theirs: Runner, inputs: dict[str, np.ndarray]) -> None:
    found = ours.run(inputs)
    for name, value in theirs.run(inputs).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def decoder() -> Model:
    """tiny-llama in 4 bits."""
    steps = [Step(p, optional=True) for p in canonicalize_passes()]
    model, _ = PassManager([*steps, *parse_pipeline(INT4)], verify=False).run(load("builtin:tiny-llama"))
    return Model.of(model)


@pytest.mark.parametrize("kv", ["float32", "uint4"])
def test_a_decoder_says_the_same_on_a_device(decoder: Model, tmp_path: Path, root: Path, kv: str) -> None:
    here = opened(TvmCpu(exact=True, kv=kv), decoder, tmp_path / "here")
    device = opened(TvmGpu(OPENCL, kv), decoder, tmp_path / "device")
    agree(device, here, text_inputs(here.signature, np.array([PROMPT])))
    cached = text_inputs(here.signature, np.array([[9]]), past=len(PROMPT))
    first = here.run(text_inputs(here.signature, np.array([PROMPT])))
    for past, present in here.signature.caches:
        cached[past.name] = first[present.name]
    agree(device, here, cached)
    expected = list(here.generate(PROMPT, 8))
    assert list(device.generate(PROMPT, 8)) == expected
    with pytest.raises(InputError, match="outside of its table"):
        list(device.generate([4096], 1))
    # The C program of the documentation, with the library for the device.
    text = re.findall(r"^```c\n(.*?)^```", (root / "docs/tvm.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "example.c").write_text(text)
    place = tmp_path / "device"
    command = ["cc", "-Wall", "-Wextra", "-Werror", "-I", place, tmp_path / "example.c", place / "libmodel.a"]
    subprocess.run([*command, "-lOpenCL", "-lm", "-o", tmp_path / "example"], check=True)
    done = subprocess.run([tmp_path / "example", place / "model.weights"], capture_output=True, text=True, check=True)
    assert list(map(int, done.stdout.split())) == expected


def test_an_encoder_computes_the_same_on_a_device(encoder: Model, tmp_path: Path) -> None:
    quantized, _ = PassManager(parse_pipeline(INT4), verify=False).run(encoder.clone())
    device = opened(TvmGpu(OPENCL), quantized, tmp_path)
    inputs = text_inputs(device.signature, np.array([[101, 7592, 2088, 102, 0, 0]]))
    found = device.run(inputs)
    for name, value in Session(Model.of(quantized)).run(inputs).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-c", "model.c", "-o", "model.o"]
    subprocess.run(command, cwd=tmp_path, check=True)


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves artifacts, what is to be run, and takes the answer."""

    extensions_map: ClassVar = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def __init__(self, *arguments: object, page: Path, runs: Sequence[object], answers: list, directory: Path) -> None:
        self.page, self.runs, self.answers = page, runs, answers
        super().__init__(*arguments, directory=str(directory))  # type: ignore[arg-type]

    def do_GET(self) -> None:
        held = {"/page.html": self.page.read_bytes, "/runs": lambda: json.dumps(self.runs).encode()}.get(self.path)
        if held is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path.endswith("html") else "application/json")
        self.end_headers()
        self.wfile.write(held())

    def do_POST(self) -> None:
        self.answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def in_browser(directory: Path, page: Path, runs: Sequence[object], work: Path) -> list[dict[str, list[float]]]:
    """What a page computes with the modules of artifacts, on the software adapter of Chromium."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium, which .ci/tools installs")
    answers: list[dict] = []
    handler = functools.partial(_Server, page=page, runs=runs, answers=answers, directory=directory)
    adapter = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--use-vulkan=swiftshader"]
    command = [chromium, "--headless=new", "--no-sandbox", *adapter, "--enable-features=Vulkan"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        browser = subprocess.Popen([*command, f"--user-data-dir={work}", address], **quiet)  # type: ignore[call-overload]
        try:
            for _ in range(1200):
                if answers:
                    break
                threading.Event().wait(0.1)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    assert answers, "the page did not answer"
    if "no WebGPU device" in answers[0].get("error", ""):
        pytest.skip("this Chromium has no software adapter")
    assert "error" not in answers[0], answers[0]
    return answers[0]["outputs"]


def test_a_decoder_says_the_same_in_a_browser(decoder: Model, tmp_path: Path, root: Path) -> None:
    """A prompt, and a token behind it. What is computed on narrow caches is what the library for OpenCL does."""
    runs, expected = [], []
    for kv in ("float32", "uint4"):
        backend, place = TvmGpu(WEBGPU, kv), tmp_path / "artifacts" / kv
        emitted(backend, decoder, place)
        here = Session(decoder) if kv == "float32" else backend.open(place)
        for past, new in ((0, PROMPT), (len(PROMPT), [9])):
            dimensions = {"batch": 1, "past": past, "seq": len(new), "total": past + len(new)}
            inputs = {"input_ids": new, "attention_mask": [1] * (past + len(new))}
            runs.append({"artifact": kv, "dimensions": dimensions, "inputs": inputs})
            tokens = np.array([[*PROMPT[:past], *new]])
            expected.append(here.run(text_inputs(decoder.signature, tokens))["logits"][:, past:])
    found = in_browser(tmp_path / "artifacts", root / "tests/web/gpu.html", runs, tmp_path / "browser")
    for outputs, logits in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.reshape(outputs["logits"], logits.shape), logits, rtol=1e-4, atol=1e-3)


IMAGES = """
f (float[batch,3,high,wide] x) => (float[batch,5] y, int64[batch,3] best) {
  first = Conv <strides = [2, 1], pads = [1, 0, 2, 3]> (x, w1, b1)
  active = Relu (first)
  each = Conv <group = 20, dilations = [1, 2], pads = [1, 2, 1, 2]> (active, w2)
  sum = Add (each, active)
  pooled = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (sum)
  wider = ConvTranspose <strides = [2, 3], pads = [1, 0, 0, 1]> (pooled, w4)
  resized = Resize <mode = "linear"> (wider, , scales)
  codes, scale, zero = DynamicQuantizeLinear (resized)
  rounded = DequantizeLinear (codes, scale, zero)
  all = Conv (rounded, w3)
  mean = GlobalAveragePool (all)
  y = Flatten (mean)
  values, best = TopK (y, count)
}
"""


def test_a_network_of_convolutions_computes_the_same_in_a_browser(tmp_path: Path, root: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w1": (20, 3, 3, 3), "b1": (20,), "w2": (20, 1, 3, 3), "w3": (5, 20, 1, 1), "w4": (20, 20, 3, 2)}
    weights = {n: rng.standard_normal(s, np.float32) / 4 for n, s in shapes.items()}
    weights |= {"count": np.array([3]), "scales": np.array([1, 1, 1.5, 0.6], np.float32)}
    model = parse(IMAGES, weights=weights)
    model, _ = PassManager(parse_pipeline("quantize-weights{convolution=int8}"), verify=False).run(model)
    emitted(TvmGpu(WEBGPU), model, tmp_path / "artifacts/images")
    x = rng.standard_normal((2, 3, 13, 11), np.float32)
    sizes = {"batch": 2, "high": 13, "wide": 11}
    runs = [{"artifact": "images", "dimensions": sizes, "inputs": {"x": x.ravel().tolist()}}]
    found = in_browser(tmp_path / "artifacts", root / "tests/web/gpu.html", runs, tmp_path / "browser")
    for name, value in Session(Model.of(model)).run({"x": x}).items():
        np.testing.assert_allclose(np.array(found[0][name]).reshape(value.shape), value, rtol=1e-4, atol=1e-4)
