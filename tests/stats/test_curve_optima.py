"""Estimators of best rates from whole curves: exact on parabolas, better than three points with noise."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rora_theory.stats.curve_optima import (
    quadratic_optima,
    registration_shifts,
    whole_curve_log2_rates,
)
from rora_theory.stats.rate_curves import Curve, log2_rates

RATES = 10 ** (np.arange(-18, -9) / 4)


def curve(best: float, *, noise: float = 0.0, seed: int = 0, seeds: int = 3, skew: float = 0.0) -> Curve:
    """Return exp(0.02 (x + skew x^3)^2) times lognormal noise, where x is the distance from the best rate in
    octaves.
    """
    random = np.random.default_rng(seed)
    x = np.log2(RATES / best)
    losses = np.exp(0.02 * (x + skew * x**3) ** 2 + noise * random.normal(size=(seeds, len(RATES))))
    return Curve("adamw", "both", "lora", 1.0, 8, 1.0, RATES, losses, None, tuple(range(seeds)))


def test_a_parabola_is_fitted_exactly_and_diverged_runs_are_left_out() -> None:
    exact = curve(3e-4)
    np.testing.assert_allclose(quadratic_optima(exact), math.log2(3e-4), atol=1e-9)
    exact.losses[:, -1] = np.inf
    np.testing.assert_allclose(quadratic_optima(exact), math.log2(3e-4), atol=1e-9)


def test_a_curve_without_a_minimum_has_no_quadratic_optimum() -> None:
    concave = curve(3e-4)
    assert np.isnan(quadratic_optima(Curve(*list(vars(concave).values())[:7], 1 / concave.losses))).all()


def test_registration_finds_the_shift_of_a_skewed_curve() -> None:
    first, second = curve(1e-3, skew=0.02), curve(2e-4, skew=0.02)
    # Curves interpolated at other points of the same shape: within a twentieth of a grid step of 0.83 octaves.
    np.testing.assert_allclose(registration_shifts(first, second), math.log2(0.2), atol=0.05)
    np.testing.assert_allclose(registration_shifts(second, first), -math.log2(0.2), atol=0.05)


@pytest.mark.parametrize("octaves", [0.05, 0.06, 0.07, -0.93])
def test_registration_is_finer_than_its_steps(octaves) -> None:
    """The losses are the same at rates that differ by a factor; shifts are tried every 0.04 octaves."""
    first = curve(1e-3, skew=0.02)
    second = replace(first, rates=first.rates * 2**octaves)
    np.testing.assert_allclose(registration_shifts(first, second), octaves, atol=1e-3)


def test_whole_curves_have_a_smaller_spread_than_three_points() -> None:
    """Over 200 noisy pairs the ratio of two deviations is known to 5%, so 1/1.4 is 6 standard errors from 1."""
    first, second = (curve(best, noise=0.01, seed=seed, seeds=200) for seed, best in enumerate((1e-3, 3e-4)))
    vertex = np.std(log2_rates(second) - log2_rates(first))
    assert np.std(quadratic_optima(second) - quadratic_optima(first)) < vertex / 1.4
    assert np.std(registration_shifts(first, second)) < vertex / 1.4


def test_a_seed_that_diverged_at_most_rates_has_no_optimum() -> None:
    first, second = curve(1e-3), curve(1e-4)
    second.losses[0, 1:] = np.inf
    for shifts in (quadratic_optima(second), registration_shifts(first, second)):
        assert np.isnan(shifts).tolist() == [True, False, False]


def test_a_fit_without_a_minimum_ends_at_its_lower_end() -> None:
    """The reflected parabola is lowest at the end that is farther from its top."""
    for best, end in ((3e-4, RATES[-1]), (3e-3, RATES[0])):
        exact = curve(best)
        concave = Curve(*list(vars(exact).values())[:7], 1 / exact.losses)
        np.testing.assert_allclose(quadratic_optima(concave, allows_ends=True), math.log2(end), atol=1e-9)


def test_the_interval_of_a_whole_curve_covers_the_truth() -> None:
    """Over 200 sweeps of three seeds a coverage of 95% has a standard error of 1.5%."""
    estimates = [whole_curve_log2_rates((1.0,), curve(1e-3, noise=0.01, seed=seed)) for seed in range(200)]
    covered = np.mean([abs(logs.value - math.log2(1e-3)) <= logs.half_width() for logs in estimates])
    assert 0.89 <= covered <= 0.99
