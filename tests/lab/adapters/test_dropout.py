"""Inverted dropout: the distribution of the mask, the exact mean, and the dependence on the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.lab.adapters.dropout import dropout


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_mean_is_the_input(rate: float) -> None:
    """The mean of 10^6 draws of m/q lies within five standard errors; the false-alarm rate is 6e-7."""
    x = jnp.ones((1000, 1000))
    y = np.asarray(dropout(jax.random.key(0), x, rate), np.float64)
    assert abs(y.mean() - 1) < 5 * (rate / (1 - rate) / y.size) ** 0.5
    assert abs((y == 0).mean() - rate) < 5 * (rate * (1 - rate) / y.size) ** 0.5
    # Both halves of a word, rows and columns: no element is special.
    for axis in (0, 1):
        assert np.abs(y.mean(axis) - 1).max() < 6 * (rate / (1 - rate) / 1000) ** 0.5  # 2000 means: 4e-6
    assert abs(y[:, ::2].mean() - y[:, 1::2].mean()) < 5 * 2 * (rate / (1 - rate) / y.size) ** 0.5


def test_values_from_one_random_word_are_independent() -> None:
    """The covariance of the two halves of a word is within five standard errors of zero over 500,000 pairs."""
    y = np.asarray(dropout(jax.random.key(1), jnp.ones((1000, 1000)), 0.5)) - 1.0
    products = y[:, ::2] * y[:, 1::2]
    assert abs(products.mean()) < 5 / products.size**0.5


def test_surviving_values_are_the_input_divided_by_their_share() -> None:
    x = jax.random.normal(jax.random.key(2), (50, 7))  # an odd width leaves half a word
    y = dropout(jax.random.key(3), x, 0.25)
    is_kept = y != 0
    np.testing.assert_allclose(y[is_kept], x[is_kept] / 0.75, rtol=2e-7)
    assert 0.6 < is_kept.mean() < 0.9


def test_bfloat16_is_scaled_before_rounding() -> None:
    """In bfloat16 1/0.95 is 1.0547, off by 0.2%. The mean of many values is off by less."""
    x = jax.random.uniform(jax.random.key(4), (400, 500), minval=0.5, maxval=1.0).astype(jnp.bfloat16)
    y = dropout(jax.random.key(5), x, 0.05)
    assert y.dtype == jnp.bfloat16
    is_kept = np.asarray(y != 0)
    ratio = np.asarray(y, np.float64)[is_kept].sum() / np.asarray(x, np.float64)[is_kept].sum()
    # Rounding errors, at most 2^-9 of a value, average out over 200 000 values.
    assert abs(ratio * (1 - 0.05) - 1) < 2e-4
