"""Curves of loss against learning rate of a real model's runs, and paired comparisons of rules.

runs = trained_runs.read_runs(folder)
best = best_rates(curves_of_runs(runs))
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.lab.sweep.trained_runs import kappa_of
from rora_theory.runs import frames
from rora_theory.stats.estimate import over_seeds
from rora_theory.stats.rate_curves import COLUMNS, Comparison, Curve, compare_curves, rule_pairs
from rora_theory.stats.trained_runs import TrainedRun, curve_of_runs, loss_difference

if TYPE_CHECKING:
    import pandas as pd

BOOTSTRAPS = 400
"""Number of bootstrap samples of the held-out records."""


def format_best(row: Any) -> str:
    """Format a row of `rate_curves.best_rates`.

    The text has < or > at the grid's edge, the rate, and the factor that is half of its 95% interval.
    """
    mark = {"low": "<", "high": ">"}.get(row["edge"], "")
    error = ""
    if row["log2_half_width"] is not None and not np.isnan(row["log2_half_width"]):
        error = f" ({2 ** row['log2_half_width']:.2f})"
    return f"{mark}{row['best_rate']:.3g}{error}"


def curves_of_runs(runs: Sequence[TrainedRun]) -> list[Curve]:
    """Return the curve of every method and rank, over the seeds that ran at all of its learning rates.

    Raises:
      InputError: If no method and rank has such a seed and three or more rates.
    """
    curves = []
    for method in dict.fromkeys(run.method for run in runs):
        method_runs = [run for run in runs if run.method == method]
        kappa = kappa_of(method_runs)
        for rank in sorted({run.rank for run in method_runs}):
            # Use only seeds that ran at every rate: seeds near the best rates alone must not shorten the curve.
            rank_runs = [run for run in method_runs if run.rank == rank]
            rates, cells = {run.rate for run in rank_runs}, {(run.seed, run.rate) for run in rank_runs}
            complete = [run for run in rank_runs if all((run.seed, rate) in cells for rate in rates)]
            if len(rates) >= 3 and complete:
                curves.append(curve_of_runs(complete, kappa=kappa, draws=BOOTSTRAPS))
    if not curves:
        raise InputError("no method and rank has a seed that ran at three or more learning rates. Run more rates.")
    return curves


def rate_loss_table(runs: Sequence[TrainedRun]) -> "pd.DataFrame":
    """Return a row for each run, in the columns that all tables of loss against rate share."""
    kappas = {
        method: kappa_of([run for run in runs if run.method == method])
        for method in dict.fromkeys(run.method for run in runs)
    }
    rows = [
        {"optimizer": "adamw", "trained": "both", "rule": run.method, "kappa": kappas[run.method]}
        | {"rank": run.rank, "scaling": run.gamma, "learning_rate": run.rate, "seed": run.seed}
        | {"loss_held_out": run.loss}
        for run in runs
    ]
    return frames.from_rows(rows, COLUMNS)


def compare_by_records(curves: Sequence[Curve], runs: Sequence[TrainedRun]) -> list[Comparison]:
    """Compare rules at the largest rank, each at the grid's rate of lowest mean loss, record by record.

    All seeds that ran at both rates are averaged, including seeds without a curve. The error is over seeds and records,
    see `rate_curves.combine_errors`. If one of these runs diverged, the verdict names it and is not settled; the
    difference is then that of the seeds that finished both runs, or that of the curves' lowest losses without an error.
    """
    comparisons = []
    for first, second in rule_pairs(curves):
        # Runs of both rules at their best rates, by seed.
        rates = [curve.rates[int(np.argmin(np.mean(curve.losses, axis=0)))] for curve in (first, second)]
        groups = [
            {run.seed: run for run in runs if (run.method, run.rank, run.rate) == (curve.rule, curve.rank, rate)}
            for curve, rate in zip((first, second), rates, strict=True)
        ]
        seeds = sorted(set(groups[0]) & set(groups[1]))
        if not seeds:
            continue
        diverged = [
            f"{curve.rule} at seed {seed}"
            for curve, group in zip((first, second), groups, strict=True)
            for seed in seeds
            if not math.isfinite(group[seed].loss)
        ]
        # Difference over the seeds that finished both runs.
        finished = [seed for seed in seeds if all(math.isfinite(group[seed].loss) for group in groups)]
        if finished:
            losses = loss_difference(*([group[seed] for seed in finished] for group in groups))
        else:
            losses = over_seeds(np.array([np.mean(first.lowest_losses()) - np.mean(second.lowest_losses())]))
        # A diverged run leaves its mark on the verdict, because it is not among the averaged losses.
        result = compare_curves(first, second, losses)
        if diverged:
            prefix = f"{result.verdict}; " if finished else ""
            verdict = f"{prefix}diverged at the best rates: {', '.join(diverged)}, so not settled"
            result = replace(result, verdict=verdict)
        comparisons.append(result)
    return comparisons
