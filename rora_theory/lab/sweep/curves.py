"""Curves of loss against learning rate after a number of steps: their best rates, and paired comparisons.

A parabola through the three lowest losses of a coarse grid is a noisy estimate of a best rate. It is reported beside
the parabola through the whole curve. Where the two differ by more than their intervals, the grid is too coarse.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from rora_theory.lab.finetune.config import LossOn
from rora_theory.lab.sweep.runs import FULL, SweepRun
from rora_theory.runs import frames
from rora_theory.stats.curve_optima import whole_curve_log2_rates
from rora_theory.stats.estimate import ROUNDING, Estimate
from rora_theory.stats.rate_curves import (
    BEST_COLUMNS,
    Curve,
    at_shared_seeds,
    compare_curves,
    estimate_loss_difference,
    tabulate_best_rates,
    weighted_log2_rates,
)
from rora_theory.stats.trained_runs import TrainedRun, curves_of_runs, loss_difference

THREE_POINTS = "three points"
"""Name of the parabola through the lowest loss and its neighbours."""

ESTIMATORS: Mapping[str, Callable[..., Estimate]] = {
    "whole curve": whole_curve_log2_rates,
    THREE_POINTS: weighted_log2_rates,
}
"""Estimators of a weighted sum of log2 best rates, by name."""


def curves_at(runs: Sequence[SweepRun], tokens: Sequence[int], step: int, *, draws: int) -> list[Curve]:
    """Return the curves of loss against learning rate after a number of steps.

    There is a curve for every rank and gain, and for every method without a rank (which is the curve's rule, with
    rank 0 and gamma 1), if runs at three or more rates reach the step.

    Args:
      runs: Runs of the grid, see `runs.read_runs`.
      tokens: Number of tokens of each held-out record.
      step: Number of steps.
      draws: Number of bootstrap samples of the records.

    Returns:
      The curves in ascending order of rank and scaling.
    """
    trained = [run.at(step, tokens) for run in runs if run.rate and run.reaches(step)]
    return curves_of_runs(sorted(trained, key=lambda run: (run.rank, run.gamma, run.method)), draws=draws)


def best_rate_table(curves: Sequence[Curve], step: int) -> pd.DataFrame:
    """Return the best rate and the lowest loss of every curve after a number of steps."""
    rows = [
        row | setting_labels(curve) | {"step": step, "method": curve.rule}
        for curve, row in zip(curves, frames.rows(tabulate_best_rates(curves)), strict=True)
    ]
    columns = ["step", "rank", "gain", *BEST_COLUMNS[BEST_COLUMNS.index("best_rate") :]]
    # Without another method, a missing rank is full fine-tuning.
    if {curve.rule for curve in curves} - {"lora", FULL}:
        columns.append("method")
    return frames.from_rows(rows, columns) if rows else pd.DataFrame()


def setting_labels(curve: Curve) -> dict[str, Any]:
    """Return the rank and gain of a curve, which are None for full fine-tuning."""
    return {"rank": curve.rank or None, "gain": curve.gain if curve.rank else None}


def comparison_pairs(
    curves: Sequence[Curve], other_runs: Mapping[str, Sequence[Curve]] | None = None
) -> list[tuple[Curve, Curve, str, str]]:
    """Return the pairs of curves that `compare_best_rates` compares, each followed by the names of both.

    A pair has only the seeds of both, so that their noise cancels; without such a seed it is left out.
    """
    # First every adapter with full fine-tuning.
    adapters = [curve for curve in curves if curve.rank]
    pairs = [(curve, full, _rank_name(curve), FULL) for curve in adapters for full in curves if full.rule == FULL]
    # With the largest rank at one gain.
    for curve in adapters:
        same_gain = (other for other in adapters if other.gain == curve.gain)
        largest = max(same_gain, key=lambda other: other.rank)
        if largest is not curve:
            pairs.append((curve, largest, _rank_name(curve), _rank_name(largest)))
    # With the largest gain at one rank.
    for curve in adapters:
        strongest = max((other for other in adapters if other.rank == curve.rank), key=lambda other: other.gain)
        if strongest is not curve:
            name, strongest_name = (_gain_name(member.gain) for member in (curve, strongest))
            pairs.append((curve, strongest, name, strongest_name))
    # With the same setting in other runs.
    for name, other_curves in (other_runs or {}).items():
        by_setting = {(other.rank, other.scaling): other for other in other_curves if other.rank or other.rule == FULL}
        pairs += [
            (curve, by_setting[curve.rank, curve.scaling], _rank_name(curve), name)
            for curve in curves
            if (curve.rank, curve.scaling) in by_setting
        ]
    return [
        (shared[0], shared[1], first_name, second_name)
        for first, second, first_name, second_name in pairs
        if (shared := at_shared_seeds(first, second))
    ]


def compare_best_rates(
    curves: Sequence[Curve], step: int, other_runs: Mapping[str, Sequence[Curve]] | None = None
) -> pd.DataFrame:
    """Compare curves after a number of steps, each at its own best rate.

    An adapter is compared with full fine-tuning of the same modules, with the largest rank at its gain, and with
    the largest gain at its rank. The last compares LoRA with RoRA of the same alpha if the gains are alpha and
    alpha sqrt(r). Every curve is compared with the same curve of other runs.

    Args:
      curves: `curves_at` the step.
      step: Number of steps.
      other_runs: `curves_at` the step of other runs, by the settings in which they differ, see
        `runs.read_comparison_runs`.

    Returns:
      A row for each pair that has curves with a common seed: ``step``, ``rank`` and ``gain`` of the first curve and
      ``compared_with``, the name of the second; ``ratio``, the first best rate over the second, with
      ``ratio_log2_error``; ``difference`` of the lowest losses with its 95% ``half_width``, which includes
      ``grid_error``, and ``error_over``; ``seeds``; and ``verdict``, see `stats.rate_curves.compare_curves`.
    """
    columns = ["ratio", "ratio_log2_error", "ratio_log2_half_width", "difference", "half_width"]
    columns += ["grid_error", "error_over"]
    rows = []
    for first, second, first_name, second_name in comparison_pairs(curves, other_runs):
        curve, other = replace(first, rule=first_name), replace(second, rule=second_name)
        result = compare_curves(curve, other, estimate_loss_difference(curve, other))
        row = {"step": step} | setting_labels(first) | {"compared_with": second_name}
        row |= {column: getattr(result, column) for column in columns}
        rows.append(row | {"seeds": len(curve.losses), "verdict": result.verdict})
    return frames.from_rows(rows, list(rows[0])) if rows else pd.DataFrame()


def _rank_name(curve: Curve) -> str:
    return f"r = {curve.rank}" if curve.rank else FULL


def _gain_name(gain: float) -> str:
    return f"gamma r = {gain:g}"


def rate_table(curves: Mapping[LossOn, Sequence[Curve]], step: int) -> pd.DataFrame:
    """Estimate the best rate of every curve after a number of steps.

    Args:
      curves: `curves_at` the step, by the tokens of the loss.
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
    """Estimate the ratios of the best rates that `compare_best_rates` compares.

    Args:
      curves: `curves_at` the step, by the tokens of the loss.
      step: Number of steps.
      other_runs: Curves of other runs by description, by the tokens of the loss.

    Returns:
      The columns of `rate_table`, with ``compared_with`` and with ``ratio``, the first best rate over the second, in
      place of ``best_rate``.
    """
    rows = []
    for loss_on, loss_curves in curves.items():
        for first, second, _, second_name in comparison_pairs(loss_curves, (other_runs or {}).get(loss_on)):
            labels = {"step": step} | setting_labels(first) | {"compared_with": second_name, "loss_on": loss_on}
            edge = " ".join(dict.fromkeys(curve.edge for curve in (first, second) if curve.edge))
            rows += _estimates(labels, "ratio", (1.0, -1.0), (first, second), edge)
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


