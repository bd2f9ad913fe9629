"""The grid of simulated steps: scaling factors, and the exponent of a table."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from rora_theory.laws.grid import StepGrid, fit_exponent


def test_each_rule_has_its_gamma() -> None:
    grid = StepGrid(rules=("lora", "rora", 0.25), alpha=8.0)
    assert dict(grid.scalings(16)) == pytest.approx({"lora": 0.5, "rora": 2.0, 0.25: 4.0})


@pytest.mark.parametrize("order", [sorted, lambda ranks: ranks[::-1]])
def test_a_table_s_exponent_is_its_power(order: Callable[[list[int]], list[int]]) -> None:
    """With two points the error is the root sum of squares of the relative errors over the distance in log rank."""
    ranks = np.array(order([4, 64]))
    table = pd.DataFrame({"rank": ranks, "estimate": 3.0 * ranks**-0.5, "exact": 2.0 * ranks**0.25})
    fit = fit_exponent(table.assign(standard_error=0.1 * table["estimate"]))
    assert fit == pytest.approx({"slope": -0.5, "standard_error": 0.1 * 2**0.5 / np.log(16), "exact": 0.25})
    assert np.isnan(list(fit_exponent(table.assign(standard_error=0.1)[:1]).values())).all()
