"""A compile that was killed goes on where it was, to the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qc.backends.workspace import sweep
from qc.cli import main

RECIPE = "quantize-weights{format=uint4,group=64,assign=gptq,sweeps=1}"


KILLS = 10


def command(out: Path, *options: str) -> list[str]:
    qc = Path(sys.executable).parent / "qc"
    return [str(qc), "compile", "builtin:tiny-llama", "-o", str(out), "--passes", RECIPE, *options]


def compile_small(source: Path, out: Path) -> subprocess.Popen[bytes]:
    qc = Path(sys.executable).parent / "qc"
    arguments = [str(qc), "compile", str(source), "-o", str(out), "--recipe", "gptq-w4", "--resume"]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def finished_parts(parent: Path) -> int:
    """How many parts the journal of a killed compile knows."""
    found = [int(m[1]) for p in parent.glob(".out.work-*/journal/*.onnx") if (m := re.search(r"\.(\d+)\.onnx", p.name))]
    return max(found, default=0)


@pytest.mark.slow
def test_ten_kills_at_random_moments_do_not_change_a_byte(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the small model is made by transformers")
    from architectures import canonical

    canonical("llama", models).save(tmp_path / "model")
    started = time.monotonic()
    whole = compile_small(tmp_path / "model", tmp_path / "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors.decode()
    duration, expected = time.monotonic() - started, digests(tmp_path / "whole")
    out, moments, killed, seen = tmp_path / "out", random.Random(0), 0, [0]
    while killed < KILLS:
        process = compile_small(tmp_path / "model", out)
        try:
            process.wait(moments.uniform(0.4, 1) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        killed += process.returncode != 0
        seen.append(finished_parts(tmp_path))
        if out.exists():  # complete, or not at all; a kill may come after that
            assert digests(out) == expected
            shutil.rmtree(out)
        else:
            assert seen[-1] >= seen[-2], "a part that is in the journal is not done again"
    assert max(seen) > 0, "some kills fell into the sweep"
    last = compile_small(tmp_path / "model", out)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors.decode()
    assert digests(out) == expected
    assert not [*tmp_path.glob(".out.work-*/journal")]
    # What a kill of the last seconds left stays until a later compile: it could be about to be locked.
    for path in tmp_path.glob(".out.*"):
        os.utime(path, (0, 0))
    sweep(out, resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out", "whole"}, "no work is left behind"


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
