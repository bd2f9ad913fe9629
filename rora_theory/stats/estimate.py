"""An estimate with its standard error and the kind of samples that the error is computed from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import special

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer

CONFIDENCE = 0.95
"""Default level of two-sided confidence intervals."""

ROUNDING = 1e-12
"""Relative difference below which two float64 values count as equal. Verdicts must not depend on the last digits, which
differ between processors."""


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error.

    Attributes:
      value: Estimated value, in its own unit.
      error: Standard error in the same unit; not finite if a single sample gives no error.
      n: Number of samples behind the error.
      over: Kind of samples: ``"draws"``, ``"seeds"``, ``"records"``, ``"items"``, ``"trials"``; empty if there is no
        error.
      bound: Additional error that does not average out, such as a grid's spacing; added to the half width.
    """

    value: float
    error: float
    n: int
    over: str
    bound: float = 0.0

    @property
    def has_error(self) -> bool:
        """Whether the standard error is known."""
        return math.isfinite(self.error)

    @property
    def known_error(self) -> float | None:
        """Standard error as a table shows it; None if it is unknown."""
        return self.error if self.has_error else None

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        """Compute half the two-sided confidence interval by Student's t, plus the bound.

        Args:
          confidence: Level of the interval.

        Returns:
          The half width; infinity for fewer than two samples.

        Examples:
          >>> [round(Estimate(1.0, 0.1, n, "seeds").half_width(), 3) for n in (2, 400)]
          [1.271, 0.197]
        """
        if self.n < 2:
            return math.inf
        return float(special.stdtrit(self.n - 1, 0.5 + confidence / 2)) * self.error + self.bound

    def times(self, factor: float) -> "Estimate":
        """Return the estimate multiplied by an exact factor above 0."""
        return replace(self, value=self.value * factor, error=self.error * factor, bound=self.bound * factor)


def over_seeds(values: Float[np.ndarray, " seeds"]) -> Estimate:
    """Compute the mean over seeds and its standard error.

    Args:
      values: One value per seed.

    Returns:
      The mean. Its error is infinite for a single seed.

    Raises:
      InputError: If there are no values.

    Examples:
      >>> over_seeds(np.array([1.0, 3.0]))
      Estimate(value=2.0, error=1.0, n=2, over='seeds', bound=0.0)
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    if not count:
        raise InputError("values must have at least one seed, got an empty array")
    if count < 2:
        return Estimate(float(np.mean(values)), math.inf, count, "")
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(count)), count, "seeds")


def jackknife(statistic: Callable[[Sequence[int]], float], n: int, over: str) -> Estimate:
    r"""Estimate a statistic of ``n`` samples and its standard error by the jackknife.

    The error is :math:`\sqrt{(n - 1)\, \overline{(f_{-i} - \overline{f_{-i}})^2}}` over the statistics without one
    sample. For a mean it is exactly the standard error; for a single sample it is infinite.

    Args:
      statistic: Function that computes the statistic from the samples with the given indices, of which there is at
        least one.
      n: Number of samples, 1 or more.
      over: Kind of samples.

    Returns:
      The statistic of all samples, with its error.

    Raises:
      InputError: If there are no samples.

    Examples:
      >>> values = [1.0, 3.0]
      >>> mean = lambda indices: sum(values[i] for i in indices) / len(indices)
      >>> jackknife(mean, 2, "seeds") == over_seeds(np.array(values))
      True

    References:
      Tukey, Bias and confidence in not-quite large samples, Ann. Math. Statist. 29 (1958).
    """
    check_integer("n", n)
    indices = range(n)
    if n < 2:
        return Estimate(statistic(indices), math.inf, n, "")
    leave_one_out = np.array([statistic([index for index in indices if index != left_out]) for left_out in indices])
    variance = (n - 1) * float(np.mean((leave_one_out - np.mean(leave_one_out)) ** 2))
    return Estimate(statistic(indices), math.sqrt(variance), n, over)


def square_root(estimate: Estimate) -> Estimate:
    """Return the square root of an estimate, with its error and bound to first order."""
    value = math.sqrt(max(estimate.value, 0.0))
    # At 0 the derivative 1 / (2 sqrt(value)) is infinite; a bound b of the square still bounds the root by sqrt(b).
    if not value:
        return replace(estimate, value=value, error=0.0, bound=math.sqrt(estimate.bound))
    return replace(estimate, value=value, error=estimate.error / (2 * value), bound=estimate.bound / (2 * value))


def standard_score(gap: float, error: float) -> float:
    """Compute the standard score (z) of a difference: its ratio to its standard error.

    Args:
      gap: Difference to divide by its standard error.
      error: Standard error of the difference.

    Returns:
      The ratio; infinity for a nonzero difference without an error, 0 for a zero one.

    Examples:
      >>> standard_score(-1.0, 0.5), standard_score(-1.0, 0.0), standard_score(0.0, 0.0)
      (-2.0, -inf, 0.0)
    """
    if error:
        return gap / error
    return gap * math.inf if gap else 0.0


def proportion(successes: int, n: int) -> Estimate:
    r"""Estimate the proportion of successes in ``n`` independent trials.

    The standard error is :math:`\sqrt{p (1 - p) / (n - 1)}`, the sample deviation over :math:`\sqrt n`. If no trial or
    every trial succeeds it would be 0, as if further trials could not differ. In these cases the error is half of
    Wilson's interval at one standard deviation, :math:`1 / (2 (n + 1))`.

    Args:
      successes: Number of successes, from 0 to ``n``.
      n: Number of trials, 1 or more.

    Returns:
      The proportion and its error.

    Raises:
      InputError: If a number is out of range.

    Examples:
      >>> proportion(0, 8).value, round(proportion(0, 8).error, 4), round(proportion(4, 8).error, 4)
      (0.0, 0.0556, 0.189)

    References:
      Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    check_integer("n", n)
    check_integer("successes", successes, minimum=0, maximum=n)
    p = successes / n
    # Wilson's half-width where the sample deviation is 0.
    error = math.sqrt(p * (1 - p) / (n - 1)) if 0 < successes < n else 1 / (2 * (n + 1))
    return Estimate(p, error, n, "trials")
