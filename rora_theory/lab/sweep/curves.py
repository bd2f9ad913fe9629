"""Curves of loss against learning rate after a number of steps, and paired comparisons of curves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from rora_theory.lab.sweep.runs import FULL, SweepRun
from rora_theory.runs import frames
from rora_theory.stats.rate_curves import (
    Curve,
    at_shared_seeds,
    compare_curves,
    estimate_loss_difference,
    tabulate_best_rates,
)
from rora_theory.stats.trained_runs import TrainedRun, curves_of_runs, loss_difference


def curves_at(runs: Sequence[SweepRun], tokens: Sequence[int], step: int, *, draws: int) -> list[Curve]:
    """Return the curves of loss against learning rate after a number of steps.

    There is a curve for every rank and gain, and for every method without a rank (which is the curve's rule, with
    rank 0 and gamma 1), if runs at three or more rates reach the step.

    Args:
      runs: Runs of the grid, see `runs.merge_repeated_runs`.
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
    frame = pd.DataFrame(tabulate_best_rates(curves)).drop(columns=["optimizer", "trained", "kappa"], errors="ignore")
    if not len(frame):
        return frame
    # Without another method, a missing rank is full fine-tuning.
    rules = frame.pop("rule")
    if set(rules) - {"lora", FULL}:
        frame["method"] = rules
    frame.insert(0, "step", step)
    frame.insert(2, "gain", [curve.gain if curve.rank else None for curve in curves])
    frame["rank"] = pd.array([curve.rank or None for curve in curves], dtype="Int64")
    return frames.from_rows(frames.rows(frame), list(frame))


def setting_labels(curve: Curve) -> dict[str, Any]:
    """Return the rank and gain of a curve, which are None for full fine-tuning."""
    return {"rank": curve.rank or None, "gain": curve.gain if curve.rank else None}


def comparison_pairs(
    curves: Sequence[Curve], other_runs: Mapping[str, Sequence[Curve]] | None = None
) -> list[tuple[Curve, Curve, str, str]]:
    """Return the pairs of curves that `compare_best_rates` compares, each followed by the names of both."""
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
    return pairs


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
    # Estimates of a pair use only the seeds of both, so that their noise cancels.
    for first, second, first_name, second_name in comparison_pairs(curves, other_runs):
        shared = at_shared_seeds(first, second)
        if shared:
            curve, other = replace(shared[0], rule=first_name), replace(shared[1], rule=second_name)
            result = compare_curves(curve, other, estimate_loss_difference(curve, other))
            row = {"step": step} | setting_labels(first) | {"compared_with": second_name}
            row |= {column: getattr(result, column) for column in columns}
            rows.append(row | {"seeds": len(curve.losses), "verdict": result.verdict})
    return frames.from_rows(rows, list(rows[0])) if rows else pd.DataFrame()


def _rank_name(curve: Curve) -> str:
    return f"r = {curve.rank}" if curve.rank else FULL


def _gain_name(gain: float) -> str:
    return f"gamma r = {gain:g}"


def compare_at_one_rate(runs: Sequence[SweepRun], tokens: Sequence[int], step: int) -> pd.DataFrame:
    """Compare every gain with the largest gain of its rank at the same learning rate.

    In contrast, `compare_best_rates` compares curves at their own best rates.

    Args:
      runs: Runs of the grid, see `runs.merge_repeated_runs`.
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
