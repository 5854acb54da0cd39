"""A compile that was killed goes on where it was, to the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qc.cli import main

RECIPE = "quantize-weights{format=uint4,group=64,assign=gptq,sweeps=1}"


def command(out: Path, *options: str) -> list[str]:
    qc = Path(sys.executable).parent / "qc"
    return [str(qc), "compile", "builtin:tiny-llama", "-o", str(out), "--passes", RECIPE, *options]


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def finished_parts(parent: Path) -> int:
    """How many parts the journal of a killed compile knows."""
    found = [int(m[1]) for p in parent.glob(".out.work-*/journal/*.onnx") if (m := re.search(r"\.(\d+)\.onnx", p.name))]
    return max(found, default=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(out), check=True, capture_output=True, timeout=300)
    return out


@pytest.mark.slow
def test_a_killed_compile_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "out", random.Random(0)
    seen = [0]
    for _ in range(3):
        process = subprocess.Popen(
            command(out, "--resume"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert process.stderr is not None
        wanted = seen[-1] + 1
        while finished_parts(tmp_path) < wanted and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
        seen.append(finished_parts(tmp_path))
    assert seen == sorted(seen)
    assert seen[-1] > 0
    subprocess.run(command(out, "--resume"), check=True, capture_output=True, timeout=300)
    assert digests(out) == digests(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left behind"


@pytest.mark.slow
def test_a_journal_of_another_compile_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while finished_parts(tmp_path) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    for options, reason in (
        (["--seed", "1"], "its seed is 0, that of this compile 1"),
        (["--exclude", "down"], r"its list of exclusions is [], that of this compile ['down']"),
        (["--set", "quantize-weights.group=32"], "its recipe is"),
    ):
        arguments = [*command(out)[1:], *options, "--resume"]
        if options[0] == "--set":
            arguments[arguments.index(RECIPE)] = RECIPE.replace("64", "32")
            arguments = [a for a in arguments if a not in options]
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("Another text calibrates. " * 200)
    assert main([*command(out)[1:], "--resume", "--calib", str(text)]) == 2
    assert "its calibration data is" in capsys.readouterr().err
    assert finished_parts(tmp_path) >= 2, "a refusal leaves the journal"
    for path in tmp_path.glob(".out.*"):
        os.utime(path, (time.time() - 60,) * 2)
    assert main([*command(out)[1:], "--passes", "quantize-weights"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"], "without --resume it is forgotten"
