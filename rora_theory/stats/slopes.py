"""Log-log slopes with their errors, fitted for each seed or to estimates, and the test whether they are about zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.verdicts import judge_equivalence

Trend = Literal["flat", "grows", "shrinks", "undecided"]

BAND = 0.1
"""Largest absolute slope that counts as flat: the quantity changes by less than a third over the ranks 8 to 128."""


@dataclass(frozen=True)
class SlopeFit(Estimate):
    """A log-log slope: the mean over seeds of the slopes that are fitted for each seed separately.

    Attributes:
      departure: Largest distance of a point (mean over seeds of log y) from the line, divided by the range of log x, so
        that it has the unit of a slope. 0 for two points.
    """

    departure: float = 0.0

    def row(self, band: float = BAND) -> dict[str, Any]:
        """Return the columns ``slope``, ``standard_error``, ``half_width``, ``seeds`` and ``verdict`` of a table.

        Args:
          band: Largest absolute slope that counts as flat, see `trend`.
        """
        fit = {"slope": self.value, "standard_error": self.error, "half_width": self.half_width()}
        return fit | {"seeds": self.n, "verdict": trend(self, band)}


def seed_fit(x: Sequence[float] | Float[np.ndarray, " n"], y: Float[np.ndarray, "seeds n"]) -> SlopeFit:
    """Fit the mean of `seed_slopes` and its standard error.

    Points of one seed may share noise (nested factors, one problem). The spread over seeds includes it.

    Args:
      x: At least two different positive values.
      y: Positive values, one row per seed.

    Returns:
      The fit.

    Raises:
      InputError: If `seed_slopes` rejects an argument.
    """
    slope = over_seeds(seed_slopes(x, y))
    log_x = np.log(np.asarray(x, np.float64))
    mean_log_y = np.mean(np.log(np.atleast_2d(np.asarray(y, np.float64))), axis=0)
    return SlopeFit(**vars(slope), departure=departure(log_x, mean_log_y, slope.value))


def departure(log_x: Float[np.ndarray, " n"], log_y: Float[np.ndarray, " n"], slope: float) -> float:
    """Compute the largest distance of a point from a line through the mean, divided by the range of log x.

    Args:
      log_x: Logarithms of x.
      log_y: Logarithms of y.
      slope: Slope of the line.

    Returns:
      The departure in units of a slope; 0 for two points.
    """
    residuals = log_y - log_y.mean() - slope * (log_x - log_x.mean())
    return float(np.max(np.abs(residuals)) / np.ptp(log_x)) if len(log_x) > 2 else 0.0


def seed_slopes(
    x: Sequence[float] | Float[np.ndarray, " n"], y: Float[np.ndarray, "seeds n"]
) -> Float[np.ndarray, " seeds"]:
    """Fit the least-squares slope of log y against log x for each seed.

    Args:
      x: At least two different positive values.
      y: Positive values, one row per seed.

    Returns:
      One slope per seed.

    Raises:
      InputError: If x has fewer than two different values, or a value of x or y is not finite and positive.
    """
    x, y = np.asarray(x, np.float64), np.atleast_2d(np.asarray(y, np.float64))
    if len(set(x.tolist())) < 2 or not (np.isfinite(x).all() and (x > 0).all()):
        raise InputError(f"x must have at least two different values, finite and above 0, got {x.tolist()}")
    log_x = np.log(x)
    is_valid = np.isfinite(y) & (y > 0)
    if y.shape[1] != len(log_x) or not is_valid.all():
        raise InputError(
            f"y must have {len(log_x)} columns of finite values above 0, got shape {y.shape} with "
            f"{int(np.sum(~is_valid))} other values"
        )
    return np.log(y) @ slope_weights(log_x)


def slope_weights(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the weights of the values y in the least-squares slope of y against x, which is their weighted sum.

    Args:
      x: At least two different values.
    """
    centred = x - np.mean(x)
    return centred / np.sum(centred**2)


def log_log_fit(
    x: Sequence[float] | Float[np.ndarray, " n"],
    y: Sequence[float] | Float[np.ndarray, " n"],
    errors: Sequence[float] | Float[np.ndarray, " n"],
) -> Estimate:
    """Fit the least-squares slope of log y against log x without weights.

    A curve that is not a power law thus gets its average slope over the range of x, not the slope at its most precise
    end. The standard error reflects only the sampling errors of y.

    Args:
      x: At least two different positive values.
      y: Positive values.
      errors: Standard errors of y; 0 for exact values.

    Returns:
      The slope with its standard error over draws.
    """
    log_x, log_y = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    # Standard errors of log y, to first order.
    log_errors = np.asarray(errors, np.float64) / np.asarray(y, np.float64)
    # The slope is a weighted sum of the log y, whose errors are independent.
    weights = slope_weights(log_x)
    return Estimate(float(weights @ log_y), float(np.linalg.norm(weights * log_errors)), len(log_x), "draws")


def trend(fit: SlopeFit, band: float = BAND) -> Trend:
    """Classify a slope as flat, growing, shrinking or undecided.

    It is ``"flat"`` if the whole 95% interval lies within ``band`` of zero and the departure from the line does
    not exceed ``band``. It is ``"grows"`` or ``"shrinks"`` if the whole interval lies outside the band and the
    departure does not exceed the slope. Otherwise it is ``"undecided"``.

    Args:
      fit: Slope with its error and departure.
      band: Largest absolute slope that counts as flat.

    Returns:
      The classification.

    Examples:
      >>> [trend(SlopeFit(slope, error, 5, "seeds")) for slope, error in ((0.02, 0.01), (0.5, 0.01), (0.02, 0.1))]
      ['flat', 'grows', 'undecided']
    """
    result = judge_equivalence(fit.value, fit.half_width(), margin=band, threshold=band)
    if result == "equal" and fit.departure <= band:
        return "flat"
    if result == "differs" and fit.departure <= abs(fit.value):
        return "grows" if fit.value > 0 else "shrinks"
    return "undecided"
