"""Best rates and their ratios by every estimator and by both losses, each with its interval.

A parabola through the three lowest losses of a coarse grid is a noisy estimate of a best rate. It is reported beside
the parabola through the whole curve. Where the two differ by more than their intervals, the grid is too coarse.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from rora_theory.lab.finetune.config import LossOn
from rora_theory.lab.sweep.curves import comparison_pairs, setting_labels
from rora_theory.runs import frames
from rora_theory.stats.curve_optima import whole_curve_log2_rates
from rora_theory.stats.estimate import ROUNDING, Estimate
from rora_theory.stats.rate_curves import Curve, at_shared_seeds, weighted_log2_rates

THREE_POINTS = "three points"
"""Name of the parabola through the lowest loss and its neighbours."""

ESTIMATORS: Mapping[str, Callable[..., Estimate]] = {
    "whole curve": whole_curve_log2_rates,
    THREE_POINTS: weighted_log2_rates,
}
"""Estimators of a weighted sum of log2 best rates, by name."""


def rate_table(curves: Mapping[LossOn, Sequence[Curve]], step: int) -> pd.DataFrame:
    """Estimate the best rate of every curve after a number of steps.

    Args:
      curves: `curves.curves_at` the step, by the tokens of the loss.
      step: Number of steps.

    Returns:
      A row for each curve, loss and estimator: ``step``, ``rank``, ``gain``; ``loss_on``, the tokens of the loss;
      ``estimate``, a name from `ESTIMATORS`; ``best_rate`` with its 95% interval from ``low`` to ``high``, ``seeds``
      and ``error_over``; and ``edge``, the end of the grid at which the lowest loss lies, where the rate is a bound. An
      interval is missing if it is not known. All intervals are conditional on one sample of training data.
    """
    rows = []
    for loss_on, loss_curves in curves.items():
        for curve in loss_curves:
            labels = {"step": step} | setting_labels(curve) | {"loss_on": loss_on}
            rows += _estimates(labels, "best_rate", (1.0,), [curve], curve.edge)
    return frames.from_rows(rows, list(rows[0])) if rows else pd.DataFrame()


def ratio_table(
    curves: Mapping[LossOn, Sequence[Curve]],
    step: int,
    other_runs: Mapping[LossOn, Mapping[str, Sequence[Curve]]] | None = None,
) -> pd.DataFrame:
    """Estimate the ratios of the best rates that `curves.compare_best_rates` compares.

    Args:
      curves: `curves.curves_at` the step, by the tokens of the loss.
      step: Number of steps.
      other_runs: Curves of other runs by description, by the tokens of the loss.

    Returns:
      The columns of `rate_table`, with ``compared_with`` and with ``ratio``, the first best rate over the second, in
      place of ``best_rate``.
    """
    rows = []
    for loss_on, loss_curves in curves.items():
        for first, second, _, second_name in comparison_pairs(loss_curves, (other_runs or {}).get(loss_on)):
            shared = at_shared_seeds(first, second)
            if shared:
                labels = {"step": step} | setting_labels(first) | {"compared_with": second_name, "loss_on": loss_on}
                edge = " ".join(dict.fromkeys(curve.edge for curve in shared if curve.edge))
                rows += _estimates(labels, "ratio", (1.0, -1.0), shared, edge)
    return frames.from_rows(rows, list(rows[0])) if rows else pd.DataFrame()


def _estimates(
    labels: Mapping[str, Any], name: str, weights: Sequence[float], curves: Sequence[Curve], edge: str
) -> list[dict[str, Any]]:
    """Return a row for each estimator with an optimum."""
    rows = []
    for estimator, compute in ESTIMATORS.items():
        logs = compute(weights, *curves)
        if math.isnan(logs.value):
            continue
        # An end of the grid is a measured rate itself, whose scatter is no error.
        is_end = edge and (estimator == THREE_POINTS or logs.error < ROUNDING)
        has_interval = logs.has_error and not is_end
        width = logs.half_width() if has_interval and math.isfinite(logs.half_width()) else math.nan
        row = {**labels, "estimate": estimator, name: 2**logs.value}
        row |= {"low": 2 ** (logs.value - width), "high": 2 ** (logs.value + width)}
        rows.append(row | {"seeds": len(curves[0].losses), "error_over": logs.over, "edge": edge})
    return rows
