"""Running moments: exact sums, right standard errors, and the exponent of a power law."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rora_theory.stats.moments import Moments, _add_double_double, standard_scores, threshold
from rora_theory.stats.slopes import log_log_fit


def exact_moments(values: list[float]) -> tuple[Fraction, Fraction]:
    numbers = [Fraction(value) for value in values]
    return sum(numbers) / len(numbers), sum(number**2 for number in numbers) / len(numbers)


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=60), st.integers(1, 7))
def test_moments_match_exact_arithmetic(values: list[float], block: int) -> None:
    empty = np.array([])
    moments = Moments().add(empty)
    for start in range(0, len(values), block):
        moments = moments.add(np.array(values[start : start + block])).add(empty)
    mean, second = exact_moments(values)
    scale = max(map(abs, values)) + 1e-30
    assert moments.count == len(values)
    assert moments.mean.value == pytest.approx(float(mean), rel=1e-13, abs=1e-13 * scale)
    assert moments.second_moment.value == pytest.approx(float(second), rel=1e-12, abs=1e-13 * scale**2)
    variance = float((second - mean**2) * len(values) / (len(values) - 1))
    assert moments.variance.value == pytest.approx(variance, rel=1e-9, abs=1e-12 * scale**2)


@pytest.mark.slow
def test_a_billion_draws_keep_float64_accuracy() -> None:
    """The sums of 10^5 blocks of 10^4 draws are known exactly; plain float64 running sums would drift by 1e-12.

    The block is fed by its own sums (added 10^5 times), so that the test is quick; the additions are the real ones.
    """
    block = Moments().add(np.array([0.1, 0.7, -0.3, 1e-3] * 2500))
    sums, rests = list(block.sums), list(block.low_sums)
    for _ in range(10**5 - 1):
        for n in range(4):
            sums[n], rests[n] = _add_double_double(sums[n], rests[n], block.sums[n])
    for n in range(4):
        exact = Fraction(block.sums[n]) * 10**5
        assert abs(Fraction(sums[n]) + Fraction(rests[n]) - exact) <= abs(exact) * Fraction(1, 2**90)
    total = Moments(10**9, block.shift, tuple(sums), tuple(rests))
    assert total.second_moment.value == pytest.approx(block.second_moment.value, rel=1e-15)


def test_moments_restored_from_json_continue_exactly() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    first = Moments().add(values[:300]).add(values[300:])
    again = Moments.from_json(json.loads(json.dumps(Moments().add(values[:300]).to_json()))).add(values[300:])
    assert first == again


def test_errors_of_a_small_sample() -> None:
    """They are s / sqrt(n) of the values and of their squares, for a sample where n and n - 1 differ by a third."""
    values = np.array([1.0, 2.0, 4.0, 9.0])
    moments = Moments().add(values[:1]).add(values[1:])  # shifted by 1, not by their mean
    names = ("mean", "second_moment", "variance")
    by_hand = [(4.0, values), (25.5, values**2), (38 / 3, (values - 4.0) ** 2)]
    for name, (value, terms) in zip(names, by_hand, strict=True):
        estimate = getattr(moments, name)
        assert (estimate.value, estimate.error) == pytest.approx((value, np.std(terms, ddof=1) / 2), rel=1e-12)
        assert (estimate.n, estimate.over) == (4, "draws")
    for few, expected in ((values[:1], [(1, 0), (1, 0), (0, 0)]), (values[1:3], [(3, 1), (10, 6), (2, 0)])):
        estimates = [getattr(Moments().add(few), name) for name in names]
        assert [(estimate.value, estimate.error) for estimate in estimates] == [
            pytest.approx(figures, rel=1e-12, abs=1e-12) for figures in expected
        ]


@given(st.floats(-2, 2), st.floats(0.1, 10))
def test_exponent_of_a_power_law(slope: float, factor: float) -> None:
    """The error is that of a least-squares slope in the logarithms, whose errors are the relative ones."""
    x = np.array([1, 2, 4, 8, 16.0])
    y, relative = factor * x**slope, np.array([0.01, 0.02, 0.005, 0.03, 0.01])
    fit = log_log_fit(x, y, relative * y)
    lever = np.log(x) - np.log(4.0)
    assert fit.value == pytest.approx(slope, abs=1e-12)
    assert fit.error == pytest.approx(np.linalg.norm(lever * relative) / np.sum(lever**2), rel=1e-9)


def test_threshold() -> None:
    assert threshold(0.05) == pytest.approx(1.959964, abs=1e-6)
    assert threshold(1e-3, 10) == pytest.approx(stats.norm.isf(5e-5), rel=1e-12)


def test_scores_are_differences_from_the_law_in_standard_errors() -> None:
    assert standard_scores([1.1, 1.5], [0.05, 0.25], [1.0, 2.0]) == pytest.approx([2.0, -2.0])
    assert math.isnan(standard_scores([math.nan], [0.1], [1.0])[0])
    assert standard_scores([1.0, 0.9], [0.0, 0.0], [1.0, 1.0]) == [0.0, -math.inf]
    assert standard_scores([0.1 + 0.2], [0.0], [0.3]) == [0.0], "rounding is no difference"


@pytest.mark.parametrize("quantity", ["mean", "second_moment", "variance"])
def test_standard_errors_cover(quantity: str) -> None:
    """Intervals of +-2 s.e. from 4000 skewed samples cover as often as a binomial allows (false-alarm rate 1e-6, two-
    sided).

    The intervals are asymptotic: at n = 2000 exponential draws the skewness of a squared estimate moves coverage by
    less than 1.5 points, which is allowed for; a standard error off by 5% moves it by 0.4 points per percent at first
    and is seen by the ratio below.
    """
    rng = np.random.default_rng(5)
    exact = {"mean": 1.0, "second_moment": 2.0, "variance": 1.0}[quantity]
    estimates, errors = [], []
    for _ in range(4000):
        estimate = getattr(Moments().add(rng.exponential(size=2000)), quantity)
        estimates.append(estimate.value)
        errors.append(estimate.error)
    inside = np.mean(np.abs(np.array(estimates) - exact) <= 2 * np.array(errors))
    nominal = 1 - 2 * stats.norm.sf(2)
    spread = threshold(1e-6) * math.sqrt(nominal * (1 - nominal) / 4000)
    assert nominal - 0.015 - spread <= inside <= nominal + spread
    # The mean square of the errors is the variance of the estimates: chi-square with about 4000 degrees of freedom.
    ratio = np.mean(np.square(errors)) / np.var(estimates)
    assert abs(ratio - 1) <= threshold(1e-6) * math.sqrt(2 / 4000) * 1.5
