"""Nested factors share rows and have the distributions of `rora_theory.inits`."""

import jax
import numpy as np
import pytest

from rora_theory.inits import entries
from rora_theory.laws.random import nested

KEY = jax.random.key(3)


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "normal"])
def test_law(init):
    """The variance of 64 x 500 entries agrees with |z| < 5 (kurtosis at most 3)."""
    a = np.asarray(nested.draw_nested_A(KEY, init, rank=64, p_in=500), np.float64)
    law = entries(init, rank=64, p_in=500)
    error = law.variance * np.sqrt((law.kurtosis - 1) / a.size)
    assert abs(np.mean(a**2) - law.variance) < 5 * error
    assert abs(np.mean(a)) < 5 * np.sqrt(law.variance / a.size)


@pytest.mark.slow
def test_rows_are_shared_up_to_the_deviation():
    small, large = (np.asarray(nested.draw_nested_A(KEY, "gaussian", rank=r, p_in=7)) for r in (4, 16))
    np.testing.assert_allclose(small, 4 * large[:4], rtol=1e-6)  # standard deviation 1/r; float32
