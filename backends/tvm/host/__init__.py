"""C files: what every library has, functions that some need, and a program that runs one in an emulator."""

from __future__ import annotations

import importlib.resources

__all__ = ["template"]


def template(name: str) -> str:
    """The text of a file."""
    return importlib.resources.files(__name__).joinpath(name).read_text("utf-8")
