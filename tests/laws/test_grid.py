"""The grid of simulated steps: scaling factors, and the exponent of a table."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from rora_theory.laws.grid import StepGrid, exponent_table


def test_each_rule_has_its_gamma() -> None:
    grid = StepGrid(rules=("lora", "rora", 0.25), alpha=8.0)
    assert dict(grid.scalings(16)) == pytest.approx({"lora": 0.5, "rora": 2.0, 0.25: 4.0})


@pytest.mark.parametrize("order", [sorted, lambda ranks: ranks[::-1]])
def test_the_exponent_of_each_curve_is_its_power_in_each_range(order: Callable[[list[int]], list[int]]) -> None:
    """With two points the error is the root sum of squares of the relative errors over the distance in log rank."""
    ranks = np.array(order([4, 64, 256]))
    curves = [
        pd.DataFrame({"rank": ranks, "estimate": 3.0 * ranks**power, "exact": 2.0 * ranks**0.25, "rule": rule})
        for rule, power in (("lora", -0.5), ("rora", 1.0))
    ]
    table = pd.concat(curves)
    table = table.assign(standard_error=0.1 * table["estimate"], init="normal")
    fits = exponent_table(table, ["rule", "init"], [[4, 64], [64]]).to_dict("records")
    assert [(fit["rule"], fit["low"], fit["high"]) for fit in fits] == [
        ("lora", 4, 64),
        ("lora", 64, 64),
        ("rora", 4, 64),
        ("rora", 64, 64),
    ]
    for fit, power in zip(fits[::2], (-0.5, 1.0), strict=True):
        figures = [fit[name] for name in ("slope", "standard_error", "exact")]
        assert figures == pytest.approx([power, 0.1 * 2**0.5 / np.log(16), 0.25])
    assert all(np.isnan(fit[name]) for fit in fits[1::2] for name in ("slope", "standard_error", "exact"))
    assert exponent_table(table, ["rule", "init"], []).empty
