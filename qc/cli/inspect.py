"""``qc inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from qc import format_errors, inspection
from qc.cli.output import byte_size, figure, print_json, print_table
from qc.frontend import load
from qc.ir.errors import InputError
from qc.ir.text import to_text
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager

__all__ = ["run"]

_ROWS = 30
_SHOWN = ("mid2:g64:f16", "lut3", "uint3:g64:f16", "uint4:g32:f16", "nf4:g64:q8x256", "mxfp4", "int8")
"""Formats that have a column for every weight."""


def run(arguments: argparse.Namespace) -> int:
    """Shows what was asked for; sizes if nothing was."""
    _require_graph(Path(arguments.model))
    model = load(arguments.model)
    if not (Path(arguments.model) / "manifest.json").is_file():
        model, _ = PassManager(canonicalize_passes(), verify=False).run(model)
    if arguments.graph:
        print(to_text(model))
        return 0
    wanted = [name for name in _PRINTERS if getattr(arguments, name)] or ["formats" if arguments.plot else "sizes"]
    data: dict[str, object] = {}
    for name in wanted:
        data |= format_errors.formats(model) if name == "formats" else getattr(inspection, name)(model)
    if arguments.plot:
        if "compared" not in data:
            raise InputError("Expected --formats beside --plot: the plot shows errors of formats.")
        Path(arguments.plot).write_text(format_errors.plot(data), encoding="utf-8")
    if arguments.json:
        print_json(data)
        return 0
    for name in wanted:
        _PRINTERS[name](data)
    return 0


def _require_graph(place: Path) -> None:
    """Refuses an artifact that does not hold its model as one graph."""
    if not (place / "manifest.json").is_file() or (place / "model.onnx").is_file():
        return
    graphs = sorted(p.name for p in place.glob("*.onnx"))
    instead = f"one of its graphs ({', '.join(graphs)}) or " if graphs else ""
    raise InputError(
        f"Expected an artifact with model.onnx to look into, found none in {place}. Give {instead}the model that it "
        "was compiled from."
    )


def _sizes(data: dict) -> None:
    rows = data["tensors"]
    print_table(
        f"{byte_size(data['total_bytes'])} in {len(rows)} tensors"
        + (f", the largest {_ROWS}" if len(rows) > _ROWS else ""),
        ("tensor", "type", "shape", "size", "share", "used by"),
        (
            (r["name"], r["dtype"], r["shape"], byte_size(r["bytes"]), f"{r['share']:.1%}", r["used_by"])
            for r in rows[:_ROWS]
        ),
        numeric=(3, 4),
    )


def _blocks(data: dict) -> None:
    runs = ", ".join(f"{count} alike" for count in data["runs"]) or "none repeat"
    print_table(
        f"blocks: {runs}",
        ("segment", "nodes", "weights", "inputs", "outputs"),
        (
            (b["label"], b["nodes"], byte_size(b["weight_bytes"]), len(b["inputs"]), len(b["outputs"]))
            for b in data["blocks"]
        ),
        numeric=(1, 2, 3, 4),
    )


def _groups(data: dict) -> None:
    print_table(
        f"{len(data['groups'])} channel groups",
        ("id", "kind", "width", "made by", "read by", "admits", "forbidden by"),
        (
            (
                g["id"],
                g["kind"],
                g["width"],
                _names(g["producers"]),
                _names(g["consumers"]),
                " ".join(g["admits"]),
                _why(g),
            )
            for g in data["groups"]
        ),
        numeric=(0, 2),
    )
    coverage = data["coverage"]
    reasons = ", ".join(
        f"{operator} {count / coverage['weights']:.1%}" for operator, count in coverage["by_operator"].items()
    )
    print(f"\ninput channels may be scaled for {coverage['scalable']:.1%} of the weights", end="")
    print(f"; the rest is forbidden by {reasons}" if reasons else "")
    print(f"\n{data['drawing']}")


def _names(members: list[dict]) -> str:
    """The first members by name, and how many more there are."""
    names = list(dict.fromkeys(m["name"] for m in members))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _why(group: dict) -> str:
    by_operator: dict[str, list[str]] = {}
    for action, forbidden in group["forbids"].items():
        by_operator.setdefault(forbidden["operator"], []).append(action)
    return "; ".join(f"{operator}: {' '.join(actions)}" for operator, actions in by_operator.items())


def _outliers(data: dict) -> None:
    if not data["sites"]:
        print("Found no matrix product in canonical form: give the float model, not an artifact.")
        return
    print_table(
        "largest channel over the median channel, at the input of each matrix product (random inputs)",
        ("site", "channels", "absmax", "ratio", "worst channels", "weight ratio"),
        (
            (
                r["site"],
                r["channels"],
                figure(r["absmax"]),
                figure(r["ratio"]),
                r["worst_channels"],
                figure(r["weight_ratio"]),
            )
            for r in data["sites"][:_ROWS]
        ),
        numeric=(1, 2, 3, 5),
    )


def _formats(data: dict) -> None:
    names = [e["format"] for e in data["compared"]]
    print_table(
        "relative squared error in each format (mean over weights), with plain assignment and no calibration",
        ("format", "bits/weight", "error"),
        ((e["format"], f"{e['bits_per_weight']:.3f}", figure(e["error"])) for e in data["compared"]),
        numeric=(1, 2),
    )
    shown = [n for n in names if n in _SHOWN]
    found = ({e["format"]: figure(e["error"]) for e in w["errors"]} | {"": w["name"]} for w in data["weights"][:_ROWS])
    print_table(
        f"by weight, the first {_ROWS}; all of them and all formats with --json",
        ("weight", *shown),
        ((row[""], *(row.get(n, "-") for n in shown)) for row in found),
        numeric=tuple(range(1, len(shown) + 1)),
    )


_PRINTERS = {"sizes": _sizes, "blocks": _blocks, "groups": _groups, "outliers": _outliers, "formats": _formats}
