"""Chi squares by rejection have the law that they are named by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rora_theory.random.chi_squares import chi_squares
from rora_theory.stats.moments import threshold

FREEDOMS = (1, 2, 3, 8, 64, 4096)
DRAWS = 2**17

pytestmark = pytest.mark.usefixtures("optimised")  # many draws


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Two laws of each freedom at once."""
    draw = jax.jit(chi_squares, static_argnames="draws")
    return np.asarray(draw(jax.random.key(5), jnp.float32(FREEDOMS * 2), draws=DRAWS), np.float64)


@pytest.mark.slow
def test_draws_have_their_law(drawn: np.ndarray) -> None:
    """Kolmogorov-Smirnov against scipy's law, and mean and variance; false alarm 1e-6 in each of the two."""
    z = threshold(1e-6, 2 * len(drawn))
    for found, freedom in zip(drawn, FREEDOMS * 2, strict=True):
        law = stats.chi2(freedom)
        assert stats.kstest(found, law.cdf).pvalue > 1e-6 / len(drawn), freedom
        mean, variance, excess = (float(value) for value in law.stats("mvk"))
        assert abs(found.mean() - mean) < z * (variance / DRAWS) ** 0.5, freedom
        assert abs(found.var() - variance) < z * variance * ((excess + 2) / DRAWS) ** 0.5, freedom


@pytest.mark.slow
def test_kolmogorov_smirnov_would_see_another_law(drawn: np.ndarray) -> None:
    """A freedom 2% off, and trials that are all kept, are rejected at the same level."""
    assert stats.kstest(drawn[4], stats.chi2(1.02 * FREEDOMS[4]).cdf).pvalue < 1e-6 / len(drawn)
    shift = 3 / 2 - 1 / 3
    normal = np.random.default_rng(0).standard_normal(DRAWS)
    trial = 2 * shift * np.maximum(1 + normal / (3 * shift**0.5), 0) ** 3
    assert stats.kstest(trial, stats.chi2(3).cdf).pvalue < 1e-6 / len(drawn)


@pytest.mark.slow
def test_draws_are_independent(drawn: np.ndarray) -> None:
    """Ranks of the draws of two laws, and of neighbours in one, are not correlated; false alarm 1e-6."""
    ranks = stats.rankdata(drawn, axis=1)
    assert len(np.unique(drawn[0])) > 0.9 * DRAWS
    pairs = np.corrcoef(ranks)[np.triu_indices(len(drawn), 1)]
    neighbours = [np.corrcoef(own[:-1], own[1:])[0, 1] for own in ranks]
    found = np.abs([*pairs, *neighbours])
    assert found.max() < threshold(1e-6, len(found)) / DRAWS**0.5
