"""The integer program against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.ir.errors import InputError
from qc.passes.allocate._program import Option, choose

pytest.importorskip("scipy", reason="the solver comes with the allocate extra")

_number = st.integers(1, 1000).map(float)
_option = st.builds(lambda d, b, t: Option(d, {"bytes": b, "time": t}), _number, _number, _number)
_units = st.lists(st.lists(_option, min_size=1, max_size=4), min_size=1, max_size=5)


def total(units: list[list[Option]], plan: tuple[int, ...], name: str = "") -> float:
    chosen = [options[c] for options, c in zip(units, plan, strict=True)]
    return sum(o.uses[name] if name else o.damage for o in chosen)


def feasible(units: list[list[Option]], budgets: dict[str, float]) -> list[tuple[int, ...]]:
    plans = itertools.product(*(range(len(options)) for options in units))
    return [p for p in plans if all(total(units, p, name) <= b for name, b in budgets.items())]


@given(units=_units, bytes_=st.integers(100, 3000), time=st.integers(100, 3000))
@settings(max_examples=30)
def test_plans_are_the_best_ones_that_brute_force_finds(units: list[list[Option]], bytes_: int, time: int) -> None:
    budgets = {"bytes": float(bytes_), "time": float(time)}
    expected = sorted(total(units, p) for p in feasible(units, budgets))
    if not expected:
        with pytest.raises(InputError, match="budget"):
            choose(units, budgets)
        return
    plans = choose(units, budgets, plans=3)
    assert len(set(plans)) == len(plans) == min(3, len(expected))
    assert [total(units, p) for p in plans] == pytest.approx(expected[: len(plans)])
    assert all(total(units, p, name) <= b for p in plans for name, b in budgets.items())


@given(units=_units, budget=st.integers(0, 2000), more=st.integers(0, 2000))
@settings(max_examples=15)
def test_a_larger_budget_never_costs_more(units: list[list[Option]], budget: int, more: int) -> None:
    least = sum(min(o.uses["bytes"] for o in options) for options in units)
    small, large = (choose(units, {"bytes": least + b})[0] for b in (budget, budget + more))
    assert total(units, large) <= total(units, small) + 1e-6


def test_tiny_damages_count_as_large_ones_do() -> None:
    units = [[Option(d * 1e-9, {"bytes": b}) for d, b in ((1, 3), (5, 1))], [Option(2e-9, {"bytes": 1})] * 2]
    assert choose(units, {"bytes": 4})[0][0] == 0
    assert choose(units, {"bytes": 3})[0][0] == 1


def test_a_budget_that_nothing_meets_names_the_least() -> None:
    with pytest.raises(InputError, match="at least 7"):
        choose([[Option(1, {"bytes": 7})]], {"bytes": 6})
