"""Summary of the regret of policies over pairs of measured conditions."""

import pandas as pd
import pytest

from rora_theory.evidence.policies import ORIGINS
from rora_theory.lab.sweep.regret import regret_by_policy


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
