"""``qc bench``."""

from __future__ import annotations

import argparse

from qc.backends.artifact import Artifact
from qc.backends.bench import Protocol, bench
from qc.cli.output import figure, print_json, print_table

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Measures one artifact, or two in turns."""
    other = None if arguments.vs is None else Artifact.open(arguments.vs)
    data = bench(Artifact.open(arguments.artifact), other, Protocol(threads=arguments.threads))
    if arguments.json:
        print_json(data)
        return 0
    sides = [name for name in ("a", "b") if data[name] is not None]
    keys = [k for k in data["a"] if any(data[s][k] is not None for s in sides)]
    titles = {"a": arguments.artifact, "b": arguments.vs}
    rows = ((k, *(figure(data[s][k]) for s in sides)) for k in keys)
    print_table("", ("", *(titles[s] for s in sides)), rows, numeric=range(1, 1 + len(sides)))
    ratios = {k: v for k, v in data["ratio"].items() if v is not None}
    if ratios:
        faster = ", ".join(f"{k} {v:.2f}x" for k, v in ratios.items())
        print(f"\n{arguments.artifact} against {arguments.vs} (above 1: the first is faster): {faster}")
    p = data["protocol"]
    print(f"protocol: {p['threads']} thread(s), medians of {p['rounds']} alternating rounds, spinning off")
    return 0
