"""Regret of policies: the rate of each, and the summary over pairs."""

import pandas as pd
import pytest

from rora_theory.advice.best_rate import Run
from rora_theory.lab.sweep.regret import ORIGINS, policies, regret_by_policy


def pair(regret: float, policy: str = "first step", **changes: object) -> dict[str, object]:
    row = {"changed": "gain", "policy": policy, "regret": regret, "standard_error": regret / 10, "high": 2 * regret}
    return row | {"is_lower_bound": False, "is_edge": False} | changes


def test_pairs_with_a_best_rate_at_the_end_of_a_grid_are_not_counted() -> None:
    """Their lowest loss is unknown; a rate outside the measured ones counts, and is named as a lower bound."""
    costs = pd.DataFrame(
        [
            pair(0.1),
            pair(0.5, high=0.7, is_lower_bound=True),
            pair(0.3, high=0.9),
            pair(8.0, is_edge=True),
            pair(0.2, policy="keep the rate"),
            pair(0.4, changed="rank"),
            pair(0.6, policy="advice", is_edge=True),
        ]
    )
    summary = regret_by_policy(costs)
    assert list(zip(summary["changed"], summary["policy"], strict=True)) == [
        ("gain", "first step"),
        ("gain", "keep the rate"),
        ("rank", "first step"),
    ]
    row = summary.iloc[0]
    assert (row["pairs"], row["lower_bounds"], row["constants"]) == (3, 1, ORIGINS["first step"])
    figures = row[["median", "mean", "largest", "largest_error", "largest_over_interval"]].tolist()
    assert figures == pytest.approx([0.3, 0.3, 0.5, 0.05, 0.9])
    assert regret_by_policy(pd.DataFrame()).empty
    assert regret_by_policy(costs[costs["is_edge"]]).empty


def test_the_rates_of_the_policies() -> None:
    """From G 16 to 64 at 100 to 400 steps: powers of the growth 4, and of the steps for the last."""
    by_name = policies({90: 0.0, 1000: 1e9}, crossing_distance=1e9)
    old, new = Run(8, 16.0, 100), Run(8, 64.0, 400)
    rates = {name: by_name[name](old, new, 1e-3) for name in by_name if name != "advice"}
    expected = {"keep the rate": 1.0, "first step": 1 / 4, "square root": 1 / 2, "G^-0.75": 4**-0.75}
    expected |= {"displacement": 1 / 4, "displacement and steps": 1 / 8, "constant gradient": 1 / 4}
    assert rates == pytest.approx({name: 1e-3 * factor for name, factor in expected.items()})
    # The constant is that of the nearest number of steps in log.
    late = Run(8, 16.0, 400)
    assert by_name["displacement"](late, Run(8, 64.0, 400), 1e-3) > 4e-4
    assert "displacement" not in policies({})
    assert "constant gradient" not in policies({1: 1.0})
