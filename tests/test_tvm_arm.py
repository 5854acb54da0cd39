"""Libraries for arm64, in an emulator: they compute what those for this machine do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qc.backends.inputs import text_inputs
from qc.backends.target import Runner
from qc.backends.tvm.backend import ANDROID, TvmAndroid, TvmCpu
from qc.frontend import load
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

from test_tvm import ALLOWED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(tool) for tool in (ANDROID.cc["aarch64"], ANDROID.emulator[0])),
        reason=f"needs {ANDROID.package}",
    ),
]

ENCODER = "quantize-weights{format=int8,group=32,embedding=int8:g32}"
SENTENCE = np.array([[101, 7592, 2088, 102, 0, 0]])


def runners(model: Model, directory: Path, quantize: str, *, exact: bool) -> tuple[Runner, Runner]:
    """The quantized model here, and in the emulator."""
    quantized, _ = PassManager(parse_pipeline(quantize), verify=False).run(model.clone())
    made = []
    for backend in (TvmCpu(exact=exact), TvmAndroid(exact=exact)):
        lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(quantized.clone())
        place = directory / backend.name
        place.mkdir()
        backend.emit(Model.of(lowered), place)
        made.append(backend.open(place, threads=2))
    return made[0], made[1]


def test_a_decoder_says_the_same_on_arm(tmp_path: Path) -> None:
    steps = [Step(p, optional=True) for p in canonicalize_passes()]
    model, _ = PassManager(steps, verify=False).run(load("builtin:tiny-llama"))
    here, there = runners(model, tmp_path, "quantize-weights{format=uint4,group=32}", exact=True)
    inputs = text_inputs(here.signature, np.array([[3, 5, 7, 9, 11]]))
    found = there.run(inputs)
    for name, value in here.run(inputs).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    assert list(there.generate([3, 5, 7], 10)) == list(here.generate([3, 5, 7], 10))
    library = tmp_path / "tvm-android" / "libmodel.so"
    listed = subprocess.run(
        ["aarch64-linux-gnu-nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {line.split()[-1].partition("@")[0] for line in listed if line.split()[-2] == "U"} <= ALLOWED | {"getauxval"}
    assert library.stat().st_size <= 150_000


def test_an_encoder_computes_the_same_on_arm(encoder: Model, tmp_path: Path) -> None:
    here, there = runners(encoder, tmp_path, ENCODER, exact=True)
    inputs = text_inputs(here.signature, SENTENCE)
    found = there.run(inputs)
    for name, value in here.run(inputs).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


def test_rounded_activations_of_an_encoder_differ_on_arm_no_more_than_rounding_does(
    encoder: Model, tmp_path: Path
) -> None:
    """Sums in another order move a number across the border of two codes now and then, and later layers follow."""
    (tmp_path / "exact").mkdir()
    exact, _ = runners(encoder, tmp_path / "exact", ENCODER, exact=True)
    here, there = runners(encoder, tmp_path, ENCODER, exact=False)
    inputs = text_inputs(here.signature, SENTENCE)
    wanted, rounded, found = (runner.run(inputs) for runner in (exact, here, there))
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - rounded[name]) <= np.linalg.norm(rounded[name] - value)
