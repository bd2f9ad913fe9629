"""Loss against learning rate of a real model's runs: their curves, their table, and rules compared record by record.

runs = trained_runs.read_runs(folder)
found = best_rates(curves_of_runs(runs))
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.io import frames
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.rate_curves import COLUMNS, Comparison, Curve, comparison, paired_losses, pairs
from rora_theory.sweep import trained_runs
from rora_theory.sweep.trained_runs import TrainedRun

if TYPE_CHECKING:
    import pandas as pd


def best_in_words(row: Any) -> str:
    """A row of `rate_curves.best_rates`: < or > at the grid's edge, the rate, and × / ÷ half of its 95% interval."""
    mark = {"low": "<", "high": ">"}.get(row["edge"], "")
    error = ""
    if row["log2_half_width"] is not None and not np.isnan(row["log2_half_width"]):
        error = f" ({2 ** row['log2_half_width']:.2f})"
    return f"{mark}{row['best_rate']:.3g}{error}"


def curves_of_runs(runs: Sequence[TrainedRun]) -> list[Curve]:
    """By method and rank: the seeds that ran at every rate that any of them ran at.

    Raises:
      InputError: none has a seed that ran at three or more rates.
    """
    found = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        kappa = trained_runs.kappa_of(own)
        for rank in sorted({run.rank for run in own}):
            by_seed: dict[int, dict[float, TrainedRun]] = {}
            for run in own:
                if run.rank == rank:
                    by_seed.setdefault(run.seed, {})[run.rate] = run
            rates = sorted({rate for seed in by_seed.values() for rate in seed})
            whole = {seed: by_seed[seed] for seed in sorted(by_seed) if len(by_seed[seed]) == len(rates)}
            if len(rates) < 3 or not whole:
                continue
            losses = np.array([[one[rate].loss for rate in rates] for one in whole.values()])
            drawn = [trained_runs.bootstrap([one[rate] for rate in rates]) for one in whole.values()]
            resampled = None if any(one is None for one in drawn) else np.stack(drawn, axis=1)  # type: ignore[arg-type]
            gamma, seeds = next(iter(whole.values()))[rates[0]].gamma, tuple(whole)
            found.append(Curve("adamw", "both", method, kappa, rank, gamma, np.array(rates), losses, resampled, seeds))
    if not found:
        raise InputError("no method and rank has a seed that ran at three or more rates; accepted is such a matrix")
    return found


def rate_loss_table(runs: Sequence[TrainedRun]) -> "pd.DataFrame":
    """The runs, a row each, in the columns of all such tables."""
    kappas = {
        method: trained_runs.kappa_of([run for run in runs if run.method == method])
        for method in dict.fromkeys(run.method for run in runs)
    }
    rows = [
        {"optimizer": "adamw", "trained": "both", "rule": run.method, "kappa": kappas[run.method]}
        | {"rank": run.rank, "scaling": run.gamma, "learning_rate": run.rate, "seed": run.seed}
        | {"loss_held_out": run.loss}
        for run in runs
    ]
    return frames.of(rows, COLUMNS)


def compare_by_records(curves: Sequence[Curve], runs: Sequence[TrainedRun]) -> list[Comparison]:
    """Rules against each other at the largest rank, at the grid's rate of least mean loss, record by record.

    Seeds that ran at both rates are averaged, those of no curve too; the error is over seeds and over records, see
    `rate_curves.joint`. Where one of these runs diverged, the verdict names it and settles nothing: the losses are of
    the seeds that finished both, or where none did the curves' least ones, without an error.
    """
    found = []
    for first, second in pairs(curves):
        rates = [curve.rates[int(np.argmin(np.mean(curve.losses, axis=0)))] for curve in (first, second)]
        groups = [
            {run.seed: run for run in runs if (run.method, run.rank, run.rate) == (curve.rule, curve.rank, rate)}
            for curve, rate in zip((first, second), rates, strict=True)
        ]
        seeds = sorted(set(groups[0]) & set(groups[1]))
        if not seeds:
            continue
        gone = [
            f"{curve.rule} at seed {seed}"
            for curve, group in zip((first, second), groups, strict=True)
            for seed in seeds
            if not math.isfinite(group[seed].loss)
        ]
        ended = [seed for seed in seeds if all(math.isfinite(group[seed].loss) for group in groups)]
        if ended:
            losses = _difference(*([group[seed] for seed in ended] for group in groups))
        else:
            losses = over_seeds(np.array([np.mean(first.least()) - np.mean(second.least())]))
        one = comparison(first, second, losses)
        if gone:
            said = f"{one.verdict}; " if ended else ""
            one = one._replace(verdict=f"{said}diverged at the best rates: {', '.join(gone)}, so not settled")
        found.append(one)
    return found


def _difference(a: Sequence[TrainedRun], b: Sequence[TrainedRun]) -> Estimate:
    """Loss of the first runs less the second's, of the same seeds."""
    (left, _), (right, _) = trained_runs.stacked(a), trained_runs.stacked(b)
    records = None if left is None or right is None else (left, right)
    return paired_losses(
        np.array([run.loss for run in a]),
        np.array([run.loss for run in b]),
        records,
        None if records is None else trained_runs.tokens_of([*a, *b]),
    )
