"""Fixtures of the fusions' tests, shared with those that other targets use too."""

from qc.passes.fuse.conftest import build, keeps

__all__ = ["build", "keeps"]
