"""How commands print: one table, or one JSON document."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["accuracy_rows", "byte_size", "figure", "print_json", "print_table"]


_PIPE_WIDTH = 1000


def print_json(data: object) -> None:
    """Prints one JSON document on standard output; what is not finite becomes null."""
    json.dump(_finite(data), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()
) -> None:
    """Prints a table on standard output.

    Args:
        title: A line above it; empty for none.
        columns: Headers.
        rows: Cells; anything with a ``str``.
        numeric: Indices of columns to align to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    # In a file or a pipe nothing is gained by wrapping.
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    with console.capture() as lines:
        console.print(table)
    if title:
        print(title)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()))


def accuracy_rows(accuracy: Mapping[str, object]) -> list[tuple[str, str]]:
    """What was measured against the float model, as rows for a table; figures that do not apply are left out."""
    known = {k: v for k, v in accuracy.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    rows = []
    if "ppl" in known:
        text = f"{known['ppl']:.2f}"
        if "ppl_reference" in known:
            text += f" (float {known['ppl_reference']:.2f}, {known['ppl'] / known['ppl_reference'] - 1:+.2%})"
        rows.append(("perplexity", text))
    if "kl" in known:
        rows.append(("KL to float", f"{known['kl']:.4g} nats per token"))
    if "top1" in known:
        rows.append(("top-1 agreement", f"{known['top1']:.1%}"))
    if "cosine" in known:
        rows.append(("cosine to float", f"{known['cosine']:.4f} mean, {known['cosine_min']:.4f} smallest"))
    if "sqnr_db" in known:
        rows.append(("SQNR", f"{known['sqnr_db']:.1f} dB"))
    where = str(accuracy.get("measured_on", ""))
    if "windows" in known:
        where += f"{', ' if where else ''}{known['windows']} windows of {known['window']} tokens"
    return [*rows, ("measured on", where)] if where else rows


def byte_size(count: float) -> str:
    """Bytes in mebibytes, or in kibibytes below one of them."""
    return f"{count / (1 << 20):,.1f} MiB" if count >= 1 << 20 else f"{count / (1 << 10):,.1f} KiB"


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
