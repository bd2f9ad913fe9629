"""Regret of a policy: known curves, lower bounds at the grid's end, errors and the band of the tuned optimum."""

import math

import numpy as np
import pytest

from rora_theory.stats.rate_curves import Curve
from rora_theory.stats.regret import regret

RATES = 10 ** (np.arange(-20, -7) / 4)


def curve(best: float, *, seeds: int = 3, curvature: float = 0.1, shift: float = 0.0, noise: float = 0.0) -> Curve:
    """Return the loss 1 + curvature log10(rate / best)^2; levels and best rates differ between seeds."""
    random = np.random.default_rng(5)
    optima = best * 10 ** (shift * (np.arange(seeds) - (seeds - 1) / 2))
    losses = 1 + curvature * np.log10(RATES / optima[:, None]) ** 2 + 0.05 * np.arange(seeds)[:, None]
    sizes = 1 + noise * random.normal(size=(200, 1, 1))
    return Curve("adamw", "both", "lora", 1.0, 8, 1.0, RATES, losses, losses * sizes, tuple(range(seeds)))


def test_the_regret_of_a_known_curve_is_the_height_above_its_minimum() -> None:
    tuned, target = curve(1e-3), curve(1e-4)
    for factor, expected in ((1.0, 0.1), (0.1, 0.0), (0.1 * 10**0.5, 0.025), (0.01, 0.1)):
        cost = regret(tuned, target, lambda rate, factor=factor: rate * factor)
        assert cost.nats.value == pytest.approx(expected, abs=2e-3)
        assert cost.learning_rate == pytest.approx(1e-3 * factor, rel=1e-6)
        assert cost.per_cent == pytest.approx(100 * cost.nats.value / 1.05, rel=1e-6)
        assert not cost.is_lower_bound


def test_a_regret_is_never_negative() -> None:
    tuned, target = curve(1e-3), curve(1.3e-4)
    costs = [regret(tuned, target, lambda rate, at=at: at) for at in np.geomspace(5e-5, 5e-4, 11)]
    assert min(cost.nats.value for cost in costs) >= -1e-12


def test_a_rate_outside_the_grid_or_beside_a_diverged_run_gives_a_lower_bound() -> None:
    tuned, target = curve(1e-3), curve(1e-4)
    beyond = regret(tuned, target, lambda rate: 1.0)
    assert beyond.is_lower_bound
    assert beyond.nats.value == pytest.approx(float(np.mean(target.losses[:, -1])) - 1.05, abs=1e-9)
    losses, is_lower_bound = one_seed(1.2, 1.0, 1.1, np.inf).losses_at(np.array([5.0, 4.0]))
    assert losses.tolist() == [pytest.approx([1.1, 1.1])]
    assert is_lower_bound.tolist() == [True, False]
    losses, is_lower_bound = one_seed(np.nan, np.inf, 1.1, np.inf).losses_at(np.array([1.0, 4.0]))
    assert losses.tolist() == [pytest.approx([1.1, 1.1])]
    assert is_lower_bound.tolist() == [True, False]


def one_seed(*losses: float) -> Curve:
    """Return the curve of one seed at rates of 1, 2, 4 and 8."""
    return Curve("adamw", "both", "lora", 1.0, 8, 1.0, 2.0 ** np.arange(4), np.array([losses]), seeds=(0,))


def test_seeds_of_one_shape_have_no_error_and_seeds_with_other_optima_do() -> None:
    same, apart = (regret(curve(1e-3), curve(10**-3.92, shift=shift), float) for shift in (0.0, 0.3))
    assert same.nats.error < 1e-12
    # Heights at 1e-3 less those at 1e-4, the rate with the lowest mean loss over seeds.
    optima = np.array([-4.22, -3.92, -3.62])
    heights = 0.1 * ((-3 - optima) ** 2 - (-4 - optima) ** 2)
    assert apart.nats.value == pytest.approx(heights.mean(), rel=1e-2)
    assert apart.nats.error == pytest.approx(heights.std(ddof=1) / math.sqrt(3), rel=1e-2)


def test_the_band_covers_the_interval_of_the_tuned_optimum() -> None:
    known, uncertain = (regret(curve(1e-3, shift=shift), curve(1e-4), float) for shift in (0.0, 0.1))
    assert known.high - known.low == pytest.approx(0.0, abs=1e-9)
    # Three seeds 0.1 decades apart: 4.303 * 0.1 / sqrt(3) = 0.248 decades to either side.
    assert uncertain.low == pytest.approx(0.1 * (1 - 0.248) ** 2, abs=4e-3)
    assert uncertain.high == pytest.approx(0.1 * (1 + 0.248) ** 2, abs=4e-3)


def test_the_tuned_and_the_target_curve_are_not_interchangeable() -> None:
    tuned, target = curve(1e-3, curvature=0.1), curve(1e-4, curvature=0.4)
    forward, reversed_ = regret(tuned, target, float), regret(target, tuned, float)
    assert forward.nats.value == pytest.approx(0.4, abs=5e-3)
    assert reversed_.nats.value == pytest.approx(0.1, abs=5e-3)


def test_losses_at_several_rates_are_those_at_each() -> None:
    target = curve(1e-4)
    rates = np.array([1e-6, 3e-5, RATES[4], 1e-4, 2e-4, 1.0])
    losses, is_lower_bound = target.losses_at(rates)
    for position, rate in enumerate(rates):
        one, bound = target.losses_at(np.array([rate]))
        assert losses[:, position].tolist() == pytest.approx(one[:, 0].tolist(), rel=1e-12)
        assert is_lower_bound[position] == bound[0]
    assert is_lower_bound.tolist() == [True, False, False, False, False, True]
