"""Running moments with standard errors, log-log slopes, and test thresholds for a false-alarm probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from rora_theory.stats.estimate import ROUNDING, Estimate, in_errors

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
      rests: Low parts of the four sums.
    """

    count: int = 0
    shift: float = 0.0
    sums: tuple[float, ...] = (0.0,) * _POWERS
    rests: tuple[float, ...] = (0.0,) * _POWERS

    def add(self, values: Float[np.ndarray, " n"]) -> "Moments":
        """Return the moments including another block of values."""
        values = np.asarray(values, np.float64)
        if values.size == 0:
            return self
        # Sum powers of the distance to a fixed shift: powers of the values themselves would cancel.
        shift = self.shift if self.count else float(np.mean(values))
        power = np.ones_like(values)
        sums, rests = [], []
        for total, rest in zip(self.sums, self.rests, strict=True):
            power = power * (values - shift)
            # Compensated sums: the rest holds what rounding the sum has lost.
            total, rest = _two_sum_into(total, rest, float(np.sum(power)))
            sums.append(total)
            rests.append(rest)
        return Moments(self.count + values.size, shift, tuple(sums), tuple(rests))

    @property
    def _means(self) -> tuple[float, ...]:
        """Means of (value - shift)^n for n = 1..4."""
        return tuple((total + rest) / self.count for total, rest in zip(self.sums, self.rests, strict=True))

    @property
    def mean(self) -> Estimate:
        """Mean and its standard error."""
        first, second, *_ = self._means
        return self._estimate(self.shift + first, second - first**2)

    @property
    def second_moment(self) -> Estimate:
        """Second moment and its standard error, from value^2 = c^2 + 2 c d + d^2."""
        d1, d2, d3, d4 = self._means
        c = self.shift
        spread = 4 * c**2 * (d2 - d1**2) + 4 * c * (d3 - d1 * d2) + (d4 - d2**2)
        return self._estimate(c**2 + 2 * c * d1 + d2, spread)

    @property
    def variance(self) -> Estimate:
        """Unbiased variance and its standard error, sqrt((mu_4 - mu_2^2) / n)."""
        d1, d2, d3, d4 = self._means
        mu2 = d2 - d1**2
        mu4 = d4 - 4 * d1 * d3 + 6 * d1**2 * d2 - 3 * d1**4
        n = self.count
        return self._estimate(mu2 * n / max(n - 1, 1), mu4 - mu2**2)

    def _estimate(self, value: float, spread: float) -> Estimate:
        """Return an estimate with the error of a mean of values with variance ``spread``."""
        return Estimate(value, math.sqrt(max(spread / max(self.count - 1, 1), 0.0)), self.count, "draws")

    def to_json(self) -> dict[str, Any]:
        """Return the moments as JSON types, without loss of precision."""
        return {
            "count": self.count,
            "shift": self.shift.hex(),
            "sums": [value.hex() for value in self.sums],
            "rests": [value.hex() for value in self.rests],
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

    def scaled(self, factor: float) -> "Moments":
        """Return the moments of ``factor * value``."""
        return replace(
            self,
            shift=self.shift * factor,
            sums=tuple(total * factor**n for n, total in enumerate(self.sums, start=1)),
            rests=tuple(rest * factor**n for n, rest in enumerate(self.rests, start=1)),
        )


class Fit(NamedTuple):
    """A log-log slope and its standard error.

    Attributes:
      slope: Fitted slope.
      standard_error: Standard error of the slope.
    """

    slope: float
    standard_error: float


def log_log_fit(
    x: Sequence[float] | Float[np.ndarray, " n"],
    y: Sequence[float] | Float[np.ndarray, " n"],
    errors: Sequence[float] | Float[np.ndarray, " n"],
) -> Fit:
    """Fit the least-squares slope of log y against log x without weights.

    A curve that is not a power law thus gets its average slope over the range of x, not the slope at its most precise
    end. The standard error reflects only the sampling errors of y.

    Args:
      x: At least two different positive values.
      y: Positive values.
      errors: Standard errors of y; 0 for exact values.

    Returns:
      The slope and its standard error.
    """
    log_x, log_y = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    spread = np.asarray(errors, np.float64) / np.asarray(y, np.float64)
    lever = log_x - np.mean(log_x)
    lever = lever / np.sum(lever**2)
    return Fit(float(lever @ log_y), float(np.sqrt(np.sum((lever * spread) ** 2))))


class Agreement(NamedTuple):
    """Agreement of estimates with exact values.

    Attributes:
      scores: Differences (estimate - exact) in standard errors, see `in_errors`.
      largest_gap: Largest relative difference; infinity if an exact value is 0, NaN if a value is NaN.
    """

    scores: tuple[float, ...]
    largest_gap: float

    @property
    def largest_score(self) -> float:
        """Largest |z|; NaN if a score is NaN."""
        return float(np.max(np.abs(self.scores)))

    @property
    def rms_score(self) -> float:
        """Root mean square of z; near 1 for correct standard errors."""
        return math.sqrt(float(np.mean(np.square(self.scores))))


def agreement(estimates: Sequence[float], errors: Sequence[float], exact: Sequence[float]) -> Agreement:
    """Compare estimates with exact values.

    A relative difference within `ROUNDING` counts as zero.

    Args:
      estimates: Estimated values.
      errors: Standard errors of the estimates.
      exact: Exact values.

    Returns:
      The scores and the largest relative difference.

    Examples:
      >>> agreement([1.1, 1.9], [0.1, 0.1], [1.0, 2.0]).largest_gap.__round__(3)
      0.1
      >>> result = agreement([1.1, 1.7, 0.1], [0.1, 0.1, 0.1], [1.0, 2.0, 0.0])
      >>> round(result.largest_score, 3), result.largest_gap  # the third exact value is 0
      (3.0, inf)
    """
    scores = [
        in_errors(0.0 if math.isclose(value, law, rel_tol=ROUNDING) else value - law, error)
        for value, error, law in zip(estimates, errors, exact, strict=True)
    ]
    gaps = [abs(value / law - 1) if law else math.inf for value, law in zip(estimates, exact, strict=True)]
    return Agreement(tuple(scores), float(np.max(gaps)))


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


def _two_sum_into(total: float, rest: float, value: float) -> tuple[float, float]:
    """Add a value to (total + rest), with the rounding error of the leading addition in the rest (Knuth)."""
    high = total + value
    # Part of the value that the rounded sum contains; what is missing goes to the rest.
    back = high - total
    rest += (total - (high - back)) + (value - back)
    new = high + rest
    return new, rest - (new - high)
