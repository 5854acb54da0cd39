"""The memory of a compile is that of its largest weight, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="Hugging Face import needs torch")
pytest.importorskip("transformers", reason="Hugging Face import needs transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory of processes is read from /proc"),
]

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory.py"
MIB = 1 << 20
BASE = 150 * MIB
"""Interpreter, numpy, ONNX Runtime and the graph."""


def test_memory_stays_that_of_the_largest_weight(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--shape", "150M-wide", "--sparse", "--work", str(tmp_path), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    largest, all_weights = 4 * 1280 * (3328 + 3328), 4 * 146.8e6  # as if gate and up were packed into one
    bound = BASE + 3 * largest
    assert bound < all_weights / 2, "the test must tell one weight from all of them"
    stages = found["stages"]
    for stage in ("canonicalize", "recipe", "lower", "write"):
        assert stages[stage] <= bound, f"{stage}: {stages[stage] // MIB} MiB, expected at most {bound // MIB}"
    # The runtime repacks the weights of the artifact that it measures.
    assert stages["measure"] < bound + 1.25 * found["artifact_bytes"]
    assert 0.75 * found["estimated_memory_bytes"] <= found["anonymous_bytes"] <= found["estimated_memory_bytes"]
    assert found["estimated_artifact_bytes"] == pytest.approx(found["artifact_bytes"], rel=0.25)
