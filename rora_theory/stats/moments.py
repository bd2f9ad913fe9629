"""Running moments with standard errors, and test thresholds for a false-alarm probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from rora_theory.stats.estimate import ROUNDING, Estimate, standard_score

_POWERS = 4


@dataclass(frozen=True)
class Moments:
    """First four power sums of a stream of numbers about a fixed shift.

    Each block is summed in float64 and added to the total in double-double arithmetic (error-free additions), so that
    the total's error does not grow with the number of blocks. The result depends only on the order of the blocks.

    Attributes:
      count: Number of values.
      shift: Mean of the first block; the sums are of (value - shift)^n for n = 1..4.
      sums: High parts of the four sums.
      low_sums: Low parts of the four sums: what rounding the high parts has lost.
    """

    count: int = 0
    shift: float = 0.0
    sums: tuple[float, ...] = (0.0,) * _POWERS
    low_sums: tuple[float, ...] = (0.0,) * _POWERS

    def add(self, values: Float[np.ndarray, " n"]) -> "Moments":
        """Return the moments including another block of values."""
        values = np.asarray(values, np.float64)
        if values.size == 0:
            return self
        # Sum powers of the distance to a fixed shift: powers of the values themselves would cancel.
        shift = self.shift if self.count else float(np.mean(values))
        power = np.ones_like(values)
        sums, low_sums = [], []
        for high, low in zip(self.sums, self.low_sums, strict=True):
            power = power * (values - shift)
            new_high, new_low = _add_double_double(high, low, float(np.sum(power)))
            sums.append(new_high)
            low_sums.append(new_low)
        return Moments(self.count + values.size, shift, tuple(sums), tuple(low_sums))

    @property
    def _means(self) -> tuple[float, ...]:
        """Means of (value - shift)^n for n = 1..4."""
        return tuple((high + low) / self.count for high, low in zip(self.sums, self.low_sums, strict=True))

    @property
    def mean(self) -> Estimate:
        """Mean and its standard error."""
        first, second, *_ = self._means
        return self._estimate(self.shift + first, second - first**2)

    @property
    def second_moment(self) -> Estimate:
        """Second moment and its standard error, from value^2 = c^2 + 2 c d + d^2 with the shift c."""
        d1, d2, d3, d4 = self._means
        c = self.shift
        # Variance of value^2: 4 c^2 var(d) + 4 c cov(d, d^2) + var(d^2).
        variance = 4 * c**2 * (d2 - d1**2) + 4 * c * (d3 - d1 * d2) + (d4 - d2**2)
        return self._estimate(c**2 + 2 * c * d1 + d2, variance)

    @property
    def variance(self) -> Estimate:
        """Unbiased variance and its standard error, sqrt((mu_4 - mu_2^2) / n)."""
        d1, d2, d3, d4 = self._means
        # Second and fourth central moments from those about the shift.
        mu2 = d2 - d1**2
        mu4 = d4 - 4 * d1 * d3 + 6 * d1**2 * d2 - 3 * d1**4
        n = self.count
        return self._estimate(mu2 * n / max(n - 1, 1), mu4 - mu2**2)

    def _estimate(self, value: float, variance: float) -> Estimate:
        """Return an estimate with the error of a mean of values of this variance; rounding may make it negative."""
        return Estimate(value, math.sqrt(max(variance / max(self.count - 1, 1), 0.0)), self.count, "draws")

    def to_json(self) -> dict[str, Any]:
        """Return the moments as JSON types, without loss of precision."""
        return {
            "count": self.count,
            "shift": self.shift.hex(),
            "sums": [value.hex() for value in self.sums],
            "rests": [value.hex() for value in self.low_sums],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Moments":
        """Restore the moments from the output of `to_json`."""
        return cls(
            int(data["count"]),
            float.fromhex(data["shift"]),
            tuple(float.fromhex(value) for value in data["sums"]),
            tuple(float.fromhex(value) for value in data["rests"]),
        )


def standard_scores(estimates: Sequence[float], errors: Sequence[float], exact: Sequence[float]) -> list[float]:
    """Compute the differences of estimates from exact values in standard errors, see `standard_score`.

    A relative difference within `ROUNDING` counts as zero.

    Args:
      estimates: Estimated values.
      errors: Standard errors of the estimates.
      exact: Exact values.

    Examples:
      >>> standard_scores([1.5, 1.0, 0.5], [0.25, 0.0, 0.25], [1.0, 1.0, 0.0])
      [2.0, 0.0, 2.0]
    """
    return [
        standard_score(0.0 if math.isclose(value, exact_value, rel_tol=ROUNDING) else value - exact_value, error)
        for value, error, exact_value in zip(estimates, errors, exact, strict=True)
    ]


def threshold(false_alarm: float, comparisons: int = 1) -> float:
    """Compute the two-sided threshold on |z| for a false-alarm probability over several comparisons (Bonferroni).

    Args:
      false_alarm: Probability that any score exceeds the threshold under the null hypothesis.
      comparisons: Number of normal scores.

    Returns:
      The threshold on |z|.

    Examples:
      >>> round(threshold(0.05), 2), round(threshold(1e-6, 100), 2)
      (1.96, 5.73)
    """
    return -float(special.ndtri(false_alarm / comparisons / 2))


def _add_double_double(high: float, low: float, value: float) -> tuple[float, float]:
    """Add a value to the double-double number high + low by Knuth's error-free two-sum."""
    total = high + value
    # Part of the value that the rounded total contains. What rounding has lost goes to the low part.
    contained = total - high
    low += (high - (total - contained)) + (value - contained)
    # Renormalise, so that the high part is the sum rounded to float64.
    new_high = total + low
    return new_high, low - (new_high - total)
