"""``qc report`` and ``qc verify``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from qc.backends.artifact import Artifact
from qc.backends.inputs import text_inputs
from qc.backends.target import Runner
from qc.cli.output import accuracy_rows, byte_size, figure, print_json, print_table
from qc.ir.model import Model
from qc.ir.probe import Found, find_inputs
from qc.report import read_report

__all__ = ["report", "verify"]

_TOKENS = 5
"""A vocabulary has so many, and so has every context."""


def report(arguments: argparse.Namespace) -> int:
    """Prints the report, worst weights first, with the line to paste to exclude them."""
    data = read_report(Path(arguments.artifact))
    if arguments.json:
        print_json(data)
        return 0
    summary, accuracy, coverage = data["summary"], data["accuracy"], data["coverage"]
    rows = [
        ("recipe", f"{summary['recipe']} on {summary['target']}"),
        ("size", f"{byte_size(summary['artifact_bytes'])} (source weights {byte_size(summary['source_bytes'])})"),
    ]
    print_table("Summary", ("", ""), [*rows, *accuracy_rows(accuracy)])
    print_table(
        "\nPasses",
        ("pass", "contract", "changed", "skipped"),
        ((p["spec"], p["contract"], p["sites"]["changed"], p["sites"]["skipped"]) for p in data["passes"]),
        numeric=(2, 3),
    )
    weights = [s for s in data["sites"] if s["outcome"] == "changed" and s.get("sqnr_db") is not None]
    weights.sort(key=lambda s: s["sqnr_db"])
    if weights:
        print_table(
            "\nWeights, the worst first",
            ("site", "format", "bits", "SQNR dB"),
            ((s["site"], s["format"], figure(s["bits_per_weight"]), figure(s["sqnr_db"])) for s in weights[:12]),
            numeric=(2, 3),
        )
        print(f"to leave the worst in float: --exclude '^{re.escape(weights[0]['site'])}$'")
    left = [s for s in data["sites"] if s["outcome"] == "skipped" and s["pass"].startswith("quantize")]
    if left:
        print_table(
            "\nLeft as it was, and why", ("site", "pass", "reason"), ((s["site"], s["pass"], s["reason"]) for s in left)
        )
    off = [n for n in coverage["nodes"] if not n["on_target"]]
    if off:
        print_table(
            "\nSlow paths", ("operator", "nodes", "reason"), ((n["op"], n["count"], n["reason"]) for n in off), (1,)
        )
    if coverage.get("accelerators"):
        print_table(
            "\nAccelerators",
            ("", "takes", "if shapes were fixed", "but not"),
            map(_accelerator, coverage["accelerators"]),
        )
    page = Path(arguments.artifact) / "report.html"
    print(f"\npage: {page}" if page.is_file() else "\nfor a page: pip install 'qc-compiler[report]' and compile again")
    return 0


def _on_text(runner: Runner) -> Found:
    """What an artifact yields on a few tokens, where no graph tells which other inputs it takes."""
    if runner.signature.input("tokens") is None:
        return Found(obstacle="no graph tells which inputs it takes")
    batch = text_inputs(runner.signature, np.arange(_TOKENS)[None])
    return Found([batch], [runner.run(batch)])


def _accelerator(found: dict[str, Any]) -> tuple[str, ...]:
    def said(key: str) -> str:
        if key not in found:
            return ""
        f = found[key]
        return f"{f['nodes']} of {f['of']} nodes in {f['partitions']} parts: {f['verdict']}"

    unsupported = [op.removeprefix("ai.onnx:") for op in found["unsupported"]]
    return found["name"], said("as_is"), said("fixed_shapes"), ", ".join(unsupported)


def verify(arguments: argparse.Namespace) -> int:
    """Checks digests, loads the artifact in its runtime and runs it on random inputs."""
    artifact = Artifact.open(Path(arguments.artifact))
    artifact.verify()
    runner = artifact.runner()
    graph = Model.load(artifact.directory) if (artifact.directory / "model.onnx").is_file() else None
    found = find_inputs(graph, runner.run) if graph is not None else _on_text(runner)
    outputs = {name for batch in found.outputs for name in batch}
    nan = {n for b in found.outputs for n, v in b.items() if v.dtype.kind == "f" and np.isnan(v).any()}
    if arguments.json:
        data = {"ok": True, "files": len(artifact.manifest.files), "outputs": sorted(outputs), "nan": sorted(nan)}
        print_json(data | {"not_run": found.obstacle or None})
        return 0
    ran = f"not run: {found.obstacle}" if found.obstacle else f"runs, {len(outputs)} outputs"
    print(f"{len(artifact.manifest.files)} files as compiled; loads in its runtime; {ran}")
    if nan:
        print(f"NaN on random inputs in {', '.join(sorted(nan))}")
    return 0
