r"""Posterior of a planned run's best learning rate, from a prior and the held-out losses of a probe.

Let x be the natural logarithm of the planned run's best rate, with a normal prior, and y that of the probe's best rate.
Near its minimum the probe's loss is a parabola in the logarithm u of the rate,

.. math:: \ell(u) = \ell_0 + \tfrac{c}{2} (u - y)^2, \qquad x = y + \delta

The level is unknown (flat), the curvature c has a log-normal prior from published curves, and the carry delta from the
probe to the planned run is normal (`rora_theory.advice.best_rate`, widened by the spread between seeds). The losses
have the covariance that their records give: runs are evaluated on the same records, so that most of the error is shared
and cancels in the level. The parabola is wrong far from the minimum, so that every loss has a further error in
proportion to its height above the lowest one. A rate that diverged states only that y lies below it.

Losses that say nothing have the same likelihood at every y, and the posterior is then the prior.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr

from rora_theory.advice.best_rate import LogChange
from rora_theory.errors import InputError
from rora_theory.measure.tuning.belief import CURVATURE, RateBelief
from rora_theory.measure.tuning.trial import ProbeRun

LOG_CURVATURE_SPREAD = 1.0
"""Standard deviation of the logarithm of the curvature, over models, steps and data."""

MISFIT = 0.25
"""Error of the parabola at a rate, as a share of the height of its loss above the lowest one."""

DIVERGENCE_MARGIN = 0.35
"""Standard deviation in log rate with which a divergence bounds the best rate."""

SEED_SPREAD = 0.17
"""Standard deviation between seeds of the logarithm of a best rate (``results/published/horizon/best.csv``)."""

GRID = 801
"""Number of points of the grid over the logarithm of a rate."""


@dataclass(frozen=True)
class Posterior:
    """Prior and posterior of a planned run's best rate.

    Attributes:
      prior: Belief before the probe.
      belief: Belief after it.
    """

    prior: RateBelief
    belief: RateBelief

    @property
    def factor(self) -> float:
        """Posterior median divided by the prior's."""
        return math.exp(self.belief.mean - self.prior.mean)

    def sentence(self) -> str:
        """Return a sentence on how much the probe changed the prior."""
        before, after = (belief.rates for belief in (self.prior, self.belief))
        return (
            f"Before the probe the rate was {before.best:.3g} (90% range {before.low:.2g} to {before.high:.2g}); the "
            f"probe multiplied it by {self.factor:.2f} and narrowed the range from a factor of "
            f"{before.high / before.low:.1f} to {after.high / after.low:.1f}."
        )


def update(prior: RateBelief, runs: Sequence[ProbeRun], tokens: Sequence[int], carry: LogChange) -> Posterior:
    """Update the prior of a planned run's best rate by the losses of a probe.

    Args:
      prior: Belief before the probe, about the planned run.
      runs: Finished runs of the probe, all of the same number of steps.
      tokens: Number of tokens of each held-out record.
      carry: Change of the logarithm of the best rate from the probe to the planned run.

    Returns:
      The prior with the posterior, whose mean and spread are those of the exact distribution on a grid.

    Raises:
      InputError: If no run finished.
    """
    finished = [run for run in runs if run.diverged_at is None]
    if not finished:
        raise InputError("every run of the probe diverged. Pass a lower learning_rate.")
    # The grid covers the prior on both sides of the carry, with room for the convolution below.
    spread_of_carry = math.hypot(carry.spread, SEED_SPREAD)
    reach = 6 * math.hypot(prior.spread, spread_of_carry)
    x = np.linspace(prior.mean - reach, prior.mean + reach, GRID)
    y = x - carry.mean
    log_likelihood = _log_likelihood(y, finished, tokens)
    for run in runs:
        if run.diverged_at is not None:
            log_likelihood += np.log(ndtr((math.log(run.learning_rate) - y) / DIVERGENCE_MARGIN) + 1e-12)
    # Convolve with the carry's error. Beyond the grid the likelihood is that of its ends.
    likelihood = np.exp(log_likelihood - log_likelihood.max())
    step = x[1] - x[0]
    width = math.ceil(5 * spread_of_carry / step)
    kernel = np.exp(-0.5 * (np.arange(-width, width + 1) * step / spread_of_carry) ** 2)
    padded = np.concatenate([np.full(width, likelihood[0]), likelihood, np.full(width, likelihood[-1])])
    weights = np.convolve(padded, kernel / kernel.sum(), mode="valid")
    weights *= np.exp(-0.5 * ((x - prior.mean) / prior.spread) ** 2)
    weights /= weights.sum()
    mean = float(weights @ x)
    return Posterior(prior, RateBelief(mean, math.sqrt(float(weights @ (x - mean) ** 2))))


def _log_likelihood(
    y: Float[np.ndarray, " grid"], runs: Sequence[ProbeRun], tokens: Sequence[int]
) -> Float[np.ndarray, " grid"]:
    """Return the log likelihood of the probe's best rate, marginal over the level and the curvature."""
    if len(runs) < 2:
        return np.zeros(len(y))
    sums = np.array([run.losses for run in runs])
    counts = np.asarray(tokens, np.float64)
    losses = sums.sum(axis=1) / counts.sum()
    # Covariance of ratios of sums over records: the records' residuals from the mean loss per token.
    residuals = sums - losses[:, None] * counts
    records = len(counts)
    covariance = residuals @ residuals.T / counts.sum() ** 2 * records / max(records - 1, 1)
    covariance += np.diag((MISFIT * (losses - losses.min())) ** 2 + 1e-12)
    inverse = np.linalg.inv(covariance)
    # Weights that remove the level, which every loss shares: generalised least squares.
    ones = np.ones(len(runs))
    projected = inverse - np.outer(inverse @ ones, ones @ inverse) / (ones @ inverse @ ones)
    shapes = 0.5 * (np.log([run.learning_rate for run in runs])[:, None] - y) ** 2
    # Quadrature over the logarithm of the curvature.
    offsets = np.linspace(-3, 3, 25)
    curvatures = CURVATURE * np.exp(LOG_CURVATURE_SPREAD * offsets)
    logs = []
    for offset, curvature in zip(offsets, curvatures, strict=True):
        error = losses[:, None] - curvature * shapes
        logs.append(-0.5 * np.einsum("rg,rs,sg->g", error, projected, error) - 0.5 * offset**2)
    return np.logaddexp.reduce(np.array(logs), axis=0)
