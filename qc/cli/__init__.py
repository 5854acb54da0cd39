"""The command line: a thin parser over the Python API. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence

from qc.cli.parser import build_parser

__all__ = ["build_parser", "main"]

_REPORT = "this is a bug of qc, please report it with the lines above"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 done, 2 bad usage or input, 3 unsupported by the target, 4 a contract was broken, 130 interrupted, 1 our bug.
    """
    arguments = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a text may have characters that the terminal does not
    with _interruptible(), _without_noise():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from qc.ir.errors import InternalError, QcError

    try:
        return arguments.command(arguments) or 0
    except InternalError:
        return _bug()
    except QcError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        kept = getattr(arguments, "resume", False)
        _say(f"interrupted; {'--resume goes on with what was finished' if kept else 'nothing was left behind'}")
        return 130
    except BrokenPipeError:  # the reader went away; Python would complain on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        _say("out of memory. Close other programs, or work on a larger machine; `--dry-run` estimates what is needed.")
        return 2
    except OSError as error:
        _say(f"{error}. Check the path, its permissions and the free space.")
        return 2
    except Exception:  # noqa: BLE001  the last line of defence
        return _bug()


def _bug() -> int:
    traceback.print_exc()
    _say(_REPORT)
    return 1


def _say(text: str) -> None:
    print(f"qc: {text}", file=sys.stderr)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: whatever it was writing is removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    held = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, held)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Keeps the warnings and logs of libraries from the user: what matters, we say ourselves."""
    held = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(held)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
