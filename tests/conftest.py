"""Fixtures of the whole-product tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def qc(tmp_path: Path) -> Command:
    """Runs the command line in an empty directory, as a user does; the test judges the exit code."""

    def run(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).parent / "qc", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def models(pytestconfig: pytest.Config) -> Path:
    """Where `architectures` keeps its models, for all workers and for the next session."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("architectures")
