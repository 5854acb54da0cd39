"""The command line: a thin parser over the Python API. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from qc.cli.parser import build_parser

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 done, 2 bad usage or input, 3 unsupported by the target, 4 a contract was broken, 130 interrupted, 1 our bug.
    """
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    from qc.ir.errors import QcError

    try:
        return arguments.command(arguments) or 0
    except QcError as error:
        print(f"qc: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("qc: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; Python would complain on exit
        return 0
    except OSError as error:
        print(f"qc: {error}. Check the path, its permissions and the free space.", file=sys.stderr)
        return 2


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
