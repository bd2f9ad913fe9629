r"""The learning rate that trains best, and how it should move with the rank.

For a scaling :math:`\gamma = \alpha/r^\kappa` and a rate :math:`\eta`, the first step is of size

- SGD: :math:`\eta \gamma^2 r` where the signal leads, :math:`\eta \gamma^2 \sqrt r` where cross-talk does;
- Adam: :math:`\eta \gamma r` and :math:`\eta \gamma \sqrt r`.

A best rate that keeps it constant moves as the power of r below. Once A has moved further than it started, Adam's
change is of size :math:`\eta^2 \gamma r`, and the best rate moves half as fast; SGD's grows as the exponential of
:math:`\gamma \eta`, and the best rate moves as :math:`1/\gamma` (`rora_theory.theory.horizon`).
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError

Edge = Literal["", "low", "high"]

HIDDEN = 0.3
"""Of the chord's height above the least of three even points, what the minimum between them may lie below it. A
parabola hides a quarter at most; the rest is for curves that are none."""


class Best(NamedTuple):
    """The minimum of a loss curve.

    Attributes:
      rate: where the loss is least, between the grid's rates.
      loss: there; at an edge the grid's.
      edge: whether the minimum is the grid's lowest or highest rate, so that the true one may lie beyond.
    """

    rate: float
    loss: float
    edge: Edge


def best_rate(rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]) -> Best:
    """Vertex of the parabola through the least loss and its two neighbours, in log loss against log rate.

    Diverged runs (not finite) are above every other. Beside one, or at an edge, the grid's own rate is taken.

    Args:
      rates: ascending, above 0.
      losses: above 0; nan or inf where the run diverged.

    Raises:
      InputError: fewer than three rates, not ascending, or every run diverged.

    Examples:
      >>> round(best_rate(np.array([0.1, 1.0, 10.0]), np.array([2.0, 1.0, 2.0])).rate, 6)
      1.0
    """
    losses = np.asarray(losses, np.float64)
    return minima(rates, losses.reshape(1, -1))[0]


def minima(rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, "curves n"]) -> list[Best]:
    """`best_rate` of every curve over the same rates; raises as it."""
    rates, losses = np.asarray(rates, np.float64), np.asarray(losses, np.float64)
    if len(rates) < 3 or len(rates) != losses.shape[1] or not (np.diff(rates) > 0).all() or rates[0] <= 0:
        raise InputError(f"rates are {rates.tolist()}; accepted are three or more, ascending, above 0, one a loss")
    losses = np.where(np.isfinite(losses), losses, np.inf)
    index = np.argmin(losses, axis=1)
    every = np.arange(len(losses))
    if not np.isfinite(losses[every, index]).all():
        raise InputError("every run diverged; accepted is a grid with a rate that trains")
    inner = np.clip(index, 1, len(rates) - 2)
    logs, (y0, y1, y2) = np.log(rates), np.log([losses[every, inner + side] for side in (-1, 0, 1)])
    left, right = logs[inner] - logs[inner - 1], logs[inner + 1] - logs[inner]
    with np.errstate(invalid="ignore", divide="ignore"):
        # Of y1 + tilt x + curvature x^2 through (-left, y0) and (right, y2).
        curvature = ((y2 - y1) / right - (y1 - y0) / left) / (left + right)
        tilt = (y1 - y0) / left + curvature * left
        vertex = (inner == index) & np.isfinite(y0 + y2)
        shift = np.where(vertex & (curvature > 0), -tilt / (2 * curvature), 0.0)  # at an end it may lie anywhere
        found = np.where(vertex, rates[index] * np.exp(shift), rates[index])
        least = np.where(vertex, np.exp(y1 + tilt * shift / 2), losses[every, index])
    edges: list[Edge] = ["low" if i == 0 else "high" if i == len(rates) - 1 else "" for i in index.tolist()]
    return [Best(*one) for one in zip(found.tolist(), least.tolist(), edges, strict=True)]


def grid_gap(rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]) -> float:
    """How far below the least measured loss the minimum between the rates may lie: a bound, in the loss's unit.

    In log loss against log rate, `HIDDEN` of the height of the chord between the two neighbours above the least loss,
    on an uneven grid times the ratio of the sides. Beside a run that diverged it is what a convex curve can lose there:
    the step down to the least loss once more. Between two it is infinite. At an edge it is 0: what lies beyond is no
    matter of the grid's spacing.

    Args:
      rates, losses: see `best_rate`.

    Examples:
      >>> round(grid_gap(np.array([0.1, 1.0, 10.0]), np.array([1.2, 1.0, 1.2])), 4)
      0.0547
    """
    losses = np.where(np.isfinite(losses), np.asarray(losses, np.float64), np.inf)
    index = int(np.argmin(losses))
    if index in (0, len(losses) - 1):
        return 0.0
    sides = np.diff(np.log(np.asarray(rates, np.float64)[index - 1 : index + 2]))
    rises = np.log(losses[[index - 1, index + 1]] / losses[index])
    known = np.isfinite(rises)
    if known.all():
        chord = float(rises @ sides[::-1] / np.sum(sides))
        return float(losses[index] * HIDDEN * chord * np.max(sides) / np.min(sides))
    return float(losses[index] * rises[known][0] * sides[~known][0] / sides[known][0]) if known.any() else math.inf


def rate_gap(rates: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]) -> float:
    """How far from the least measured loss's rate the best rate may lie where `best_rate` has no parabola: a bound, in
    log2 of the rate.

    Beside a run that diverged it is half of the wider step to a neighbour, which is how far a parabola's vertex can
    lie; elsewhere 0, the vertex being found. At an edge it is 0 too: what lies beyond is no matter of the spacing.

    Args:
      rates, losses: see `best_rate`.

    Examples:
      >>> round(rate_gap(np.array([1.0, 2.0, 8.0]), np.array([1.2, 1.0, np.nan])), 9)
      1.0
    """
    losses = np.where(np.isfinite(losses), np.asarray(losses, np.float64), np.inf)
    index = int(np.argmin(losses))
    if index in (0, len(losses) - 1) or np.isfinite(losses[[index - 1, index + 1]]).all():
        return 0.0
    return float(np.max(np.diff(np.log2(np.asarray(rates, np.float64)[index - 1 : index + 2]))) / 2)


def predicted_slopes(
    optimizer: Literal["sgd", "momentum", "adam", "adamw"], kappa: float, *, trained: Literal["both", "B"] = "both"
) -> dict[str, float]:
    """d log (best rate) / d log r that keeps the step's size, by what leads it (module docstring).

    Args:
      optimizer: its family decides.
      kappa: the rule's power, gamma = alpha / r^kappa.
      trained: the factors that are; with B alone there is no long run in which A moves.

    Returns:
      ``"signal"`` and ``"cross-talk"``: the first step, B alone moving; ``"A moves"``: a long run, signal led.

    Examples:
      >>> predicted_slopes("adam", 0.5)
      {'signal': -0.5, 'cross-talk': 0.0, 'A moves': -0.25}
    """
    if optimizer in ("sgd", "momentum"):
        found = {"signal": 2 * kappa - 1, "cross-talk": 2 * kappa - 0.5, "A moves": kappa}
    else:
        found = {"signal": kappa - 1, "cross-talk": kappa - 0.5, "A moves": (kappa - 1) / 2}
    return {leads: slope for leads, slope in found.items() if trained == "both" or leads != "A moves"}
