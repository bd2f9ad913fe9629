"""Synthetic sweeps have the planted exponent, spread and correlation."""

import math

import numpy as np
import pytest

from benchmarks.verdict_rules import GRID_STEP, SweepModel, draw_sweeps
from rora_theory.stats.curve_optima import quadratic_optima


def optima(model: SweepModel, count: int, seed: int = 0) -> np.ndarray:
    """Return the fitted log2 of the best rates, by sweep, rank, end and seed."""
    sweeps = draw_sweeps(model, count, np.random.default_rng(seed), draws=2)
    return np.array([[[quadratic_optima(curve) for curve in pair] for pair in pairs] for pairs in sweeps])


def test_optima_have_the_planted_exponent_spread_and_correlation() -> None:
    """For parabolas without noise or records, a mean of 400 differences is known to a twentieth of their deviation."""
    model = SweepModel(-0.7, 16.0, seeds=3, rates=5, record_spread=0.0, noise=0.0, seed_spread=0.1)
    fitted = optima(model, 400)
    first, second = fitted[:, :, 0], fitted[:, :, 1]
    difference = (second - first) / math.log2(16)
    assert np.mean(difference) == pytest.approx(-0.7, abs=5 * np.std(difference) / math.sqrt(difference.size / 2))
    assert np.std(first) == pytest.approx(0.1, rel=0.15)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] == pytest.approx(0.85, abs=0.05)
    assert np.corrcoef(first[:, 0].ravel(), first[:, 1].ravel())[0, 1] == pytest.approx(0.85, abs=0.05)


def test_rates_are_a_grid_around_the_optimum() -> None:
    (((first, second),),) = draw_sweeps(SweepModel(-1.0, 4.0, 2, 4, ranks=1), 1, np.random.default_rng(0), draws=7)
    for curve, optimum in ((first, 0.0), (second, -2.0)):
        np.testing.assert_allclose(np.diff(np.log2(curve.rates)), GRID_STEP, rtol=1e-9)
        assert abs(np.mean(np.log2(curve.rates)) - optimum) <= GRID_STEP / 2
        assert curve.losses.shape == (2, 4)
        assert curve.resampled.shape == (7, 2, 4)


def test_records_are_resampled_as_pairs() -> None:
    """All curves share the resampled records: without other noise the best rates of two curves move together."""
    model = SweepModel(-0.7, 16.0, 2, 5, ranks=1, noise=0.0, seed_spread=0.0, record_correlation=1.0)
    (((first, second),),) = draw_sweeps(model, 1, np.random.default_rng(0), draws=100)
    moves = [quadratic_optima(curve.over_resamples) for curve in (first, second)]
    assert np.std(moves[0]) > 0.05
    assert np.std(moves[1] - moves[0]) < 0.2 * np.std(moves[0])


def test_equal_seeds_draw_equal_sweeps() -> None:
    model = SweepModel(-0.7, 16.0, 2, 3)
    np.testing.assert_allclose(optima(model, 2, 5), optima(model, 2, 5))
    assert not np.allclose(optima(model, 2, 5), optima(model, 2, 6))
