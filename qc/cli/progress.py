"""The live table of a compile on a terminal, and plain lines elsewhere; both on standard error."""

from __future__ import annotations

import sys
import time

from qc.cli.output import byte_size
from qc.passes.base import Outcome
from qc.passes.manager import PassReport
from qc.plan import Plan
from qc.progress import Progress

__all__ = ["choose_progress"]


def choose_progress() -> Progress:
    """A live table on a terminal, else plain lines."""
    return _LiveProgress() if sys.stderr.isatty() else _PlainProgress()


def _plan_lines(plan: Plan) -> list[str]:
    return [
        f"plan: {plan.parameters / 1e6:,.1f} M parameters, {byte_size(plan.source_bytes)} of weights",
        (
            f"      artifact about {byte_size(plan.artifact_bytes)}, peak memory about {byte_size(plan.memory_bytes)}, "
            f"disk while working {byte_size(plan.disk_bytes)}"
        ),
        f"      passes: {', '.join(str(s) for s in plan.steps) or 'none'}",
    ]


def _memory() -> int:
    """Anonymous resident memory of this process in bytes, 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next((int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def _outcome(report: PassReport) -> str:
    if not report.sites:
        changed = "changed" if report.modified else "nothing to do"
    else:
        changed = f"{report.count(Outcome.CHANGED)} changed, {report.count(Outcome.SKIPPED)} skipped"
    worst = min((d.sqnr for d in report.differences), default=None)
    error = "" if worst is None or report.contract != "lossy" else f", outputs keep {worst:.1f} dB"
    return changed + error


_QUIET = 60.0
"""Seconds after which a pass that takes long says how far it is."""


class _PlainProgress(Progress):
    """One line per event, and one a minute while a pass works."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def plan(self, plan: Plan) -> None:
        """Prints the estimate."""
        for line in _plan_lines(plan):
            self._say(line)

    def stage(self, name: str) -> None:
        """Prints the stage."""
        self._say(f"{name} ...")

    def pass_event(self, name: str, report: PassReport | None) -> None:
        """Prints what a pass did and how long it took."""
        if report is not None and report.modified:
            verified = f", verified in {report.verify_seconds:.1f} s" if report.verify_seconds else ""
            self._say(f"  {name}: {_outcome(report)} ({report.seconds:.1f} s{verified})")

    def tick(self, done: int, total: int, site: str) -> None:
        """Prints how far the running pass is, now and then."""
        if time.monotonic() - self._said >= _QUIET:
            self._say(f"  {done}/{total} {site}")

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class _LiveProgress(_PlainProgress):
    """The lines of `_PlainProgress` scroll by above one live line: pass, site, rate, time left, memory."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._live.start()
        self._stage = self._pass = ""
        self._began = time.perf_counter()

    def stage(self, name: str) -> None:
        """Prints the stage and turns the live line to it."""
        super().stage(name)
        self._stage, self._pass = name, ""
        self._show("")

    def pass_event(self, name: str, report: PassReport | None) -> None:
        """Turns the live line to a pass, or prints what it did."""
        super().pass_event(name, report)
        self._pass, self._began = name, time.perf_counter()
        self._show("" if report is None else "verified")

    def tick(self, done: int, total: int, site: str) -> None:
        """Shows how far the running pass is."""
        elapsed = time.perf_counter() - self._began
        left = f"{elapsed / done * (total - done):.0f} s left" if done else ""
        rate = f"{done / elapsed:.1f}/s" if done and elapsed > 0 else ""
        self._show(f"{done}/{total} {site} {rate} {left}")

    def close(self) -> None:
        """Removes the live line."""
        self._live.stop()

    def _show(self, detail: str) -> None:
        from rich.spinner import Spinner

        text = " · ".join(part for part in (self._stage, self._pass, detail.strip(), byte_size(_memory())) if part)
        self._live.update(Spinner("dots", text=text))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)
