"""Chooses one option per unit under budgets: a multiple-choice knapsack, solved by an integer program.

The programs of papers are calls of `choose`, with what they call damage and what an option uses of which budget:

| paper | unit | budgets |
|---|---|---|
| AdaQuant, arXiv 2006.10518, section 3.4 | layer | bytes, or operations |
| LQ-LoRA, arXiv 2311.12023, section 3.2 | matrix, of formats with a low-rank term | bytes |
| MixDQ, arXiv 2405.17873, section 3 | layer, of two groups, each with its damage | a band of bits for each group |
| MC-MoE, arXiv 2410.06270, section 3 | expert | bits, and a least number of experts for some widths |
| SliM-LLM, arXiv 2405.14917, section 3 | group of columns | as many groups with a bit more as with a bit less |
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qc.ir.errors import InputError

__all__ = ["Option", "choose"]


@dataclasses.dataclass(frozen=True)
class Option:
    """What a unit may become.

    Attributes:
        damage: What it costs the network; damages of units are taken to add up.
        uses: What it takes of each budget, by name.
    """

    damage: float
    uses: Mapping[str, float]


Budgets = Mapping[str, float | tuple[float, float]]
"""By name, the most that may be used in total, or the least and the most."""


def choose(units: Sequence[Sequence[Option]], budgets: Budgets, plans: int = 1) -> list[tuple[int, ...]]:
    """Finds the choices of least total damage within the budgets.

        min  sum_{u,c} damage_uc x_uc    with  sum_c x_uc = 1,  least <= sum_{u,c} uses_uc x_uc <= most,  x in {0, 1}

    solved by HiGHS to a gap of zero. Each further plan is the best one that differs from all before it: their choices
    must not all be taken again.

    Args:
        units: The options of each unit.
        budgets: By name, what may be used in total, or the least and the most; none for no limit.
        plans: How many plans, at most.

    Returns:
        For each plan the number of the option of each unit, the best plan first.

    Raises:
        InputError: If even the least of everything exceeds a budget, or scipy is not installed.
    """
    for name, limits in budgets.items():
        least, budget = sum(min(o.uses[name] for o in options) for options in units), _band(limits)[1]
        if least > budget:
            raise InputError(
                f"Expected a budget of {name} of at least {least:,.0f}, the least that the formats allow; found "
                f"{budget:,.0f}. Raise it, or allow smaller formats."
            )
    found: list[tuple[int, ...]] = []
    while len(found) < plans:
        plan = _solve(units, budgets, found)
        if plan is None:
            break
        found.append(plan)
    if not found:
        raise InputError(f"Expected budgets that can be met together, found {dict(budgets)}. Raise one of them.")
    return found


def _solve(
    units: Sequence[Sequence[Option]], budgets: Budgets, taken: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise InputError("Expected scipy, which solves the integer program. Install qc-compiler[allocate].") from error

    starts = np.cumsum([0, *(len(options) for options in units)])
    flat = [option for options in units for option in options]
    owner = np.repeat(np.arange(len(units)), np.diff(starts))
    once = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(units), len(flat)))
    constraints = [LinearConstraint(once, 1, 1)]
    for name, limits in budgets.items():
        # Numbers near one: the solver's tolerances are absolute.
        used, (least, most) = np.array([[o.uses[name] for o in flat]]), _band(limits)
        unit = max(np.abs(used).max(), abs(most), 1e-30)
        constraints.append(LinearConstraint(used / unit, least / unit - 1e-9, most / unit + 1e-9))
    for plan in taken:
        row = np.zeros((1, len(flat)))
        row[0, starts[:-1] + np.array(plan)] = 1
        constraints.append(LinearConstraint(row, -np.inf, len(plan) - 1))
    damage = np.array([o.damage for o in flat])
    with _standard_output_closed():
        result = milp(
            damage / (damage.mean() or 1.0),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    return tuple(int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts))


def _band(limits: float | tuple[float, float]) -> tuple[float, float]:
    return limits if isinstance(limits, tuple) else (-np.inf, limits)


@contextlib.contextmanager
def _standard_output_closed() -> Iterator[None]:
    """Sends what libraries print to the standard output to nowhere: HiGHS prints traces at times, amid ``--json``."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
