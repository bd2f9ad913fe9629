"""Does a quantity depend on the rank? Log-log slopes fitted seed by seed, and whether they lie within a band."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.stats.estimate import CONFIDENCE, Estimate, over_seeds

Trend = Literal["flat", "grows", "shrinks", "undecided"]

BAND = 0.1
"""Slopes within this of zero count as flat: over the ranks 8 to 128 the quantity changes by less than a third."""


class SeedFit(NamedTuple):
    """A log-log slope, fitted for each seed by itself.

    Attributes:
      slope: mean over seeds.
      standard_error: of that mean, from the spread over seeds; infinite for one seed.
      seeds: how many.
      departure: largest distance of a point (mean over seeds of log y) from the line, over the range of log x: in units
        of a slope, what the curve does beside its slope. 0 for two points.
      bound: see `Estimate`.
    """

    slope: float
    standard_error: float
    seeds: int
    departure: float = 0.0
    bound: float = 0.0

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        """Half the two-sided confidence interval, by Student's t, and the bound."""
        return Estimate(self.slope, self.standard_error, self.seeds, "seeds", self.bound).half_width(confidence)

    @classmethod
    def of(cls, slope: Estimate, departure: float = 0.0) -> "SeedFit":
        """Of a mean over seeds of slopes, or of differences of two."""
        return cls(slope.value, slope.error, slope.n, departure, slope.bound)


def seed_fit(x: Sequence[float] | Float[np.ndarray, " n"], y: Float[np.ndarray, "seeds n"]) -> SeedFit:
    """Mean of `seed_slopes` and its standard error. Points of a seed may share noise (nested factors, one problem):
    the spread over seeds counts it."""
    slope = over_seeds(seed_slopes(x, y))
    log_x = np.log(np.asarray(x, np.float64))
    means = np.mean(np.log(np.atleast_2d(np.asarray(y, np.float64))), axis=0)
    return SeedFit.of(slope, departure(log_x, means, slope.value))


def departure(log_x: Float[np.ndarray, " n"], log_y: Float[np.ndarray, " n"], slope: float) -> float:
    """Of `SeedFit`: the largest distance of a point from the line of that slope through the mean, over the range."""
    rest = log_y - log_y.mean() - slope * (log_x - log_x.mean())
    return float(np.max(np.abs(rest)) / np.ptp(log_x)) if len(log_x) > 2 else 0.0


def seed_slopes(
    x: Sequence[float] | Float[np.ndarray, " n"], y: Float[np.ndarray, "seeds n"]
) -> Float[np.ndarray, " seeds"]:
    """Least-squares slopes of log y against log x, one a seed.

    Args:
      x: at least two different positive numbers.
      y: positive, a row a seed.

    Raises:
      InputError: fewer than two different x, or an x or y that is not finite and positive.
    """
    x, y = np.asarray(x, np.float64), np.atleast_2d(np.asarray(y, np.float64))
    if len(set(x.tolist())) < 2 or not (np.isfinite(x).all() and (x > 0).all()):
        raise InputError(f"x is {x.tolist()}; accepted are at least two different values, finite and above 0")
    log_x = np.log(x)
    if y.shape[1] != len(log_x) or not (np.isfinite(y).all() and (y > 0).all()):
        raise InputError(f"y has shape {y.shape} for {len(log_x)} x or an entry that is not finite and above 0")
    lever = log_x - np.mean(log_x)
    return np.log(y) @ (lever / np.sum(lever**2))


def trend(fit: SeedFit, band: float = BAND, confidence: float = CONFIDENCE) -> Trend:
    """``"flat"`` where the whole confidence interval lies within ``band`` of zero, ``"grows"`` or ``"shrinks"`` where
    all of it lies outside, ``"undecided"`` where it lies on both sides.

    The curve must bear it: flat with no point further from the line than ``band`` would move it over the range, growing
    or shrinking with none further than the slope itself moves it. Else it is undecided.

    Examples:
      >>> trend(SeedFit(0.02, 0.01, 5)), trend(SeedFit(0.5, 0.01, 5)), trend(SeedFit(0.02, 0.1, 5))
      ('flat', 'grows', 'undecided')
    """
    half = fit.half_width(confidence)
    if abs(fit.slope) + half <= band and fit.departure <= band:
        return "flat"
    if abs(fit.slope) - half > band and fit.departure <= abs(fit.slope):
        return "grows" if fit.slope > 0 else "shrinks"
    return "undecided"


def assert_flat(
    x: Sequence[float] | Float[np.ndarray, " n"],
    y: Float[np.ndarray, "seeds n"],
    *,
    band: float = BAND,
    confidence: float = CONFIDENCE,
    what: str = "y",
) -> SeedFit:
    """Pass where log y against log x is shown to be flat: its slope lies within ``band`` of zero, and no point further
    from the line than such a slope would move it; made for tests.

    A slope that the seeds do not settle fails too: use more seeds or a wider band.

    Args:
      x: e.g. ranks.
      y: the quantity, a row a seed.
      band: largest absolute slope to accept.
      confidence: of the two-sided interval that must lie within it.
      what: named in the message.

    Returns:
      The fit.

    Raises:
      AssertionError: the slope is outside the band, or undecided.
      InputError: as `seed_slopes`.
    """
    fit = seed_fit(x, y)
    found = trend(fit, band, confidence)
    if found != "flat":
        raise AssertionError(
            f"{what} is not flat but {found}: slope {fit.slope:+.3f} ± {fit.half_width(confidence):.3f} "
            f"({confidence:.0%}, {fit.seeds} seeds), largest departure from the line {fit.departure:.3f} of a slope, "
            f"against a band of ±{band:g}"
        )
    return fit
