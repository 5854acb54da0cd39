"""How commands print: one table, or one JSON document."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["figure", "mib", "print_json", "print_table"]


def print_json(data: object) -> None:
    """Prints one JSON document on standard output; what is not finite becomes null."""
    json.dump(_finite(data), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()
) -> None:
    """Prints a table on standard output.

    Args:
        title: Printed above it; empty for none.
        columns: Headers.
        rows: Cells; anything with a ``str``.
        numeric: Indices of columns to align to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def mib(count: float) -> str:
    """Bytes as mebibytes."""
    return f"{count / (1 << 20):,.1f} MiB"


def figure(value: object) -> str:
    """A number for people: four significant digits; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return "exact" if math.isinf(value) else f"{value:.4g}"
    return str(value)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
