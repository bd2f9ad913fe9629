"""Chi-square variates from rejection sampling against the chi-square distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rora_theory.laws.random.chi_squares import sample_chi_squares
from rora_theory.stats.moments import threshold

FREEDOMS = (1, 2, 3, 8, 64, 4096)
DRAWS = 2**17

pytestmark = pytest.mark.usefixtures("optimised")  # many draws


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    """Return draws of two independent variates for each number of degrees of freedom."""
    draw = jax.jit(sample_chi_squares, static_argnames="draws")
    return np.asarray(draw(jax.random.key(5), jnp.float32(FREEDOMS * 2), draws=DRAWS), np.float64)


@pytest.mark.slow
def test_draws_have_their_law(samples: np.ndarray) -> None:
    """Distribution (Kolmogorov-Smirnov), mean and variance are tested at a false-alarm rate of 1e-6 each."""
    z = threshold(1e-6, 2 * len(samples))
    for sample, freedom in zip(samples, FREEDOMS * 2, strict=True):
        law = stats.chi2(freedom)
        assert stats.kstest(sample, law.cdf).pvalue > 1e-6 / len(samples), freedom
        mean, variance, excess = (float(value) for value in law.stats("mvk"))
        assert abs(sample.mean() - mean) < z * (variance / DRAWS) ** 0.5, freedom
        assert abs(sample.var() - variance) < z * variance * ((excess + 2) / DRAWS) ** 0.5, freedom


@pytest.mark.slow
def test_kolmogorov_smirnov_would_see_another_law(samples: np.ndarray) -> None:
    """Degrees of freedom off by 2%, and proposals without rejection, fail at the same level."""
    assert stats.kstest(samples[4], stats.chi2(1.02 * FREEDOMS[4]).cdf).pvalue < 1e-6 / len(samples)
    shift = 3 / 2 - 1 / 3
    normal = np.random.default_rng(0).standard_normal(DRAWS)
    trial = 2 * shift * np.maximum(1 + normal / (3 * shift**0.5), 0) ** 3
    assert stats.kstest(trial, stats.chi2(3).cdf).pvalue < 1e-6 / len(samples)


@pytest.mark.slow
def test_draws_are_independent(samples: np.ndarray) -> None:
    """Ranks of two variates, and of neighbouring draws of one, are uncorrelated at a false-alarm rate of 1e-6."""
    ranks = stats.rankdata(samples, axis=1)
    assert len(np.unique(samples[0])) > 0.9 * DRAWS
    pairs = np.corrcoef(ranks)[np.triu_indices(len(samples), 1)]
    neighbours = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in ranks]
    correlations = np.abs([*pairs, *neighbours])
    assert correlations.max() < threshold(1e-6, len(correlations)) / DRAWS**0.5
