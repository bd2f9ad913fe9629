"""Distributions of lora_A. Every bound is five standard errors, a false-alarm rate of 6e-7."""

import jax
import numpy as np
import pytest

from rora_theory.lab.adapters.inits import init_a

LAYERS, P_IN = 4, 512


@pytest.mark.parametrize("rank", [2, 32])
def test_kaiming_uniform_has_variance_a_third_of_one_over_p_in(rank: int) -> None:
    """U(-b, b) with b^2 = 1/p_in: E x^2 = b^2/3 whatever the rank, sd x^2 = 2 b^2 / sqrt(45)."""
    drawn = np.asarray(init_a(jax.random.key(0), "kaiming_uniform", (rank,) * LAYERS, rank, P_IN), np.float64)
    error = 2 / 45**0.5 / P_IN / drawn.size**0.5
    assert abs(np.mean(drawn**2) - 1 / (3 * P_IN)) < 5 * error
    assert abs(np.mean(drawn**2) - 2 / P_IN) > 50 * error  # He's law for ReLU would fail
    assert abs(np.mean(drawn)) < 5 * (1 / (3 * P_IN)) ** 0.5 / drawn.size**0.5
    bound = P_IN**-0.5
    assert 0.99 * bound < np.abs(drawn).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("rank", [2, 32])
def test_gaussian_has_variance_one_over_rank_squared(rank: int) -> None:
    """N(0, 1/r^2), times r: E x^2 = 1, sd x^2 = sqrt(2); E x^4 = 3, sd x^4 = sqrt(96)."""
    drawn = rank * np.asarray(init_a(jax.random.key(1), "gaussian", (rank,) * LAYERS, rank, P_IN), np.float64)
    assert abs(np.mean(drawn**2) - 1) < 5 * 2**0.5 / drawn.size**0.5
    assert abs(np.mean(drawn**4) - 3) < 5 * 96**0.5 / drawn.size**0.5


def test_rows_beyond_a_layer_s_rank_are_zero_and_the_law_is_that_of_its_own_rank() -> None:
    drawn = np.asarray(init_a(jax.random.key(2), "gaussian", (1, 0, 64), 64, P_IN))
    assert not drawn[0, 1:].any()
    assert not drawn[1].any()
    assert 0.8 < drawn[0, 0].std() < 1.2
    assert 0.8 / 64 < drawn[2].std() < 1.2 / 64
