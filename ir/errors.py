"""The errors of qc: one class per thing a caller may want to catch, each with the exit code of the command line.

Every message says what was expected, what was found, where, and what to do next.
"""

from __future__ import annotations

__all__ = ["ContractError", "InputError", "InternalError", "QcError", "UnsupportedError"]


class QcError(Exception):
    """Base of everything that qc raises on purpose."""

    exit_code = 1


class InputError(QcError):
    """The user gave something that cannot be used: a path, a file, an option, a name. Nothing was changed."""

    exit_code = 2


class UnsupportedError(QcError):
    """The input is valid but the target, or this version of qc, cannot express it."""

    exit_code = 3


class ContractError(QcError):
    """A pass or an artifact broke its numeric or structural contract; the result was thrown away."""

    exit_code = 4


class InternalError(QcError):
    """A state that only our own code can produce. The message starts with ``Bug:``."""

    def __init__(self, message: str) -> None:
        super().__init__(f"Bug: {message}")