def compare_at_one_rate(runs: Sequence[SweepRun], tokens: Sequence[int], step: int) -> pd.DataFrame:
    """Compare every gain with the largest gain of its rank at the same learning rate.

    In contrast, `compare_best_rates` compares curves at their own best rates.

    Args:
      runs: Runs of the grid, see `runs.read_runs`.
      tokens: Number of tokens of each held-out record.
      step: Number of steps.

    Returns:
      A row for each rank, gain and rate: ``step``, ``rank``, ``gain``, ``compared_with`` and ``learning_rate``;
      ``difference`` of the losses with its 95% ``half_width`` and ``error_over``, see `loss_difference`; and ``seeds``,
      the number of seeds that did not diverge at either gain.
    """
    # Runs by rank, gain and rate, then by seed.
    by_setting: dict[tuple[int, float, float], dict[int, TrainedRun]] = {}
    for run in runs:
        if run.rank and run.gain and run.losses(step) is not None:
            by_setting.setdefault((run.rank, run.gain, run.rate), {})[run.seed] = run.at(step, tokens)
    # Gains ascend, so that the last one of a rank, its largest, remains.
    strongest = {rank: gain for rank, gain, _ in sorted(by_setting)}
    rows = []
    for rank, gain, rate in sorted(by_setting):
        by_seed, other_by_seed = by_setting[rank, gain, rate], by_setting.get((rank, strongest[rank], rate), {})
        seeds = sorted(by_seed.keys() & other_by_seed.keys())
        if gain == strongest[rank] or not seeds:
            continue
        # Runs of both gains with the same seeds and records, so that the difference is paired.
        difference = loss_difference([by_seed[seed] for seed in seeds], [other_by_seed[seed] for seed in seeds])
        row = {"step": step, "rank": rank, "gain": gain, "compared_with": _gain_name(strongest[rank])}
        row |= {"learning_rate": rate, "difference": difference.value}
        row |= {"half_width": difference.half_width() if difference.has_error else None}
        rows.append(row | {"error_over": difference.over, "seeds": len(seeds)})
    return frames.from_rows(rows, list(rows[0])) if rows else pd.DataFrame()
