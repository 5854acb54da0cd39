"""Hidden directories: removed by whoever made them, or by the next compile once nobody holds them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from qc.backends.workspace import HiddenDirectory, shielded, sweep, work_directory


def _aged(path: Path) -> Path:
    path.mkdir()
    (path / "weights.bin").write_bytes(b"x")
    os.utime(path, (time.time() - 60,) * 2)
    return path


def test_a_work_directory_goes_with_its_block(tmp_path):
    def interrupted() -> None:
        with work_directory(tmp_path / "out") as work:
            assert work.parent == tmp_path
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_holds_is_removed_and_what_somebody_holds_is_not(tmp_path):
    dead = [_aged(tmp_path / name) for name in (".out.work-a", ".out.tmp-b")]
    other = _aged(tmp_path / ".another.tmp-c")
    alive = HiddenDirectory(tmp_path, ".out.work-")
    os.utime(alive.path, (time.time() - 60,) * 2)
    (tmp_path / ".out.work-new").mkdir()
    sweep(tmp_path / "out")
    assert not any(p.exists() for p in dead)
    assert other.exists()
    assert alive.path.exists()
    assert (tmp_path / ".out.work-new").exists()
    alive.remove()


def test_what_cannot_be_resumed_is_removed_and_what_can_is_not(tmp_path):
    for name in ("begun", "journal"):
        (tmp_path / f".out.work-{name}" / name).mkdir(parents=True)
        os.utime(tmp_path / f".out.work-{name}", (0, 0))
    sweep(tmp_path / "out", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == [".out.work-journal"]


def test_a_work_directory_with_a_journal_is_taken_over(tmp_path):
    def run(name: str, resume: bool) -> tuple[bool, Path]:
        with work_directory(tmp_path / name, resume=resume) as work:
            known = (work / "journal").is_dir()
            (work / "journal").mkdir(exist_ok=True)
            found.append((known, work))
            raise KeyboardInterrupt

    found: list[tuple[bool, Path]] = []
    for name, resume in (("out", True), ("other", True), ("out", True), ("out", False)):
        with pytest.raises(KeyboardInterrupt):
            run(name, resume)
    assert [known for known, _ in found] == [False, False, True, False]
    assert found[2][1] == found[0][1]
    assert sorted(tmp_path.iterdir()) == sorted({found[0][1], found[1][1]})


def test_an_artifact_whose_successor_never_came_returns(tmp_path):
    _aged(tmp_path / ".out.old-x")
    sweep(tmp_path / "out")
    assert (tmp_path / "out" / "weights.bin").read_bytes() == b"x"


def test_the_predecessor_of_a_finished_artifact_goes(tmp_path):
    _aged(tmp_path / ".out.old-x")
    (tmp_path / "out").mkdir()
    sweep(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_waits_for_the_end_of_a_shield():
    done = []

    def interrupted() -> None:
        with shielded():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done
