"""A large artifact is measured a part at a time: the same kernels, the same numbers, less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qc
from qc.backends.inputs import text_inputs
from qc.backends.target import backend_for


@pytest.mark.slow
def test_an_artifact_that_is_measured_in_parts_is_the_same_to_the_byte(tmp_path: Path, monkeypatch) -> None:
    whole = qc.compile("builtin:tiny-llama", tmp_path / "whole", recipe="w4")
    assert whole.speed
    monkeypatch.setattr("qc.plan._WHOLE", 0)
    parts = qc.compile("builtin:tiny-llama", tmp_path / "parts", recipe="w4")
    assert parts.plan.in_parts
    assert not whole.plan.in_parts
    assert not parts.speed
    for file in sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file

    backend = backend_for("ort-cpu")
    runner, at_once = backend.open_in_parts(tmp_path / "parts", tmp_path), backend.open(tmp_path / "whole")
    assert runner.parts > 6, "a part for each of its blocks"
    inputs = text_inputs(runner.signature, np.array([[5, 6, 7]]))
    expected = at_once.run(inputs)
    for name, array in runner.run(inputs).items():
        assert (array == expected[name]).all(), name
    assert list(runner.generate([5, 6, 7], 3)) == list(at_once.generate([5, 6, 7], 3))
