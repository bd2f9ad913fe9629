"""Slopes over seeds and the band they must lie in: what is flat passes, what is not or is unsettled fails."""

import math

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.stats import slopes
from rora_theory.stats.slopes import SeedFit

RANKS = [4, 16, 64, 256]


def powers(exponents, noise=0.0, seed=0):
    """r^e for each seed's exponent, with noise in the logarithm."""
    random = np.random.default_rng(seed)
    lines = np.log(RANKS) * np.asarray(exponents)[:, None]
    return np.exp(lines + noise * random.normal(size=lines.shape))


def test_power_law_is_found():
    fit = slopes.seed_fit(RANKS, powers([0.3, 0.5, 0.7]))
    assert fit.slope == pytest.approx(0.5, abs=1e-12)
    assert fit.standard_error == pytest.approx(0.2 / math.sqrt(3), rel=1e-12)


def test_slope_is_numpys():
    y = powers([0.2], noise=0.3)
    assert slopes.seed_fit(RANKS, y).slope == pytest.approx(np.polyfit(np.log(RANKS), np.log(y[0]), 1)[0], abs=1e-12)


def test_interval_covers():
    """The 95% interval of the mean slope covers the truth in 95% of experiments; 2000 of them, |z| < 4."""
    fits = [slopes.seed_fit(RANKS, powers([0.4] * 4, noise=0.2, seed=s)) for s in range(2000)]
    covered = np.mean([abs(fit.slope - 0.4) <= fit.half_width(0.95) for fit in fits])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize(
    ("fit", "verdict"),
    [
        (SeedFit(0.0, 0.01, 5), "flat"),
        (SeedFit(0.09, 0.01, 5), "undecided"),
        (SeedFit(0.2, 0.01, 5), "grows"),
        (SeedFit(-0.2, 0.01, 5), "shrinks"),
        (SeedFit(0.0, 0.5, 5), "undecided"),
        (SeedFit(0.0, math.inf, 1), "undecided"),
    ],
)
def test_verdicts(fit, verdict):
    assert slopes.trend(fit, band=0.1) == verdict


def test_two_ranks_are_a_slope():
    fit = slopes.seed_fit([2, 8], np.array([[1.0, 4.0], [1.0, 4.0]]))
    assert fit == (pytest.approx(1.0), pytest.approx(0, abs=1e-12), 2, 0.0, 0.0)
    assert slopes.trend(SeedFit(0.25, 0.0, 2), band=0.25) == "flat", "the band's own edge is in it"


def test_assert_flat():
    flat = powers([0.01, -0.01, 0.02])
    assert slopes.assert_flat(RANKS, flat).slope == pytest.approx(0.02 / 3)
    with pytest.raises(AssertionError, match=r"the loss.*grows.*\+0\.500"):
        slopes.assert_flat(RANKS, powers([0.5, 0.51, 0.49]), what="the loss")
    with pytest.raises(AssertionError, match="undecided"):
        slopes.assert_flat(RANKS, flat[:1])


@pytest.mark.parametrize(
    ("y", "departure", "verdict"),
    [
        ([1, 10, 1], 2 / 3 * math.log(10) / math.log(16), "undecided"),  # no slope, and not flat
        ([1, 10, 2], None, "undecided"),  # a slope of 1/4, and no growth
        ([1, 1.1, 1], 2 / 3 * math.log(1.1) / math.log(16), "flat"),
        ([1, 3, 4], None, "grows"),
    ],
)
def test_what_the_curve_does_beside_its_slope_counts(y, departure, verdict):
    """Three ranks and identical seeds: the spread over seeds does not show the departure from the line."""
    fit = slopes.seed_fit(RANKS[:3], np.tile(np.array(y, float), (3, 1)))
    assert slopes.trend(fit) == verdict
    if departure is not None:
        assert fit.slope == pytest.approx(0.0, abs=1e-12)
        assert fit.departure == pytest.approx(departure, rel=1e-9)
    if verdict != "flat":
        with pytest.raises(AssertionError, match=f"{verdict}.*departure"):
            slopes.assert_flat(RANKS[:3], np.tile(np.array(y, float), (3, 1)))


def test_the_departure_is_of_the_seeds_mean_from_the_line():
    """Logs of 0, 3, 2 and 1, 2, 6 in units of ln 2, at 2, 4, 6: the mean 1/2, 5/2, 4 has the slope 7/8 and leaves 1/6
    of the range of 4."""
    fit = slopes.seed_fit(RANKS[:3], np.array([[1.0, 8.0, 4.0], [2.0, 4.0, 64.0]]))
    assert (fit.slope, fit.departure) == pytest.approx((7 / 8, 1 / 24))


def test_the_band_and_the_confidence_decide():
    assert [slopes.trend(SeedFit(0.0, 0.05, 3), 0.1, confidence) for confidence in (0.5, 0.95)] == ["flat", "undecided"]
    y = powers([0.06, -0.06, 0.0])
    slopes.assert_flat(RANKS, y, confidence=0.5)
    slopes.assert_flat(RANKS, y, band=0.3)
    with pytest.raises(AssertionError, match="undecided"):
        slopes.assert_flat(RANKS, y)


def test_the_departure_is_of_the_band():
    """The departure is limited by the band for a flat trend, and by the slope for a growing one."""
    flat, growing = SeedFit(0.0, 0.0, 3), SeedFit(-0.5, 0.0, 3)
    assert [slopes.trend(flat._replace(departure=d), band=0.25) for d in (0.25, 0.26)] == ["flat", "undecided"]
    assert [slopes.trend(growing._replace(departure=d)) for d in (0.5, 0.51)] == ["shrinks", "undecided"]


@pytest.mark.parametrize("y", [np.ones((2, 3)), np.zeros((2, 4)), np.full((2, 4), np.nan)])
def test_bad_values(y):
    with pytest.raises(InputError, match="y must"):
        slopes.seed_fit(RANKS, y)


@pytest.mark.parametrize("x", [[0, 4, 16, 64], [-4, 4, 16, 64], [4, 16, 64, math.inf], [4, 16, 64, math.nan]])
@pytest.mark.parametrize("fit", [slopes.seed_fit, slopes.seed_slopes])
def test_bad_ranks(fit, x):
    with pytest.raises(InputError, match="x must"):
        fit([float(value) for value in x], np.ones((2, 4)))


def test_one_rank_is_no_slope():
    with pytest.raises(InputError, match=r"x must.*4\.0, 4\.0"):
        slopes.seed_fit([4, 4], np.ones((2, 2)))
