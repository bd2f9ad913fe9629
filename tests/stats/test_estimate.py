"""Estimates with errors: means over seeds, Student's interval, roots and proportions."""

import math

import numpy as np
import pytest
from scipy import stats

from rora_theory.errors import InputError
from rora_theory.stats.estimate import Estimate, jackknife, over_seeds, proportion, square_root
from rora_theory.stats.slopes import SlopeFit


@pytest.mark.parametrize(
    "make", [lambda error, n: Estimate(0.5, error, n, "seeds", 0.25), lambda *a: SlopeFit(0.5, *a, "seeds", 0.25)]
)
def test_half_width_is_students_plus_the_bound(make) -> None:
    assert make(2.0, 5).half_width(0.9) == pytest.approx(2 * stats.t.ppf(0.95, 4) + 0.25)
    assert make(1.0, 1).half_width() == math.inf


def test_one_seed_has_no_interval_and_two_have_a_wide_one() -> None:
    single, pair = over_seeds(np.array([3.0])), over_seeds(np.array([1.0, 3.0]))
    assert (single, single.has_error, single.half_width()) == (Estimate(3.0, math.inf, 1, ""), False, math.inf)
    assert (pair, pair.has_error) == (Estimate(2.0, 1.0, 2, "seeds"), True)
    assert pair.half_width() == pytest.approx(12.706, abs=1e-3)


def test_a_factor_also_multiplies_error_and_bound() -> None:
    assert Estimate(3.0, 0.5, 4, "seeds", 0.2).times(2.0) == Estimate(6.0, 1.0, 4, "seeds", 0.4)


def test_root_error() -> None:
    assert square_root(Estimate(4.0, 0.4, 9, "draws", 0.2)) == Estimate(2.0, 0.1, 9, "draws", 0.05)
    assert square_root(Estimate(0.0, 0.0, 9, "draws", 0.04)) == Estimate(0.0, 0.0, 9, "draws", 0.2)
    # What rounding leaves of a variance of zero.
    assert (
        square_root(Estimate(-1e-18, 0.1, 9, "draws"))
        == square_root(Estimate(0.0, 0.0, 9, "draws"))
        == Estimate(0, 0, 9, "draws")
    )


@pytest.mark.parametrize("n", [1, 2, 8])
def test_a_share_has_the_samples_deviation_inside_and_wilsons_interval_at_the_ends(n) -> None:
    for right in range(n + 1):
        share = proportion(right, n)
        assert (share.value, share.n, share.over) == (right / n, n, "trials")
        if 0 < right < n:
            sample = [1.0] * right + [0.0] * (n - right)
            assert share.error == pytest.approx(np.std(sample, ddof=1) / math.sqrt(n), rel=1e-12)
        else:
            one_sigma = math.erf(math.sqrt(0.5))
            interval = stats.binomtest(right, n).proportion_ci(confidence_level=one_sigma, method="wilson")
            assert share.error == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)


def test_the_jackknife_is_about_the_mean_of_what_is_left() -> None:
    """The spread is around the mean of exp(4), exp(3.5) and exp(1.5), each without one value, not around exp(3)."""
    values = np.array([1.0, 2.0, 6.0])
    estimate = jackknife(lambda indices: math.exp(float(np.mean(values[list(indices)]))), 3, "seeds")
    assert (estimate.value, estimate.n, estimate.over) == (pytest.approx(math.exp(3)), 3, "seeds")
    assert estimate.error == pytest.approx(math.sqrt(2 * np.var(np.exp([4.0, 3.5, 1.5]))))


def test_the_jackknife_of_one_case_has_no_error() -> None:
    """Nothing can be left out: the error is infinite, as for one seed, and not 0."""
    estimate = jackknife(lambda indices: 3.0 + len(indices), 1, "seeds")
    assert (estimate, estimate.has_error) == (Estimate(4.0, math.inf, 1, ""), False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion(9, 8), "successes.* 9"),
        (lambda: proportion(-1, 8), "successes.* -1"),
        (lambda: proportion(0, 0), "n .* 0"),
        (lambda: proportion(0.5, 8), r"successes.* 0\.5"),
        (lambda: jackknife(lambda indices: 0.0, 0, "seeds"), "n .* 0"),
        (lambda: over_seeds(np.array([])), "values.*empty"),
    ],
)
def test_statistics_without_samples_are_refused(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
