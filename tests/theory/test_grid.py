"""The grid of simulated steps: validation, scaling factors, and the exponent of a table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rora_theory import InputError
from rora_theory.theory.grid import StepGrid, fit_exponent


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": ()}, "--ranks.* 0"),
        ({"rules": ("loar",)}, "--rules.*'loar'"),
        ({"rules": (-40.0,)}, "1e-18 to 1e18"),
        ({"optimizers": ("lion",)}, "--optimizers.*'lion'"),
        ({"inits": ("xavier",)}, "--inits.*'xavier'"),
        ({"alpha": -1.0}, r"--alpha.* -1\.0"),
        ({"alpha": 1e300}, r"--alpha 1e\+300 and --lr 0.0001 give gamma 1.0e\+300"),
        ({"lr": 0.0}, r"--lr.* 0\.0"),
        ({"draws": 1}, "--draws.* 1"),
        ({"draws": 2 * 10**9}, "--draws.*2000000000"),
        ({"relative_error": -0.1}, r"--relative-error.* -0\.1"),
        ({"relative_error": 1e-9}, "--relative-error.*1e-09"),
        ({"seed": -1}, "--seed.* -1"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StepGrid(**settings)


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
