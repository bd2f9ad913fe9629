"""Log-log slopes fitted for each seed, and the test whether they lie within a band around zero."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.stats.estimate import CONFIDENCE, Estimate, over_seeds
from rora_theory.stats.verdicts import judge_equivalence

Trend = Literal["flat", "grows", "shrinks", "undecided"]

BAND = 0.1
"""Largest absolute slope that counts as flat: the quantity changes by less than a third over the ranks 8 to 128."""


class SeedFit(NamedTuple):
    """A log-log slope that is fitted for each seed separately.

    Attributes:
      slope: Mean slope over seeds.
      standard_error: Standard error of the mean, from the spread over seeds; infinity for a single seed.
      seeds: Number of seeds.
      departure: Largest distance of a point (mean over seeds of log y) from the line, divided by the range of log x, so
        that it has the unit of a slope. 0 for two points.
      bound: Additional error that does not average out, see `Estimate`.
    """

    slope: float
    standard_error: float
    seeds: int
    departure: float = 0.0
    bound: float = 0.0

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        """Compute half the two-sided confidence interval by Student's t, plus the bound."""
        return Estimate(self.slope, self.standard_error, self.seeds, "seeds", self.bound).half_width(confidence)

    def row(self, band: float = BAND) -> dict[str, Any]:
        """Return the columns ``slope``, ``standard_error``, ``half_width``, ``seeds`` and ``verdict`` of a table.

        Args:
          band: Largest absolute slope that counts as flat, see `trend`.
        """
        fit = {"slope": self.slope, "standard_error": self.standard_error, "half_width": self.half_width()}
        return fit | {"seeds": self.seeds, "verdict": trend(self, band)}

    @classmethod
    def from_estimate(cls, slope: Estimate, departure: float = 0.0) -> "SeedFit":
        """Create a fit from a mean over seeds of slopes or of differences of slopes."""
        return cls(slope.value, slope.error, slope.n, departure, slope.bound)


def seed_fit(x: Sequence[float] | Float[np.ndarray, " n"], y: Float[np.ndarray, "seeds n"]) -> SeedFit:
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
    return SeedFit.from_estimate(slope, departure(log_x, mean_log_y, slope.value))


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


def trend(fit: SeedFit, band: float = BAND, confidence: float = CONFIDENCE) -> Trend:
    """Classify a slope as flat, growing, shrinking or undecided.

    It is ``"flat"`` if the whole confidence interval lies within ``band`` of zero and the departure from the line does
    not exceed ``band``. It is ``"grows"`` or ``"shrinks"`` if the whole interval lies outside the band and the
    departure does not exceed the slope. Otherwise it is ``"undecided"``.

    Args:
      fit: Slope with its error and departure.
      band: Largest absolute slope that counts as flat.
      confidence: Level of the two-sided interval.

    Returns:
      The classification.

    Examples:
      >>> trend(SeedFit(0.02, 0.01, 5)), trend(SeedFit(0.5, 0.01, 5)), trend(SeedFit(0.02, 0.1, 5))
      ('flat', 'grows', 'undecided')
    """
    result = judge_equivalence(fit.slope, fit.half_width(confidence), margin=band, threshold=band)
    if result == "equal" and fit.departure <= band:
        return "flat"
    if result == "differs" and fit.departure <= abs(fit.slope):
        return "grows" if fit.slope > 0 else "shrinks"
    return "undecided"


def assert_flat(
    x: Sequence[float] | Float[np.ndarray, " n"],
    y: Float[np.ndarray, "seeds n"],
    *,
    band: float = BAND,
    confidence: float = CONFIDENCE,
    label: str = "y",
) -> SeedFit:
    """Assert in a test that log y does not depend on log x.

    The assertion also fails if the trend is undecided. In that case use more seeds or a wider band.

    Args:
      x: Independent variable, e.g. ranks.
      y: Quantity to test, one row per seed.
      band: Largest absolute slope that counts as flat.
      confidence: Level of the two-sided interval that must lie within the band.
      label: Name of the quantity in the message.

    Returns:
      The fit.

    Raises:
      AssertionError: If the trend is not flat.
      InputError: If `seed_slopes` rejects an argument.
    """
    fit = seed_fit(x, y)
    result = trend(fit, band, confidence)
    if result != "flat":
        raise AssertionError(
            f"{label} is not flat but {result}: slope {fit.slope:+.3f} ± {fit.half_width(confidence):.3f} "
            f"({confidence:.0%}, {fit.seeds} seeds) against a band of ±{band:g}, and largest departure from the line "
            f"{fit.departure:.3f}"
        )
    return fit
