"""``report.json`` and ``report.html``: what a compile did, site by site, and what it cost.

Both depend on the compile's inputs alone: no time, no path of the machine, so that two compiles agree to the byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from qc.backends.target import Coverage
from qc.ir.errors import InputError
from qc.passes.manager import PassReport
from qc.plan import Plan

_KEYS = ("accuracy", "coverage", "passes", "sites", "summary")

__all__ = ["build_report", "read_report", "write_report"]


def build_report(
    *,
    plan: Plan,
    reports: Sequence[PassReport],
    coverage: Coverage,
    accuracy: Mapping[str, object],
    directory: Path,
    recipe: str,
    target: str,
) -> dict[str, object]:
    """Collects the content of ``report.json``.

    Returns:
        ``summary``, ``accuracy``, ``passes``, ``sites`` (of all passes, flat) and ``coverage``; JSON values only.
    """
    files = [p for p in sorted(directory.iterdir()) if p.name.startswith("model") or p.suffix == ".onnx"]
    sizes = {p.name: p.stat().st_size for p in files}
    return _finite(
        {
            "summary": {
                "recipe": recipe,
                "target": target,
                "parameters": plan.parameters,
                "source_bytes": plan.source_bytes,
                "artifact_bytes": sum(sizes.values()),
                "files": sizes,
            },
            "accuracy": dict(accuracy),
            "passes": [_pass(r) for r in reports],
            "sites": [
                {"pass": r.name, "site": s.name, "outcome": s.outcome.value, "reason": s.reason, **s.details}
                for r in reports
                for s in r.sites
            ],
            "coverage": {
                "on_target": coverage.on_target,
                "off_target": coverage.off_target,
                "nodes": [dict(n) for n in coverage.nodes],
                "accelerators": [dict(a) for a in coverage.accelerators],
            },
        }
    )  # type: ignore[return-value]


def write_report(report: Mapping[str, object], directory: Path) -> None:
    """Writes ``report.json``, and ``report.html`` if the ``report`` extra is installed."""
    text = json.dumps(report, indent=1, sort_keys=True) + "\n"
    (directory / "report.json").write_text(text, encoding="utf-8")
    try:
        from qc.report.html import render
    except ImportError:
        return
    (directory / "report.html").write_text(render(report), encoding="utf-8")


def read_report(directory: Path) -> dict[str, object]:
    """Reads the report of an artifact.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    path = directory / "report.json"
    if not path.is_file():
        raise InputError(f"Expected an artifact with a report.json at {directory}, found none.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not a readable report ({error}). Compile the model again.") from error
    missing = _KEYS if not isinstance(report, dict) else sorted(set(_KEYS) - set(report))
    if missing:
        raise InputError(f"Expected a report with {', '.join(missing)} in {path}, found none. Compile the model again.")
    return report


def _pass(report: PassReport) -> dict[str, object]:
    outcomes = [s.outcome.value for s in report.sites]
    return {
        "name": report.name,
        "spec": report.spec,
        "contract": report.contract,
        "modified": report.modified,
        "sites": {outcome: outcomes.count(outcome) for outcome in ("changed", "matched", "skipped")},
        "notes": list(report.notes),
        "differences": [{"output": d.output, "max_abs": d.max_abs, "sqnr_db": d.sqnr} for d in report.differences],
        "blocks": [{"block": b.label, "before_db": b.before, "after_db": b.after} for b in report.blocks],
    }


def _finite(value: object) -> object:
    """Replaces what JSON cannot say: an infinite ratio (no error at all) becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
