"""Elements and slices that others replace or change, on an OpenCL device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qc.backends.target import backend_for
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse

SCATTERED = """
f (float[n,3,k] x, int32[m,2,k] i, float[m,2,k] u, int64[n] w, int64[q] l, int64[q] v, int64[p,2] j, float[p,k] s)
  => (float[n,3,k] y, float[n,3,k] low, int64[n] count, float[n,3,k] most) {
  y = ScatterElements <axis = 1> (x, i, u)
  low = ScatterElements <axis = 1, reduction = "min"> (x, i, u)
  count = ScatterElements <reduction = "add"> (w, l, v)
  most = ScatterND <reduction = "max"> (x, j, s)
}
"""


def test_elements_take_others_in_where_indices_say(
    on_device: Callable[[Model, Path, dict[str, np.ndarray]], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    model, rng = parse(SCATTERED), np.random.default_rng(0)
    inputs = {n: rng.standard_normal(s, np.float32) for n, s in (("x", (4, 3, 5)), ("u", (2, 2, 5)), ("s", (3, 5)))}
    inputs["i"] = np.stack([np.zeros((2, 5)), np.full((2, 5), -1)], 1).astype(np.int32)
    inputs |= {"w": np.arange(4), "l": np.array([1, -3, 0, 3, 1]), "v": np.arange(5)}
    inputs["j"] = np.array([[3, -1], [-4, 0], [3, 2]])
    found = on_device(model, tmp_path, inputs)
    for name, value in Session(model).run(inputs).items():
        np.testing.assert_array_equal(found[name], value, name)
    runner = backend_for("tvm-opencl").open(tmp_path)
    for name, index in (("l", [4] * 5), ("j", [[0, 3]] * 3)):
        with pytest.raises(InputError, match="outside of its table"):
            runner.run({**inputs, name: np.array(index)})
