r"""Best learning rates from a whole curve of loss against rate, as alternatives to the vertex through three points.

Three points carry a small part of a curve's information. Two estimators here use all of it: a quadratic fit to the
log loss in the log rate, and registration, the shift in log rate that aligns one curve with another. Registration has
about half the standard deviation of the vertex for two curves of one shape, and is biased otherwise.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy
from jaxtyping import Float

from rora_theory.stats.estimate import Estimate
from rora_theory.stats.rate_curves import Curve, estimate

Method = Literal["vertex", "quadratic", "registration"]
"""Estimators of a difference of best rates: parabola through three points, through all, and shift of whole curves."""

SHIFT_STEP = 0.04
"""Step in octaves between the shifts that registration tries."""


def quadratic_optima(curve: Curve, *, allows_ends: bool = False) -> Float[np.ndarray, " seeds"]:
    r"""Fit a quadratic to each seed's curve and return the log2 of its optimum.

    Least squares of the log loss in log2 of the rate over all rates that did not diverge. An optimum outside the
    measured rates is moved to the nearest of them.

    Args:
      curve: Loss against learning rate.
      allows_ends: Whether a fit without a minimum gives the end of the measured rates with the lower fitted loss.

    Returns:
      log2 of the best rate of every seed; NaN if the seed has fewer than three finite losses, or if the fit has no
      minimum and ``allows_ends`` is false.
    """
    x, finite = np.log2(curve.rates), np.isfinite(curve.losses)
    optima = np.full(len(curve.losses), math.nan)
    # Rows with the same finite losses are fitted together. A parabola has three coefficients.
    for pattern in np.unique(finite, axis=0):
        if np.sum(pattern) < 3:
            continue
        rows = (finite == pattern).all(axis=1)
        curvature, slope, _ = np.polyfit(x[pattern], np.log(curve.losses[np.ix_(rows, pattern)]).T, 2)
        # A parabola that is not convex has no minimum; its lower end is on the side to which its chord falls.
        first, last = x[pattern][0], x[pattern][-1]
        falls = curvature * (first + last) + slope < 0
        vertices = np.where(falls, last, first) if allows_ends else np.full(len(curvature), math.nan)
        np.divide(-slope, 2 * curvature, out=vertices, where=curvature > 0)
        optima[rows] = np.clip(vertices, first, last)
    return optima


def whole_curve_log2_rates(weights: Sequence[float], *curves: Curve) -> Estimate:
    """Estimate a weighted sum of the log2 best rates of several curves by `quadratic_optima`, which may lie at ends.

    Args:
      weights: One weight per curve.
      *curves: Curves of the same seeds.

    Returns:
      The sum with its error over seeds and held-out records, see `rate_curves.estimate`; NaN if a seed has
      fewer than three finite losses.
    """

    def weighted_sum(*sampled: Curve) -> np.ndarray:
        return np.asarray(weights) @ [quadratic_optima(curve, allows_ends=True) for curve in sampled]

    return estimate(weighted_sum, *curves)


def registration_shifts(first: Curve, second: Curve) -> Float[np.ndarray, " seeds"]:
    """Find the shift in log2 of the rate that aligns each seed's first curve with its second.

    For every shift the two interpolated curves (PCHIP, log loss) are compared where they overlap, up to a constant.
    The shift with the smallest variance of the difference is returned, among those with an overlap of at least half the
    shorter curve.

    Args:
      first: Loss against learning rate.
      second: Loss against learning rate of the same seeds.

    Returns:
      log2 of the second curve's best rate minus that of the first, for every seed; NaN if a curve has fewer than two
      finite losses.
    """
    shifts = []
    for first_losses, second_losses in zip(first.losses, second.losses, strict=True):
        x1, y1 = _finite(first.rates, first_losses)
        x2, y2 = _finite(second.rates, second_losses)
        if min(len(x1), len(x2)) < 2:
            shifts.append(math.nan)
            continue
        # Monotonic interpolation does not swing between the points, as a cubic spline may.
        spline1 = scipy.interpolate.PchipInterpolator(x1, y1, extrapolate=False)
        spline2 = scipy.interpolate.PchipInterpolator(x2, y2, extrapolate=False)
        # Overlap that a shift must leave: half of the shorter curve.
        overlap = min(x1[-1] - x1[0], x2[-1] - x2[0]) / 2
        # All shifts with enough overlap, [shifts, 1], with a row of points in the overlap for each.
        candidates = np.arange(x2[0] - x1[-1] + overlap, x2[-1] - x1[0] - overlap + SHIFT_STEP, SHIFT_STEP)[:, None]
        low, high = np.maximum(x1[0], x2[0] - candidates), np.minimum(x1[-1], x2[-1] - candidates)
        points = low + (high - low) * np.linspace(0, 1, 41)
        # Rounding may put an end of the overlap outside a curve, where its spline is NaN.
        variances = np.nanvar(spline1(points) - spline2(points + candidates), axis=1)
        # Vertex of the parabola through the smallest variance and its neighbours, so that shifts are not restricted to
        # multiples of the step.
        lowest = int(np.clip(np.argmin(variances), 1, len(candidates) - 2))
        before, middle, after = variances[lowest - 1 : lowest + 2]
        curvature = before - 2 * middle + after
        offset = float(np.clip((before - after) / (2 * curvature), -1, 1)) if curvature > 0 else 0.0
        shifts.append(float(candidates[lowest, 0]) + SHIFT_STEP * offset)
    return np.array(shifts)


def _finite(rates: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log2 of the rates and the log losses of the runs that did not diverge."""
    finite = np.isfinite(losses)
    return np.log2(rates[finite]), np.log(losses[finite])
