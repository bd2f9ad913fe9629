"""Laws of the best rate at one gain: the power law, and three mechanisms in closed cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory.errors import InputError
from rora_theory.laws.rank import cross_talk_factor, rank_factor


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096), st.floats(-1, 1))
def test_the_power_law_composes(first, second, third, exponent) -> None:
    direct = rank_factor(first, third, exponent=exponent)
    path = rank_factor(first, second, exponent=exponent) * rank_factor(second, third, exponent=exponent)
    assert path == pytest.approx(direct, rel=1e-12)


def test_curvature_is_the_minimum_of_the_quadratic_loss() -> None:
    """The rate that minimises -eta S + eta^2 (S^2 l_s + N^2 l_n / r) / 2 on a fine grid, for two modules."""
    signal, cross_talk, curvature, across = np.array([1.0, 2.0]), np.array([3.0, 4.0]), 0.7, 0.35
    crossing_ranks = (cross_talk / signal) ** 2
    rates = np.linspace(1e-4, 2, 400_001)
    best = []
    for rank in (4, 64):
        # Both modules share the rate, and have the same signal relative to their own scale.
        quadratic = np.sum(curvature + across * crossing_ranks / rank) / 2
        best.append(rates[np.argmin(-rates * 2 + rates**2 * quadratic)])
    ratio = [
        cross_talk_factor(rank, crossing_ranks, mechanism="curvature", weight=across / curvature) for rank in (4, 64)
    ]
    assert best[1] / best[0] == pytest.approx(ratio[1] / ratio[0], rel=1e-4)


def test_size_keeps_the_root_mean_square() -> None:
    """Signal and cross-talk add in square: with r* / r = 3 the change is twice its signal."""
    assert cross_talk_factor(8, [24.0], mechanism="size") == pytest.approx(0.5)
    assert cross_talk_factor(8, [0.0], mechanism="size") == 1.0


def test_modules_on_their_own_average_in_logarithms() -> None:
    values = [8.0, 24.0]
    expected = math.sqrt((1 / 2) * (1 / 4))
    assert cross_talk_factor(8, values, mechanism="curvature", by_module=True) == pytest.approx(expected)
    assert cross_talk_factor(8, values, mechanism="curvature") == pytest.approx(1 / 3)


@pytest.mark.parametrize("values", [[], [-1.0], [math.inf]])
def test_crossing_ranks_out_of_range_are_named(values) -> None:
    with pytest.raises(InputError, match="crossing_ranks"):
        cross_talk_factor(8, values, mechanism="size")
