"""Slopes over seeds and the band around zero: a flat case passes, others and undecided ones fail."""

import math

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.stats import slopes
from rora_theory.stats.slopes import SlopeFit

RANKS = [4, 16, 64, 256]


def powers(exponents, noise=0.0, seed=0):
    """Return r^e for each seed's exponent, with noise in the logarithm."""
    random = np.random.default_rng(seed)
    lines = np.log(RANKS) * np.asarray(exponents)[:, None]
    return np.exp(lines + noise * random.normal(size=lines.shape))


def test_the_slope_is_the_mean_over_seeds_of_least_squares():
    y = powers([0.3, 0.5, 0.7], noise=0.3)
    by_seed = [np.polyfit(np.log(RANKS), np.log(row), 1)[0] for row in y]
    fit = slopes.seed_fit(RANKS, y)
    assert (fit.value, fit.n) == (pytest.approx(np.mean(by_seed), abs=1e-12), 3)
    assert fit.error == pytest.approx(np.std(by_seed, ddof=1) / math.sqrt(3), rel=1e-9)
    pair = slopes.seed_fit([2, 8], np.array([[1.0, 4.0], [1.0, 4.0]]))
    assert (pair.value, pair.n, pair.bound) == (pytest.approx(1.0), 2, 0.0)
    assert (pair.error, pair.departure) == (pytest.approx(0, abs=1e-12), 0.0), "two points are on a line"


@pytest.mark.parametrize(
    ("fit", "options", "verdict"),
    [
        (SlopeFit(0.0, 0.01, 5, "seeds"), {}, "flat"),
        (SlopeFit(0.09, 0.01, 5, "seeds"), {}, "undecided"),
        (SlopeFit(0.2, 0.01, 5, "seeds"), {}, "grows"),
        (SlopeFit(-0.2, 0.01, 5, "seeds"), {}, "shrinks"),
        (SlopeFit(0.0, 0.5, 5, "seeds"), {}, "undecided"),
        (SlopeFit(0.0, math.inf, 1, "seeds"), {}, "undecided"),
        (SlopeFit(0.25, 0.0, 2, "seeds"), {"band": 0.25}, "flat"),  # the band's end belongs to it
        (SlopeFit(0.0, 0.05, 3, "seeds"), {}, "undecided"),
        # The departure is limited by the band for a flat trend, and by the slope for a growing one.
        (SlopeFit(0.0, 0.0, 3, "seeds", departure=0.25), {"band": 0.25}, "flat"),
        (SlopeFit(0.0, 0.0, 3, "seeds", departure=0.26), {"band": 0.25}, "undecided"),
        (SlopeFit(-0.5, 0.0, 3, "seeds", departure=0.5), {}, "shrinks"),
        (SlopeFit(-0.5, 0.0, 3, "seeds", departure=0.51), {}, "undecided"),
    ],
)
def test_trends(fit, options, verdict):
    assert slopes.trend(fit, **options) == verdict


def test_trends_of_fitted_slopes():
    flat, uncertain = powers([0.01, -0.01, 0.02]), powers([0.06, -0.06, 0.0])
    fit = slopes.seed_fit(RANKS, flat)
    assert (fit.value, slopes.trend(fit)) == (pytest.approx(0.02 / 3), "flat")
    growing = slopes.seed_fit(RANKS, powers([0.5, 0.51, 0.49]))
    assert (growing.value, slopes.trend(growing)) == (pytest.approx(0.5), "grows")
    assert slopes.trend(slopes.seed_fit(RANKS, flat[:1])) == "undecided", "one seed has no error"
    bent = slopes.seed_fit(RANKS[:3], np.tile([1.0, 10.0, 1.0], (3, 1)))
    assert bent.departure == pytest.approx(2 / 3 * math.log(10) / math.log(RANKS[2] / RANKS[0]))
    assert slopes.trend(bent) == "undecided"
    assert slopes.trend(slopes.seed_fit(RANKS, uncertain), band=0.3) == "flat"
    assert slopes.trend(slopes.seed_fit(RANKS, uncertain)) == "undecided"


def test_the_departure_is_of_the_seeds_mean_from_the_line():
    """The logs are 0, 3, 2 and 1, 2, 6 in units of ln 2, at 2, 4, 6.

    The mean 1/2, 5/2, 4 has the slope 7/8 and departs by 1/6 of the range of 4.
    """
    fit = slopes.seed_fit(RANKS[:3], np.array([[1.0, 8.0, 4.0], [2.0, 4.0, 64.0]]))
    assert (fit.value, fit.departure) == pytest.approx((7 / 8, 1 / 24))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (RANKS, np.ones((2, 3)), r"y must.*\(2, 3\).* 0 other"),
        (RANKS, np.zeros((2, 4)), "y must.* 8 other"),
        (RANKS, np.full((2, 4), np.nan), "y must.* 8 other"),
        ([0.0, 4.0, 16.0, 64.0], np.ones((2, 4)), "x must"),
        ([4.0, 16.0, 64.0, math.inf], np.ones((2, 4)), "x must"),
        ([4.0, 16.0, 64.0, math.nan], np.ones((2, 4)), "x must"),
        ([4, 4], np.ones((2, 2)), r"x must.*4\.0, 4\.0"),
    ],
)
def test_values_that_have_no_slope(x, y, message):
    with pytest.raises(InputError, match=message):
        slopes.seed_fit(x, y)


def test_interval_covers():
    """In 2000 experiments the 95% interval of the mean slope covers the truth in 95%, with |z| < 4."""
    fits = [slopes.seed_fit(RANKS, powers([0.4] * 4, noise=0.2, seed=s)) for s in range(2000)]
    covered = np.mean([abs(fit.value - 0.4) <= fit.half_width(0.95) for fit in fits])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)
