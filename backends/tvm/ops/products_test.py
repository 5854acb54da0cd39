"""A linear layer on float activations: every format of weights yields what its definition does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.backend import TvmCpu
from qc.ir.runtime import Session

pytest.importorskip("tvm", reason="kernels are compiled by TVM")


@pytest.mark.parametrize(
    "format", ["mxfp4", "nvfp4", "ternary:g64", "bitmod3:g32", "mid4:g32", "int8:tensor", "nf4:g32"]
)
def test_a_format_is_multiplied_as_it_is_defined(linear, format: str, tmp_path: Path) -> None:
    (model, x), backend = linear(f"quantize-weights{{format={format}}}"), TvmCpu(exact=True)
    backend.emit(model, tmp_path)
    found = backend.open(tmp_path, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(found, Session(model).run({"x": x})["y"], rtol=2e-5, atol=2e-5)
    off = [node["reason"] for node in backend.coverage(model).nodes if not node["on_target"]]
    assert bool(off) == (format == "nf4:g32"), "its values are no integers: stored in float"
