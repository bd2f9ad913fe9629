"""A figure with its standard error, and what the error is over: the one mean-with-error of the package."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import special

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer

CONFIDENCE = 0.95

ROUNDING = 1e-12
"""Relative difference below which two float64 figures count as equal: a verdict must not depend on the last digits,
which differ between processors."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error.

    Attributes:
      value: the figure, in its own unit.
      error: one sigma, in the same unit; not finite where one case alone tells nothing of it.
      n: how many cases the error is from; those of a bootstrap are its draws.
      over: what they are: ``"draws"``, ``"seeds"``, ``"records"``, ``"items"``, ``"trials"``; empty where one case
        gives no error.
      bound: what may be hidden besides and does not average out, such as a grid's spacing: added to every half width.
    """

    value: float
    error: float
    n: int
    over: str
    bound: float = 0.0

    @property
    def has_error(self) -> bool:
        """Whether the error is known."""
        return math.isfinite(self.error)

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        """Half the two-sided confidence interval, by Student's t, and the bound; infinite for one case.

        Examples:
          >>> [round(Estimate(1.0, 0.1, n, "seeds").half_width(), 3) for n in (2, 400)]
          [1.271, 0.197]
        """
        if self.n < 2:
            return math.inf
        return float(special.stdtrit(self.n - 1, 0.5 + confidence / 2)) * self.error + self.bound

    def times(self, factor: float) -> "Estimate":
        """The estimate of ``factor`` times the figure, ``factor`` being exact and above 0."""
        return replace(self, value=self.value * factor, error=self.error * factor, bound=self.bound * factor)


def over_seeds(values: Float[np.ndarray, " seeds"]) -> Estimate:
    """Mean of a figure over seeds; for one seed its error is infinite, over nothing.

    Raises:
      InputError: no seed.

    Examples:
      >>> over_seeds(np.array([1.0, 3.0]))
      Estimate(value=2.0, error=1.0, n=2, over='seeds', bound=0.0)
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    if not count:
        raise InputError("values is empty; accepted is a figure a seed, 1 seed or more")
    if count < 2:
        return Estimate(float(np.mean(values)), math.inf, count, "")
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(count)), count, "seeds")


def jackknife(figure: Callable[[Sequence[int]], float], n: int, over: str) -> Estimate:
    r"""A figure of ``n`` cases, with the error that leaving out each of them in turn gives.

    :math:`\sqrt{(n - 1)\, \overline{(f_{-i} - \overline{f_{-i}})^2}}`, of a mean exactly its standard error; for one
    case it is infinite, over nothing.

    Args:
      figure: of the cases with the given numbers.
      n: how many there are, 1 or more.
      over: what they are.

    Raises:
      InputError: no case.

    Source: Tukey, Bias and confidence in not-quite large samples, Ann. Math. Statist. 29 (1958).

    Examples:
      >>> values = [1.0, 3.0]
      >>> jackknife(lambda kept: sum(values[i] for i in kept) / len(kept), 2, "seeds") == over_seeds(np.array(values))
      True
    """
    check_integer("n", n)
    every = range(n)
    if n < 2:
        return Estimate(figure(every), math.inf, n, "")
    left_out = np.array([figure([case for case in every if case != out]) for out in every])
    spread = (n - 1) * float(np.mean((left_out - np.mean(left_out)) ** 2))
    return Estimate(figure(every), math.sqrt(spread), n, over)


def root(estimate: Estimate) -> Estimate:
    """The square root of an estimate, its error and bound to first order: root mean squares from mean squares."""
    value = math.sqrt(max(estimate.value, 0.0))
    if not value:
        return replace(estimate, value=value, error=0.0, bound=math.sqrt(estimate.bound))
    return replace(estimate, value=value, error=estimate.error / (2 * value), bound=estimate.bound / (2 * value))


def in_errors(gap: float, error: float) -> float:
    """A gap in standard errors; infinite where there is one between figures without an error.

    Examples:
      >>> in_errors(-1.0, 0.5), in_errors(-1.0, 0.0), in_errors(0.0, 0.0)
      (-2.0, -inf, 0.0)
    """
    if error:
        return gap / error
    return gap * math.inf if gap else 0.0


def proportion(right: int, n: int) -> Estimate:
    r"""The proportion of successes in ``n`` independent trials, and its standard error.

    :math:`\sqrt{p (1 - p) / (n - 1)}`, the sample deviation over :math:`\sqrt n`. Where none or all succeed that is 0,
    as if no further trial could come out otherwise: there the error is half of Wilson's interval at one standard
    deviation, :math:`1 / (2 (n + 1))`; the interval ends at :math:`1 / (n + 1)`, or its complement.

    Args:
      right: successes, from 0 to ``n``.
      n: trials, 1 or more.

    Raises:
      InputError: a number out of these ranges.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Examples:
      >>> proportion(0, 8).value, round(proportion(0, 8).error, 4), round(proportion(4, 8).error, 4)
      (0.0, 0.0556, 0.189)
    """
    check_integer("n", n)
    check_integer("right", right, least=0, most=n)
    p = right / n
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if 0 < right < n else 1 / (2 * (n + 1)), n, "trials")
