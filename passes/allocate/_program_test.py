"""The integer program against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
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


def brute(units: list[list[Option]], allowed: Callable[[tuple[int, ...]], bool]) -> float:
    """The least damage of all plans that a rule allows."""
    plans = itertools.product(*(range(len(options)) for options in units))
    return min(total(units, p) for p in plans if allowed(p))


def damages(seed: int, units: int, widths: tuple[int, ...]) -> list[list[float]]:
    """Damages that fall fourfold a bit, times how much a unit matters."""
    rng = np.random.default_rng(seed)
    return [[w * rng.uniform(0.8, 1.2) * 4.0**-b for b in widths] for w in rng.lognormal(0, 1, units)]


@pytest.mark.parametrize("seed", range(3))
def test_two_groups_with_a_damage_and_a_band_of_bits_each_are_one_program(seed: int) -> None:
    """MixDQ: what decides the content, and what decides the quality of an image."""
    widths, content, quality = (2, 4, 8), damages(seed, 3, (2, 4, 8)), damages(seed + 9, 4, (2, 4, 8))
    both = [
        [
            Option(d, {"content": b * (kind == "content"), "quality": b * (kind == "quality")})
            for d, b in zip(row, widths, strict=True)
        ]
        for kind, rows in (("content", content), ("quality", quality))
        for row in rows
    ]
    bands = {"content": (3 * 4 - 2.0, 3 * 4 + 2.0), "quality": (4 * 5 - 2.0, 4 * 5 + 2.0)}
    apart = [
        choose(
            [[Option(d, {"bits": b}) for d, b in zip(row, widths, strict=True)] for row in rows], {"bits": bands[kind]}
        )[0]
        for kind, rows in (("content", content), ("quality", quality))
    ]
    (plan,) = choose(both, bands)
    assert total(both, plan) == pytest.approx(total(both, (*apart[0], *apart[1])))
    assert all(bands[n][0] <= total(both, plan, n) <= bands[n][1] for n in bands)


@pytest.mark.parametrize("seed", range(3))
def test_a_width_may_ask_for_a_least_number_of_experts(seed: int) -> None:
    """MC-MoE: at least one expert with 3 bits and one with 2, within an average of 2 bits."""
    widths = (1, 2, 3)
    units = [
        [Option(d, {"bits": b, "of 3": b == 3, "of 2": b == 2}) for d, b in zip(row, widths, strict=True)]
        for row in damages(seed, 6, widths)
    ]
    (plan,) = choose(units, {"bits": 12, "of 3": (1, 6), "of 2": (1, 6)})
    expected = brute(units, lambda p: sum(widths[c] for c in p) <= 12 and 2 in p and 1 in p)
    assert total(units, plan) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_as_many_groups_of_columns_may_gain_a_bit_as_lose_one(seed: int) -> None:
    """SliM-LLM: the average stays what it is, to the bit."""
    widths = (1, 2, 3)
    units = [
        [Option(d, {"gained": b - 2}) for d, b in zip(row, widths, strict=True)] for row in damages(seed, 7, widths)
    ]
    (plan,) = choose(units, {"gained": (0, 0)})
    assert sum(widths[c] for c in plan) == 14
    assert total(units, plan) == pytest.approx(brute(units, lambda p: sum(widths[c] for c in p) == 14))
    order = np.argsort([options[1].damage for options in units])
    assert plan[order[-1]] >= plan[order[0]], "what matters most has no fewer bits than what matters least"


def test_tiny_damages_count_as_large_ones_do() -> None:
    units = [[Option(d * 1e-9, {"bytes": b}) for d, b in ((1, 3), (5, 1))], [Option(2e-9, {"bytes": 1})] * 2]
    assert choose(units, {"bytes": 4})[0][0] == 0
    assert choose(units, {"bytes": 3})[0][0] == 1


def test_a_budget_that_nothing_meets_names_the_least() -> None:
    with pytest.raises(InputError, match="at least 7"):
        choose([[Option(1, {"bytes": 7})]], {"bytes": 6})
