"""What a compile tells while it works. The base class is silent; the command line shows a live table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qc.passes.manager import PassReport
    from qc.plan import Plan

__all__ = ["Progress"]


class Progress:
    """Receives the events of a compile; override what you want to see."""

    def plan(self, plan: Plan) -> None:
        """Called once, before work starts."""

    def stage(self, name: str) -> None:
        """A stage starts: ``import``, ``canonicalize``, ``recipe``, ``lower``, ``write``, ``measure``."""

    def pass_event(self, name: str, report: PassReport | None) -> None:
        """A pass starts (no report) or has finished."""

    def tick(self, done: int, total: int, site: str) -> None:
        """A pass has finished `done` of `total` sites and turns to `site`."""

    def close(self) -> None:
        """The compile has ended, well or not."""
