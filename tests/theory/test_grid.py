"""The grid of adapters: what it refuses, each rule's gamma, and the exponent of a table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rora_theory import InputError
from rora_theory.theory.grid import StepGrid, exponent_of


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranks": ()}, "--ranks has 0 values"),
        ({"ranks": (0,)}, "--ranks: rank is 0"),
        ({"ranks": (4, 4)}, "--ranks repeats a value"),
        ({"rules": ("loar",)}, "--rules has 'loar'"),
        ({"rules": ("rora", 0.5)}, "--rules has one rule twice"),
        ({"rules": (-40.0,)}, "accepted are 1e-18 to 1e18"),
        ({"optimizers": ("lion",)}, "--optimizers has 'lion'; accepted are sgd, adam"),
        ({"inits": ("normal", "normal")}, "--inits repeats a value"),
        ({"inits": ("xavier",)}, "--inits has 'xavier'"),
        ({"alpha": -1.0}, "--alpha is -1.0"),
        ({"alpha": float("nan")}, "--alpha is nan"),
        ({"alpha": 1e300}, r"--alpha 1e\+300 and --lr 0.0001 give gamma 1.0e\+300"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"draws": 1}, "--draws is 1; accepted is an integer of 2 or more"),
        ({"draws": 2 * 10**9}, "--draws is 2000000000; accepted are at most 1,000,000,000"),
        ({"relative_error": -0.1}, "--relative-error is -0.1"),
        ({"relative_error": 1e-9}, "--relative-error is 1e-09; accepted is 5e-05 or more"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_what_is_out_of_range_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        StepGrid(**settings)


def test_each_rule_has_its_gamma() -> None:
    grid = StepGrid(rules=("lora", "rora", 0.25), alpha=8.0)
    assert dict(grid.scalings(16)) == pytest.approx({"lora": 0.5, "rora": 2.0, 0.25: 4.0})


@pytest.mark.parametrize("order", [sorted, lambda ranks: ranks[::-1]])
def test_a_table_s_exponent_is_its_power(order: Callable[[list[int]], list[int]]) -> None:
    """Its error is that of the estimates alone: of two, the root of their squares over the logarithms' distance."""
    ranks = np.array(order([4, 64]))
    table = pd.DataFrame({"rank": ranks, "estimate": 3.0 * ranks**-0.5, "exact": 2.0 * ranks**0.25})
    found = exponent_of(table.assign(standard_error=0.1 * table["estimate"]))
    assert found == pytest.approx({"slope": -0.5, "standard_error": 0.1 * 2**0.5 / np.log(16), "exact": 0.25})
    assert np.isnan(list(exponent_of(table.assign(standard_error=0.1)[:1]).values())).all()
