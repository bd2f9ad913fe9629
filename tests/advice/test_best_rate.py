"""The law of the best rate: a sum of differences, whose spreads add in quadrature."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory.advice.best_rate import QUANTILE, Run, best_rate_change, transfer_rate
from rora_theory.advice.constants import CONSTANTS, SCHEDULE_FACTORS

OLD = Run(16, 32.0, 256, "constant", 8)

runs = st.builds(
    Run,
    rank=st.integers(1, 512),
    gain=st.floats(1.0, 1e3),
    steps=st.integers(16, 10**5),
    schedule=st.sampled_from(["constant", "cosine"]),
    batch_size=st.integers(1, 512),
)


@given(runs, runs, runs)
def test_changes_add_up(first: Run, second: Run, third: Run) -> None:
    """A path over a third run has the direct change, and the way back the opposite one."""
    direct, there, on = (best_rate_change(*pair) for pair in ((first, third), (first, second), (second, third)))
    assert there.mean + on.mean == pytest.approx(direct.mean, abs=1e-9)
    assert best_rate_change(third, first).mean == pytest.approx(-direct.mean, abs=1e-9)
    assert best_rate_change(third, first).spread == pytest.approx(direct.spread, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("rank_exponent", Run(128, 32.0, 256, "constant", 8)),
        ("steps_exponent", Run(16, 32.0, 2048, "constant", 8)),
        ("batch_exponent", Run(16, 32.0, 256, "constant", 64)),
    ],
)
def test_each_power_law_stands_alone(name, new) -> None:
    change, growth, constant = best_rate_change(OLD, new), math.log(8), CONSTANTS[name]
    assert change.mean == pytest.approx(constant.value * growth)
    assert change.spread == pytest.approx(math.hypot(constant.spread * growth, CONSTANTS["pair"].spread))


def test_the_gain_follows_the_displacement_law() -> None:
    """K / G of 6 and 2 have rho of 2 and 1, so that the factor is 10 * 3 / (30 * 2)."""
    change = best_rate_change(Run(8, 10.0), Run(8, 30.0), displacement_constant=60.0)
    assert math.exp(change.mean) == pytest.approx(0.5)
    assert change.spread == pytest.approx(
        math.hypot(CONSTANTS["gain_exponent"].spread * math.log(3), CONSTANTS["pair"].spread)
    )


def test_cosine_decay_takes_a_higher_peak_rate() -> None:
    change = best_rate_change(OLD, Run(16, 32.0, 256, "cosine", 8))
    assert math.exp(change.mean) == pytest.approx(SCHEDULE_FACTORS["cosine"].value)
    assert SCHEDULE_FACTORS["cosine"].value > 1.5


def test_the_range_is_central_and_holds_nine_tenths() -> None:
    rates, change = transfer_rate(1e-3, OLD, Run(128, 32.0)), best_rate_change(OLD, Run(128, 32.0))
    assert rates.low * rates.high == pytest.approx(rates.best**2)
    assert math.log(rates.high / rates.best) == pytest.approx(QUANTILE * change.spread)
    assert math.erf(QUANTILE / math.sqrt(2)) == pytest.approx(0.9)


def test_an_unchanged_run_keeps_the_rate_to_the_last_digit() -> None:
    assert transfer_rate(1e-3, OLD, OLD) == (1e-3, 1e-3, 1e-3)


@pytest.mark.parametrize("new", [Run(16, 32.0), Run(16, 32.0, 256, "linear", 8)])
def test_what_is_not_known_or_measured_does_not_move_the_rate(new) -> None:
    assert transfer_rate(1e-3, OLD, new) == (1e-3, 1e-3, 1e-3)
