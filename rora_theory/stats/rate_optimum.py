r"""The best learning rate of a loss curve, and its predicted dependence on the rank.

For a scaling :math:`\gamma = \alpha/r^\kappa` and a rate :math:`\eta`, the size of the first step is proportional to

- SGD: :math:`\eta \gamma^2 r` in the signal regime, :math:`\eta \gamma^2 \sqrt r` in the cross-talk regime;
- Adam: :math:`\eta \gamma r` and :math:`\eta \gamma \sqrt r`.

A best rate that keeps this size constant is a power of r. Once A has moved further than its initial size, Adam's change
is proportional to :math:`\eta^2 \gamma r`, and the exponent of the best rate is halved. SGD's change is exponential in
:math:`\gamma \eta`, and the best rate is proportional to :math:`1/\gamma` (`rora_theory.laws.constant_gradient`).
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError

Edge = Literal["", "low", "high"]
"""End of the grid at which a minimum lies; empty for an inner minimum."""

HIDDEN_SHARE = 0.3
"""Largest depth of a minimum between three equidistant points below the lowest of them, relative to the height of the
chord above that point. A parabola has at most a quarter; the remainder allows for other shapes."""


class Best(NamedTuple):
    """The minimum of a loss curve.

    Attributes:
      rate: Learning rate at the minimum, interpolated between the grid points.
      edge: End of the grid at which the minimum lies, so that the true minimum may lie beyond; empty otherwise.
    """

    rate: float
    edge: Edge


def fit_minima(rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, "curves n"], reach: float = 0.0) -> list[Best]:
    """Fit a parabola through the lowest loss of each curve and its two neighbours, in log loss against log rate.

    Runs that diverged (not finite) count as higher than every other. Next to one, or at an edge, the measured rate is
    returned.

    On a dense grid three neighbouring rates measure the noise of their losses. A positive ``reach`` fits the parabola
    by least squares to all rates within this distance of the lowest loss.

    Args:
      rates: Learning rates, ascending and above 0.
      losses: Loss of every curve at every rate, above 0; NaN or infinity if the run diverged.
      reach: Distance in log rate from the lowest loss up to which rates belong to the fit; the two neighbours always
        do.

    Returns:
      The minimum of every curve.

    Raises:
      InputError: If there are fewer than three rates, they do not ascend, or every run of a curve diverged.

    Examples:
      >>> round(fit_minima(np.array([0.1, 1.0, 10.0]), np.array([[2.0, 1.0, 2.0]]))[0].rate, 6)
      1.0
    """
    rates, losses = np.asarray(rates, np.float64), np.asarray(losses, np.float64)
    if len(rates) < 3 or len(rates) != losses.shape[1] or not (np.diff(rates) > 0).all() or rates[0] <= 0:
        raise InputError(f"rates must be three or more, ascending, above 0, and one per loss, got {rates.tolist()}")
    # A run that diverged is never the lowest, and never part of a parabola.
    losses = np.where(np.isfinite(losses), losses, np.inf)
    lowest = np.argmin(losses, axis=1)
    curves = np.arange(len(losses))
    if not np.isfinite(losses[curves, lowest]).all():
        raise InputError("every run diverged. Add lower learning rates to the grid.")
    # The three points around each minimum. At an edge they are those of the nearest inner point, and are not used.
    inner = np.clip(lowest, 1, len(rates) - 2)
    log_rates = np.log(rates)
    y0, y1, y2 = np.log([losses[curves, inner + side] for side in (-1, 0, 1)])
    left, right = log_rates[inner] - log_rates[inner - 1], log_rates[inner + 1] - log_rates[inner]
    with np.errstate(invalid="ignore", divide="ignore"):
        # Parabola y1 + tilt x + curvature x^2 through (-left, y0) and (right, y2).
        curvature = ((y2 - y1) / right - (y1 - y0) / left) / (left + right)
        tilt = (y1 - y0) / left + curvature * left
        # At an edge the vertex may lie anywhere, so that the measured point is used.
        has_vertex = (inner == lowest) & np.isfinite(y0 + y2)
        shift = np.where(has_vertex & (curvature > 0), -tilt / (2 * curvature), 0.0)
        best_rates = np.where(has_vertex, rates[lowest] * np.exp(shift), rates[lowest])
    # Curves that have more rates within reach than the three.
    for curve in np.flatnonzero(has_vertex) if reach > 0 else ():
        distances = log_rates - log_rates[lowest[curve]]
        is_fitted = (np.abs(distances) <= reach) & np.isfinite(losses[curve])
        is_fitted[lowest[curve] - 1 : lowest[curve] + 2] = True
        if np.sum(is_fitted) > 3:
            x, y = distances[is_fitted], np.log(losses[curve, is_fitted])
            quadratic, linear, _ = np.polyfit(x, y, 2)
            # A parabola without a minimum among its points leaves the vertex through three.
            if quadratic > 0 and x[0] <= (vertex := -linear / (2 * quadratic)) <= x[-1]:
                best_rates[curve] = rates[lowest[curve]] * math.exp(vertex)
    edges: list[Edge] = ["low" if i == 0 else "high" if i == len(rates) - 1 else "" for i in lowest.tolist()]
    return [Best(*best) for best in zip(best_rates.tolist(), edges, strict=True)]


def grid_gaps(rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, "curves n"]) -> Float[np.ndarray, " curves"]:
    """Bound how far the minimum between the rates may lie below the lowest measured loss of each curve.

    In log loss against log rate, the bound is `HIDDEN_SHARE` of the height of the chord between the two neighbours
    above the lowest loss, on an uneven grid multiplied by the ratio of the sides. Next to a run that diverged, the
    bound is that of a convex curve: the step down to the lowest loss once more. Between two such runs it is infinite.
    At an edge it is 0, because the region beyond does not depend on the grid's spacing.

    Args:
      rates: Learning rates, ascending and above 0.
      losses: Loss of every curve at every rate, above 0; NaN or infinity if the run diverged.

    Returns:
      The bounds in the unit of the loss.

    Examples:
      >>> grid_gaps(np.array([0.1, 1.0, 10.0]), np.array([[1.2, 1.0, 1.2]])).round(4).tolist()
      [0.0547]
    """
    is_inner, lowest, neighbours, (left, right) = _around_lowest(np.log(np.asarray(rates, np.float64)), losses)
    with np.errstate(invalid="ignore"):
        left_rise, right_rise = np.log(neighbours / lowest)
        # Height of the chord above the lowest rate: the neighbours' heights, weighted by the opposite sides.
        chord = (left_rise * right + right_rise * left) / (left + right)
        fitted = HIDDEN_SHARE * chord * np.maximum(left, right) / np.minimum(left, right)
        # One neighbour diverged: continue the slope of the other side, which convexity allows at most.
        next_to_diverged = np.where(np.isfinite(left_rise), left_rise * right / left, right_rise * left / right)
        gaps = lowest * np.where(np.isfinite(chord), fitted, next_to_diverged)
    return np.where(is_inner, gaps, 0.0)


def rate_gaps(rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, "curves n"]) -> Float[np.ndarray, " curves"]:
    """Bound how far the best rate may lie from the lowest measured loss of each curve if no parabola can be fitted.

    Next to a run that diverged, the bound is half of the wider step to a neighbour, the largest distance of a
    parabola's vertex. Otherwise it is 0, because the vertex is fitted. At an edge it is 0 too, because the region
    beyond does not depend on the grid's spacing.

    Args:
      rates: Learning rates, ascending and above 0.
      losses: Loss of every curve at every rate, above 0; NaN or infinity if the run diverged.

    Returns:
      The bounds in log2 of the rate.

    Examples:
      >>> rate_gaps(np.array([1.0, 2.0, 8.0]), np.array([[1.2, 1.0, np.nan]])).tolist()
      [1.0]
    """
    is_inner, _, neighbours, (left, right) = _around_lowest(np.log2(np.asarray(rates, np.float64)), losses)
    is_beside = ~np.isfinite(neighbours).all(axis=0)
    return np.where(is_inner & is_beside, np.maximum(left, right) / 2, 0.0)


def _around_lowest(log_rates: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return by curve whether the lowest loss is no edge, that loss, its neighbours' losses and the steps to them."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    index = np.argmin(losses, axis=1)
    inner = np.clip(index, 1, len(log_rates) - 2)
    low, middle, high = losses[np.arange(len(losses)), inner + np.array([[-1], [0], [1]])]
    steps = np.array([log_rates[inner] - log_rates[inner - 1], log_rates[inner + 1] - log_rates[inner]])
    return index == inner, middle, np.array([low, high]), steps


def predicted_slopes(
    optimizer: Literal["sgd", "momentum", "adam", "adamw"], kappa: float, *, trained: Literal["both", "B"] = "both"
) -> dict[str, float]:
    """Predict d log (best rate) / d log r by regime; see the module's documentation.

    Args:
      optimizer: Optimizer; the prediction depends on its family.
      kappa: Exponent of the scaling rule gamma = alpha / r^kappa.
      trained: Trained factors. With B alone there is no regime in which A moves.

    Returns:
      The slopes by regime: ``"signal"`` and ``"cross-talk"`` for the first step, in which only B moves; ``"A moves"``
      for a long run in the signal regime.

    Examples:
      >>> predicted_slopes("adam", 0.5)
      {'signal': -0.5, 'cross-talk': 0.0, 'A moves': -0.25}
    """
    # Solve for the exponent of eta that cancels those of gamma^p and of the rank in the size of the step.
    if optimizer in ("sgd", "momentum"):
        predicted = {"signal": 2 * kappa - 1, "cross-talk": 2 * kappa - 0.5, "A moves": kappa}
    else:
        predicted = {"signal": kappa - 1, "cross-talk": kappa - 0.5, "A moves": (kappa - 1) / 2}
    return {regime: slope for regime, slope in predicted.items() if trained == "both" or regime != "A moves"}
