"""Whole models on an OpenCL device: they compute what a processor does with the same weights."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qc.backends.inputs import text_inputs
from qc.backends.target import Runner
from qc.backends.tvm.backend import TvmCpu
from qc.backends.tvm.gpu.backend import TvmGpu
from qc.backends.tvm.gpu.languages import OPENCL
from qc.frontend import load
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

pytestmark = pytest.mark.slow

INT4 = "quantize-weights{format=uint4,group=32}"
PROMPT = [3, 17, 200, 5, 1000]


def emitted(backend: TvmCpu | TvmGpu, model: Model, directory: Path) -> Runner:
    """The model, compiled into the directory and loaded."""
    lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(model.clone())
    directory.mkdir(exist_ok=True)
    try:
        backend.emit(Model.of(lowered), directory)
        return backend.open(directory, threads=1)
    except UnsupportedError as error:
        pytest.skip(str(error))


def agree(ours: Runner, theirs: Runner, inputs: dict[str, np.ndarray]) -> None:
    found = ours.run(inputs)
    for name, value in theirs.run(inputs).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)


def test_a_decoder_says_the_same_on_a_device(tmp_path: Path, root: Path) -> None:
    steps = [Step(p, optional=True) for p in canonicalize_passes()]
    model, _ = PassManager(steps, verify=False).run(load("builtin:tiny-llama"))
    quantized, _ = PassManager(parse_pipeline(INT4), verify=False).run(model)
    here = emitted(TvmCpu(exact=True), quantized, tmp_path / "here")
    device = emitted(TvmGpu(OPENCL), quantized, tmp_path / "device")
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
    quantized, _ = PassManager(parse_pipeline(INT4), verify=False).run(encoder)
    device = emitted(TvmGpu(OPENCL), quantized, tmp_path)
    inputs = text_inputs(device.signature, np.array([[101, 7592, 2088, 102, 0, 0]]))
    found = device.run(inputs)
    for name, value in Session(Model.of(quantized)).run(inputs).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-c", "model.c", "-o", "model.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
