"""Elements in order, running sums and elements by index, on an OpenCL device and a processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from qc.backends.tvm.backend import TvmCpu
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse

ORDER = """
f (float[rows,n] x, int64[rows,m] ids, int64[rows,2] index)
  => (float[a,k] y, int64[a,k] places, float[b,n] sorted, int64[b,n] order, int64[c,1] first, int64[m] last,
      int64[rows,m] sums, float[rows,n] down, float[rows,2] found) {
  y, places = TopK (x, five)
  sorted, order = TopK <largest = 0> (x, all)
  first = ArgMax <axis = 1> (x)
  last = ArgMax <axis = 0, keepdims = 0> (ids)
  sums = CumSum (ids, one)
  down = CumSum (x, zero)
  turned = Transpose (x)
  behind = Transpose (index)
  gathered = GatherElements <axis = 0> (turned, behind)
  found = Transpose (gathered)
}
"""


def test_elements_in_order_are_those_of_the_standard(
    on_device: Callable[[Model, Path, dict[str, np.ndarray]], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """With equals, infinite numbers, and rows longer than a block."""
    counts = {"five": np.array([5]), "all": np.array([100]), "one": np.int64(1), "zero": np.int64(0)}
    model, rng = parse(ORDER, weights=counts), np.random.default_rng(0)
    x = np.round(4 * rng.standard_normal((3, 100), np.float32)) / 4
    x[0, 7], x[1, ::2], x[1, 20] = np.inf, -np.inf, np.inf
    inputs = {"x": x, "ids": rng.integers(-9, 9, (3, 40)), "index": np.array([[3, -1], [99, 0], [-100, 5]])}
    here = tmp_path / "here"
    here.mkdir()
    TvmCpu(level="x86-64").emit(model, here)
    for found in (on_device(model, tmp_path, inputs), TvmCpu(level="x86-64").open(here, threads=1).run(inputs)):
        for name, value in Session(model).run(inputs).items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value, name)
