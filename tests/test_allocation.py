"""Allocated bits through the whole product."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

pytest.importorskip("scipy", reason="the solver comes with the allocate extra")


@pytest.mark.slow
def test_an_average_of_four_bits_is_kept_and_reported(qc: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = qc("compile", "builtin:tiny-llama", "-o", "out", "--recipe", "mixed-4", "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["report"]
    weights = [s for s in report["sites"] if s["pass"] == "quantize-weights" and s["outcome"] == "changed"]
    planned = {s["site"]: s["format"] for s in report["sites"] if s["pass"] == "allocate"}
    assert {s["site"]: s["format"] for s in weights} == planned
    assert len(set(planned.values())) > 1
    bits = 8 * sum(s["bytes_after"] for s in weights) / sum(s["elements"] for s in weights)
    assert 3.9 < bits <= 4.0
    assert report["accuracy"]["kl"] < 0.0125, (
        "uint4 in groups of 128 has 0.0091 in 4.18 bits, int4 per channel 0.0233 in 4.06"
    )
