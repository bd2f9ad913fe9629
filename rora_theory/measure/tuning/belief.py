"""What is known about the best learning rate of a run: a normal distribution of its logarithm."""

import math
from dataclasses import dataclass

from rora_theory.advice.best_rate import QUANTILE, RateRange

CURVATURE = 0.042
"""Typical curvature c of published curves, in nats per token: a rate twice too high or low costs 0.010."""


@dataclass(frozen=True)
class RateBelief:
    """Distribution of the best learning rate, normal in its logarithm.

    Attributes:
      mean: Mean of the natural logarithm.
      spread: Standard deviation of the natural logarithm, above 0.
    """

    mean: float
    spread: float

    @property
    def rates(self) -> RateRange:
        """Median of the distribution with its central 90% range."""
        factor = math.exp(QUANTILE * self.spread)
        best = math.exp(self.mean)
        return RateRange(best / factor, best, best * factor)

    @property
    def expected_regret(self) -> float:
        """Expected regret of the median in nats per token, for a curve of the typical curvature."""
        return 0.5 * CURVATURE * self.spread**2
